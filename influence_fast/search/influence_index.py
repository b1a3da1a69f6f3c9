"""Nearest training samples by influence: an index over a gradient store.

An index is over its layers' gradients side by side, so an inner product is the sum of the layers' inner products.
``cosine`` divides by the length of that whole vector. ``Flat`` is exact (``exact.py``) and needs no FAISS: it reads an 8-bit
copy and proves its answer. Any other factory string makes FAISS indexes over partitions by length (``norm_partitions.py``),
whose candidates are scored again from the store. What they miss is measured on held-out queries when the index is built, and
is reported by every search.

On disk: ``index.json`` (``index_files``) beside ``scan-00000.bin``, ... (``Flat``) or ``band-0.faiss``, ``band-0.rows``
(rows of a partition, int64), ... They are memory-mapped. The exact rows stay in the store, whose folder ``index.json``
names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast import ops
from influence_fast._memory import parse_memory
from influence_fast.attribution.gradient_source import Gradients, GradientSource, chosen_layers
from influence_fast.errors import BackendError, InfluenceError, InputError, StoreError
from influence_fast.gradients.differences import other_space, recorded_identity
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_records import verifying
from influence_fast.search.exact import Rows, Scan, parts_of, rescore
from influence_fast.search.index_files import IndexFolder, check_files, read_document, writing
from influence_fast.search.norm_partitions import (
    NormPartition,
    add_to_partitions,
    build_partitions,
    directions,
    least_rows,
    load_faiss,
    row_blocks,
)

METRICS = ("dot", "cosine")
_HELD_OUT = 64
_SLOW_SCAN = 1 << 32
_SPREAD = 8

_log = logging.getLogger("influence_fast")


class InfluenceIndex:
    """Searches the rows of a store. Made by :meth:`build` or :meth:`load`; searches may run in any number of threads.

    Attributes:
        factory: ``Flat`` for exact search, or the FAISS factory string.
        metric: ``dot`` or ``cosine``.
        layers: what the vectors are made of, in this order.
        ids: names of the rows.
        recall: share of the true best 10 that the index finds, measured on held-out queries; 1.0 for ``Flat``.
    """

    def __init__(self, rows: Rows, meta: dict[str, Any], scan: Scan | None, partitions: list[NormPartition]) -> None:
        self.meta = meta
        self.factory: str = meta["factory"]
        self.metric: str = meta["metric"]
        self.layers: list[str] = meta["layers"]
        self.recall: float = meta["recall"]
        self._rows, self._scan, self._partitions = rows, scan, partitions

    @property
    def ids(self) -> Sequence[int | str]:
        """Names of the rows, in the order of the stores."""
        stores = self._rows.stores
        if len(stores) == 1:
            return stores[0][0].ids[stores[0][1].start : stores[0][1].stop]
        if all(isinstance(store.ids, range) for store, _ in stores):
            return range(len(self))
        return [name for store, rows in stores for name in store.ids[rows.start : rows.stop]]

    def name_of(self, row: int) -> int | str:
        """Name of one row: ``ids[row]``, without reading the others."""
        if len(self._rows.stores) > 1 and all(isinstance(store.ids, range) for store, _ in self._rows.stores):
            return row
        return self._rows.id_of(row)

    @property
    def identity(self) -> dict[str, Any]:
        """What computed the rows, as their store keeps it: class, config, adapters, loss and tokenizer by name."""
        return recorded_identity(self._rows.stores[0][0].meta)

    def __len__(self) -> int:
        return self._rows.count

    def __repr__(self) -> str:
        how = "exact" if self.factory == "Flat" else f"recall@10 {self.recall:.3f}"
        return f"InfluenceIndex({self.factory}, {self.metric}: {len(self)} rows, {len(self.layers)} layers, {how})"

    @property
    def nbytes(self) -> int:
        """Bytes of the index itself: mapped where it was loaded or built in a folder, else in memory."""
        return self._scan.nbytes if self._scan is not None else sum(partition.nbytes for partition in self._partitions)

    @classmethod
    def build(
        cls,
        store: GradientStore,
        factory: str = "auto",
        metric: str = "dot",
        layers: Sequence[str] | None = None,
        *,
        queries: Gradients | None = None,
        recall: float = 0.95,
        memory: int | str | None = None,
        rows: range | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> InfluenceIndex:
        """Index a store, in one or two passes over it that hold one block of rows at a time.

        Args:
            store: what to search.
            factory: ``Flat``, any FAISS factory string such as ``IVF256,SQ8`` or ``HNSW32``, or ``auto``: ``Flat`` while its
                copy of one byte a number fits ``memory`` and is scanned in a fraction of a second (up to 4 GiB), else an
                inverted file with the finest codes that fit.
            metric: ``dot`` or ``cosine``.
            layers: some of the layers; all by default. A ``Flat`` index of all can search any of them.
            queries: held-out queries to measure recall on; rows of the store drawn by a seed by default.
            recall: what to reach by searching an approximate index wider; 1 makes ``auto`` choose ``Flat``.
            memory: bytes, or text such as ``2GiB``, that the finished index may take.
            rows: a range of the store's rows, such as the share of one machine.
            path: write the index into this folder while it is built, so that it is never in memory as a whole.

        Raises:
            InputError: unknown metric, layer or factory string; too few rows to train the index; nothing fits ``memory``;
                ``path`` holds something else than an index. What fails leaves an index that was there as it was.
        """
        if metric not in METRICS:
            raise InputError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
        if not 0 < recall <= 1:
            raise InputError(f"recall: expected a share above 0 and up to 1, got {recall!r}")
        names = chosen_layers(store.layers, layers)
        part = range(len(store)) if rows is None else rows
        if part.step != 1 or not 0 <= part.start < part.stop <= len(store):
            raise InputError(f"rows: expected a range within the {len(store)} rows of the store, got {rows!r}")
        source = Rows([(store, part)], names)
        if factory == "auto":
            factory = _auto(source, recall, None if memory is None else parse_memory(memory))
        meta = {
            "factory": factory,
            "metric": metric,
            "layers": names,
            "dims": source.dims,
            "projection": store.meta["projection"],
            "model": store.meta["model"],
            "recall": 1.0,
            "breadth": 1,
        }
        with nullcontext() if path is None else writing(path) as folder:
            if factory == "Flat":
                scan = Scan(source.dims)
                scan.add(source, folder)
                built = cls(source, meta, scan, [])
            else:
                built = cls(source, meta, None, build_partitions(source, factory, metric))
                built._tune(queries, recall)
            if folder is not None:
                built._publish(folder)
        return built

    @staticmethod
    def choose_factory(store: GradientStore, recall: float = 0.95, memory: int | str | None = None) -> str:
        """What ``factory="auto"`` becomes for this store; arguments and errors as of :meth:`build`."""
        rows = Rows([(store, range(len(store)))], store.layers)
        return _auto(rows, recall, None if memory is None else parse_memory(memory))

    def measure_recall(self, queries: Gradients, k: int = 10, most: int = 64) -> float:
        """Share of the true best ``k`` that a search finds, over the first ``most`` queries, by float64 brute force.

        A found row counts where its score reaches the k-th best, so that rows with equal scores stand for each other.
        """
        source, k = GradientSource("queries", queries), min(k, len(self))
        some = {name: source.read(name, slice(0, most)) for name in self.layers}
        found, _ = self.search_rows(some, k)
        cosine = self.metric == "cosine"
        values = _unit_or_whole(torch.cat(list(some.values()), 1).double(), cosine)
        best = torch.empty(len(values), 0, dtype=torch.float64)
        for _, _, rows in row_blocks(self._rows):
            best = torch.cat([best, values @ _unit_or_whole(rows.double(), cosine).T], 1)
            best = best.topk(min(k, best.shape[1])).values
        edge = best[:, -1:]
        return float((found >= edge - 1e-9 * edge.abs()).double().mean())

    def add(self, store: GradientStore) -> None:
        """Take in the rows of another store of the same model, projection and layers, behind those that are there.

        Partitions keep what they learnt from the first store. An index that was loaded is added to in memory; save it again.

        Raises:
            StoreError: a store of another model, projection or layers.
        """
        for key in ("model", "projection"):
            if store.meta[key] != self.meta[key]:
                raise StoreError(f"store: another {key} than the index ({store.meta[key]}, {self.meta[key]})")
        if other := other_space(self.identity, recorded_identity(store.meta)):
            raise StoreError(f"store: made by another computation than the index ({other})")
        for name in self.layers:
            if store.dims.get(name) != self.meta["dims"][name]:
                raise StoreError(
                    f"store: layer {name!r} has {store.dims.get(name)} numbers per row, the index {self.meta['dims'][name]}"
                )
        before = len(self)
        rows = Rows([*self._rows.stores, (store, range(len(store)))], self.layers)
        rows.native(self.layers)
        if self._scan is not None:
            self._scan.add(rows)
        else:
            add_to_partitions(self._partitions, rows, before, self.metric)
        self._rows = rows

    def search(
        self,
        queries: Gradients,
        k: int = 10,
        harmful: bool = False,
        *,
        layers: Sequence[str] | Mapping[str, float] | None = None,
        only: Tensor | Sequence[bool] | Sequence[int | str] | None = None,
    ) -> tuple[Tensor, Any]:
        """The ``k`` most helpful rows for each query, or the most harmful.

        Args:
            queries: a store or ``{layer: (m, dim)}`` of the same layers and projection.
            k: rows to return, at most the number of rows.
            harmful: lowest scores first instead of highest first.
            layers: search by some of the layers, or by a weight for each (``Flat`` alone).
            only: a boolean mask ``(rows,)``, such as ``store.column("prediction") == 1``, or ids: rows to search among
                (``Flat`` alone).

        Returns:
            ``scores`` float32 ``(m, k)``, best first, ties in row order, and ``ids``: an int64 tensor ``(m, k)``, or lists
            where the store's ids are strings.

        Raises:
            InputError: ``k`` out of range, or what ``Flat`` alone can do. StoreError: another model or projection; a shard
                of the store that has changed. InfluenceError: an approximate index that finds fewer than ``k`` rows.
        """
        scores, rows = self.search_rows(queries, k, harmful, layers=layers, only=only)
        ids = self.ids if all(isinstance(store.ids, range) for store, _ in self._rows.stores) else None
        if isinstance(ids, range):
            return scores.float(), rows + ids.start
        return scores.float(), [[self.name_of(row) for row in found] for found in rows.tolist()]

    def search_rows(
        self,
        queries: Gradients,
        k: int = 10,
        harmful: bool = False,
        *,
        layers: Sequence[str] | Mapping[str, float] | None = None,
        only: Tensor | Sequence[bool] | Sequence[int | str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`search`, with float64 scores and row numbers, both ``(m, k)``; errors as of :meth:`search`."""
        weights = self._weights(layers)
        values = self._queries(queries, list(weights))
        allowed = None if only is None else self._mask(only)
        most = len(self) if allowed is None else int(allowed.sum())
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
            left = "" if allowed is None else " that are left"
            raise InputError(f"k: expected an int from 1 to the {most} rows of the index{left}, got {k!r}")
        sign = -1 if harmful else 1
        if self._scan is not None:
            names, factors = list(weights), list(weights.values())
            cosine = self.metric == "cosine"
            scores, rows = self._scan.search(self._rows, sign * values, names, factors, k, cosine, allowed)
        else:
            if layers is not None or allowed is not None:
                raise InputError(
                    f"layers, only: chosen at query time by a Flat index alone, this one is {self.factory}"
                )
            _log.info("%s finds %.1f %% of the true best 10", self.factory, 100 * self.recall)
            scores, rows = self._approximately(sign * values, k)
        # No -0 where a harmful search turned a zero.
        return sign * scores + 0.0, rows

    def column(self, name: str) -> Tensor:
        """``loss``, ``correct`` or ``prediction`` of every row of the index, from its stores: ``(rows,)``."""
        return torch.cat([store.column(name)[rows.start : rows.stop] for store, rows in self._rows.stores])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index into a folder; ``index.json`` last, so that an index that was there stays until this one is whole.

        Raises:
            InputError: the folder holds something else than an index.
            InfluenceError: the disk is full, or nothing can be written there.
        """
        with writing(path) as folder:
            self._publish(folder)

    def _publish(self, folder: IndexFolder) -> None:
        stores = []
        for store, rows in self._rows.stores:
            where = os.path.relpath(store.path.resolve(), folder.path)
            stores.append({"path": where, "digest": store.digest, "rows": [rows.start, rows.stop]})
        folder.publish(
            {
                **self.meta,
                "stores": stores,
                "segments": [] if self._scan is None else self._scan.save(folder),
                "partitions": [partition.save(folder) for partition in self._partitions],
            }
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        store: GradientStore | Sequence[GradientStore] | None = None,
        verify: bool | None = None,
    ) -> InfluenceIndex:
        """Map an index that :meth:`save` wrote, and open its store (or stores; ``store`` says where they are now).

        Every file of the index is checked first, and what is read of the store when it is first read; ``verify=False``
        leaves that out, but for the files of FAISS.

        Raises:
            StoreError: there is none, it is damaged, or the store is another than was indexed.
            InputError: another number of stores than was indexed.
        """
        folder = Path(path)
        document = read_document(folder)
        if verifying(verify):
            check_files(folder, [segment["data"] for segment in document["segments"]])
        entries = document["stores"]
        given = [store] if isinstance(store, GradientStore) else list(store or [])
        if store is not None and len(given) != len(entries):
            raise InputError(f"store: the index is of {len(entries)} stores, got {len(given)}")
        found = given or [
            GradientStore.open(os.path.normpath(folder.resolve() / entry["path"]), verify) for entry in entries
        ]
        pairs = []
        for entry, one in zip(entries, found, strict=True):
            if one.digest != entry["digest"]:
                raise StoreError(f"{one.path}: another store than was indexed; build the index again")
            begin, end = entry["rows"]
            if not begin < end <= len(one):
                raise StoreError(f"{folder}: damaged index, rows {begin} to {end} of the {len(one)} of {one.path}")
            pairs.append((one, range(begin, end)))
        meta = {key: document[key] for key in document if key not in ("stores", "segments", "partitions")}
        layers, dims = meta["layers"], meta["dims"]
        if not pairs or not layers or any({name: one.dims.get(name) for name in layers} != dims for one in found):
            raise StoreError(f"{folder}: damaged index, its layers are not those of its stores")
        for key in ("model", "projection"):
            if any(one.meta[key] != meta[key] for one in found):
                raise StoreError(f"{folder}: damaged index, its {key} is not that of its stores")
        rows = Rows(pairs, layers)
        exact = meta["factory"] == "Flat"
        scan = Scan.open(folder, rows.dims, document["segments"]) if exact else None
        width = sum(rows.dims.values())
        partitions = [NormPartition.load(folder, entry, width, rows.count) for entry in document["partitions"]]
        counted = scan.rows if scan is not None else sum(len(partition.rows) for partition in partitions)
        if counted != rows.count or exact == bool(partitions):
            raise StoreError(f"{folder}: damaged index, {counted} vectors where {rows.count} are named")
        return cls(rows, meta, scan, partitions)

    def to_gpu(self) -> InfluenceIndex:
        """The same index with its partitions cloned to all GPUs, sharded; BackendError without faiss-gpu. ``Flat`` stays."""
        if self._scan is not None:
            return self
        faiss = load_faiss()

        if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
            raise BackendError("to_gpu: needs faiss-gpu and a GPU; search on the CPU instead")
        options = faiss.GpuMultipleClonerOptions()
        options.shard = True
        partitions = [replace(b, index=faiss.index_cpu_to_all_gpus(b.index, co=options)) for b in self._partitions]
        return InfluenceIndex(self._rows, self.meta, None, partitions)

    def _weights(self, layers: Sequence[str] | Mapping[str, float] | None) -> dict[str, float]:
        if not isinstance(layers, Mapping):
            return dict.fromkeys(chosen_layers(self.layers, layers), 1.0)
        names = chosen_layers(self.layers, list(layers))
        weights = {name: float(layers[name]) for name in names}
        if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
            raise InputError(f"layers: expected weights that are not negative, one of them positive, got {layers!r}")
        return {name: weight for name, weight in weights.items() if weight}

    def _mask(self, only: Any) -> Tensor:
        n = len(self)
        if isinstance(only, Tensor | np.ndarray) or (len(only) and isinstance(only[0], bool)):
            given = torch.as_tensor(only)
            if given.dtype == torch.bool:
                if given.shape != (n,):
                    raise InputError(f"only: expected a mask of the {n} rows, got shape {tuple(given.shape)}")
                return given
            only = given.tolist()
        ids = self.ids
        place = ids if isinstance(ids, range) else {name: row for row, name in enumerate(ids)}
        mask = torch.zeros(n, dtype=torch.bool)
        for name in only:
            if name not in place:
                raise InputError(f"only: no row has the id {name!r}")
            mask[place.index(name) if isinstance(place, range) else place[name]] = True
        return mask

    def _queries(self, queries: Gradients, layers: list[str]) -> Tensor:
        found = GradientSource("queries", queries)
        for name in layers:
            if name not in found.layers:
                raise StoreError(f"queries: lack layer {name!r} of the index; they have {', '.join(found.layers)}")
            if found.dim(name) != self.meta["dims"][name]:
                raise StoreError(
                    f"queries: layer {name!r} has {found.dim(name)} numbers per row, the index {self.meta['dims'][name]}"
                )
        if found.store is not None:
            for key in ("model", "projection"):
                if found.store.meta[key] != self.meta[key]:
                    raise StoreError(
                        f"queries: another {key} than the index ({found.store.meta[key]}, {self.meta[key]})"
                    )
            if other := other_space(self.identity, recorded_identity(found.store.meta)):
                raise StoreError(f"queries: made by another computation than the index ({other})")
        values = torch.cat([found.read(name) for name in layers], 1)
        if not values.isfinite().all():
            row = int(values.isfinite().all(1).logical_not().nonzero()[0])
            raise InputError(f"queries: row {row} has NaN or infinity")
        return values

    def _approximately(self, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Candidates of every partition by direction, scored exactly; searched wider until every query has k rows."""
        breadth, cosine = self.meta["breadth"], self.metric == "cosine"
        unit = directions(values).numpy()
        weights = [1.0] * len(self.layers)
        while True:
            numbers = torch.from_numpy(
                np.concatenate([partition.search(unit, _SPREAD * k, breadth) for partition in self._partitions], axis=1)
            )
            if int((numbers >= 0).sum(1).min()) >= k:
                break
            breadth *= 4
            if breadth >= 4 * max(partition.limit for partition in self._partitions):
                raise InfluenceError(
                    f"index {self.factory!r} finds fewer than k={k} rows for some query; build a Flat one"
                )
        scores = rescore(self._rows, values, self.layers, weights, numbers, cosine)
        order = np.lexsort((numbers.numpy(), -scores.numpy()), axis=1)[:, :k]  # NaN comes last
        place = torch.from_numpy(order)
        return scores.gather(1, place), numbers.gather(1, place)

    def _tune(self, queries: Gradients | None, recall: float) -> None:
        """Search wider until held-out queries find ``recall`` of their best 10, and note what was reached."""
        k = min(10, len(self))
        if queries is None:
            numbers = torch.from_numpy(np.sort(np.random.default_rng(1).permutation(len(self))[:_HELD_OUT]))
            held_out = torch.cat([self._rows.take(name, numbers) for name in self.layers], 1)
        else:
            held_out = self._queries(queries, self.layers)[:_HELD_OUT]
        true = _best(self._rows, held_out, k, self.metric)
        limit = max(partition.limit for partition in self._partitions)
        while True:
            found = self._approximately(held_out, k)[1].tolist()
            reached = float(np.mean([len(set(a) & set(b)) / k for a, b in zip(true.tolist(), found, strict=True)]))
            self.recall = self.meta["recall"] = reached
            if reached >= recall or self.meta["breadth"] >= limit:
                return
            self.meta["breadth"] = min(2 * self.meta["breadth"], limit)


def vote_from_index(
    index: InfluenceIndex, queries: Gradients, k: int, *, check: int = 8
) -> tuple[Tensor, dict[str, float | int]]:
    """``vote`` from searches: for every layer and query the ``k`` most harmful rows, ``-sum of (k - rank)`` of each.

    No row of influence is formed, so this is for small ``k``; the index is a ``Flat`` one of inner products, to search
    layer by layer. It differs from ``aggregate(.., "vote")`` only in ties: scores are compared in float64, and those across
    the k-th place count as if no more rows shared them.

    Returns:
        Votes float64 ``(n,)`` and ``{"checked": rows of influence computed to compare, "difference": share of their votes
        that went elsewhere}``.
    """
    if index.metric != "dot":
        raise InputError("index: votes from an index are of inner products; build it with metric='dot'")
    source, n = GradientSource("queries", queries), len(index)
    votes = torch.zeros(n, dtype=torch.float64)
    off, total, checked = 0.0, 0.0, 0
    picked = set(np.random.default_rng(0).permutation(len(index.layers) * source.rows)[:check].tolist())
    for layer, name in enumerate(index.layers):
        values = source.read(name)
        scores, rows = index.search_rows({name: values}, k, harmful=True, layers=[name])
        for query in range(source.rows):
            _, run, size = scores[query].unique_consecutive(return_inverse=True, return_counts=True)
            rank = (size.cumsum(0) - (size + 1) / 2)[run].double()
            votes[rows[query]] -= k - rank
            if layer * source.rows + query in picked:
                own = torch.zeros(n, dtype=torch.float64)
                own[rows[query]] = rank - k
                row = torch.cat([values[query] @ block.T for _, _, block in row_blocks(index._rows, layers=[name])])
                exact = ops.vote(row[None], k)
                off += float((exact - own).abs().sum()) / 2
                total += float(exact.abs().sum())
                checked += 1
    return votes, {"checked": checked, "difference": off / total if total else 0.0}


def _auto(rows: Rows, recall: float, memory: int | None) -> str:
    """A factory string by rows, numbers per row, memory and recall."""
    n, dim = rows.count, sum(rows.dims.values())
    _, stride = parts_of(rows.dims)
    if (memory is None or n * (stride + 16 * len(rows.dims)) <= memory) and (recall == 1 or n * stride <= _SLOW_SCAN):
        return "Flat"
    lists = int(2 ** np.clip(np.round(np.log2(4 * n**0.5)), 4, 16))
    # Centres, and the longest rows as they are.
    whole = 4 * dim * (lists + min(n, least_rows(lists)))
    codes = [("SQ8", dim), ("SQ4", dim / 2), *((f"PQ{dim // d}", dim / d) for d in (4, 8, 16) if dim % d == 0)]
    for name, size in codes:
        if recall < 1 and (memory is None or n * (size + 16) + whole <= memory):
            return f"IVF{lists},{name}"
    raise InputError(f"memory: no index of {n} rows of {dim} numbers fits {memory} bytes at recall {recall:g}")


def _best(rows: Rows, queries: Tensor, k: int, metric: str) -> Tensor:
    """Row numbers of the best k by brute force in float32."""
    best, where = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for begin, end, values in row_blocks(rows):
        scores = queries @ (directions(values) if metric == "cosine" else values).T
        best = torch.cat([best, scores], 1)
        where = torch.cat([where, torch.arange(begin, end).expand(len(queries), -1)], 1)
        best, place = best.topk(min(k, best.shape[1]))
        where = where.gather(1, place)
    return where


def _unit_or_whole(values: Tensor, cosine: bool) -> Tensor:
    return torch.nn.functional.normalize(values, dim=1) if cosine else values
