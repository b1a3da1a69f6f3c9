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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast._memory import parse_memory
from influence_fast.attribution.gradient_source import Gradients, GradientSource, chosen_layers
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.differences import recorded_identity
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_records import verifying
from influence_fast.search.exact import Scan
from influence_fast.search.index_files import IndexFolder, check_files, read_document, remove_unnamed, writing
from influence_fast.search.indexed_rows import (
    as_written,
    digest_of_rows,
    first_number,
    follow,
    open_rows,
    row_name,
    row_names,
    same_rows,
    store_entries,
)
from influence_fast.search.kept_curvature import METHODS as PRECONDITIONED
from influence_fast.search.kept_curvature import Curvatures, Preconditioned, layer_scores
from influence_fast.search.norm_partitions import (
    NormPartition,
    add_to_partitions,
    automatic_factory,
    best_rows,
    build_partitions,
    find_rows,
    on_gpus,
    tune,
)
from influence_fast.search.query_checks import check_store, layer_weights, query_values, row_mask
from influence_fast.search.stored_rows import Rows

METRICS = ("dot", "cosine")
METHODS = (*METRICS, *PRECONDITIONED)
_PARTS = ("stores", "segments", "partitions", "curvature")
_HELD_OUT = 64

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
        # Rows that each store had when it was indexed, deleted ones among them.
        self._written = [len(store) for store, _ in rows.stores]
        self._curvatures = Curvatures()
        # Of all processes' rows, where they search together (``distributed``).
        self._of_all = Curvatures()

    @property
    def ids(self) -> Sequence[int | str]:
        """Names of the rows, in the order of the stores."""
        return row_names(self._rows)

    def name_of(self, row: int) -> int | str:
        """Name of one row: ``ids[row]``, without reading the others."""
        return row_name(self._rows, row)

    @property
    def identity(self) -> dict[str, Any]:
        """What computed the rows, as their store keeps it: class, config, adapters, loss and tokenizer by name."""
        return recorded_identity(self._rows.stores[0][0].meta)

    def __len__(self) -> int:
        return self._rows.count if self._rows.live is None else len(self._rows.live)

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
        return cls._built(store, factory, metric, layers, queries, recall, memory, rows, path)

    @classmethod
    def _built(
        cls,
        store: GradientStore,
        factory: str,
        metric: str,
        layers: Sequence[str] | None,
        queries: Gradients | None = None,
        recall: float = 0.95,
        memory: int | str | None = None,
        rows: range | None = None,
        path: str | os.PathLike[str] | None = None,
        kept: Curvatures | None = None,
    ) -> InfluenceIndex:
        """As :meth:`build`, with the same kinds of curvature as ``kept``."""
        if metric not in METRICS:
            raise InputError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
        if not 0 < recall <= 1:
            raise InputError(f"recall: expected a share above 0 and up to 1, got {recall!r}")
        names = chosen_layers(store.layers, layers)
        part = range(len(store)) if rows is None else rows
        if part.step != 1 or not 0 <= part.start < part.stop <= len(store):
            raise InputError(f"rows: expected a range within the {len(store)} rows of the store, got {rows!r}")
        source = Rows([(store, as_written(store, part))], names)
        if factory == "auto":
            factory = automatic_factory(source, recall, None if memory is None else parse_memory(memory))
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
                scan = Scan(source.dims, source.outs, source.factors)
                scan.add(source, folder)
                built = cls(source, meta, scan, [])
            else:
                built = cls(source, meta, None, build_partitions(source, factory, metric))
                built._widen(queries, recall)
            if kept is not None:
                built._curvatures.taken_over(kept, source, built._seen)
            if folder is not None:
                built._publish(folder)
        return built

    @staticmethod
    def choose_factory(store: GradientStore, recall: float = 0.95, memory: int | str | None = None) -> str:
        """What ``factory="auto"`` becomes for this store; arguments and errors as of :meth:`build`."""
        rows = Rows([(store, as_written(store, range(len(store))))], store.layers)
        return automatic_factory(rows, recall, None if memory is None else parse_memory(memory))

    def measure_recall(self, queries: Gradients, k: int = 10, most: int = 64) -> float:
        """Share of the true best ``k`` that a search finds, over the first ``most`` queries, by float64 brute force.

        A found row counts where its score reaches the k-th best, so that rows with equal scores stand for each other.
        """
        source, k = GradientSource("queries", queries), min(k, len(self))
        some = {name: source.read(name, slice(0, most)) for name in self.layers}
        found, _ = self.search_rows(some, k)
        values = torch.cat(list(some.values()), 1).double()
        edge = best_rows(self._rows, values, k, self.metric == "cosine")[0][:, -1:]
        return float((found >= edge - 1e-9 * edge.abs()).double().mean())

    def add(self, store: GradientStore) -> None:
        """Take in the rows of another store of the same model, projection and layers, behind those that are there.

        Partitions keep what they learnt from the first store. An index that was loaded is added to in memory; save it again.

        Raises:
            StoreError: a store of another model, projection or layers.
        """
        check_store(store, self.meta, self.identity)
        before, was = self._rows.count, self._seen
        rows = Rows([*self._rows.given, (store, as_written(store, range(len(store))))], self.layers)
        rows.check_sizes()
        rows.native(self.layers)
        self._take_in(rows, before)
        self._written.append(len(store.with_deleted))
        self._curvatures.update(rows, self._seen, before, was)

    def update(self, store: GradientStore, path: str | os.PathLike[str] | None = None) -> None:
        """Follow the store that was indexed: take in rows that were appended, leave out rows that were deleted.

        Costs what changed: rows that were there are not read again (FAISS rewrites its files). Once the store was compacted,
        the index is built anew, and no byte of deleted rows is left in it.

        Args:
            store: as it is now. An index of several stores is told by its folder which one.
            path: the folder of the index, which is written on the way; otherwise :meth:`save` it. Killed at any moment, the
                index in it is the old one or the new one.

        Raises:
            InputError: the index is of several stores, none of which is in this folder; or only the last can grow.
            StoreError: a store of another model, projection or layers.
        """
        check_store(store, self.meta, self.identity)
        followed = follow(self._rows, self._written, store)
        if followed is None:
            _log.info("%s: was compacted; the index is built anew", store.path)
            self._curvatures.load_all(self._rows)
            built = self._built(store, self.factory, self.metric, self.layers, path=path, kept=self._curvatures)
            self.__dict__.update(built.__dict__)
            return
        rows, place = followed
        before, seen = self._rows, self._seen
        if rows.count == before.count:
            # Deleted rows are left out by the store, whatever the index holds; they are still in its curvature.
            self._rows = rows
            if not self._curvatures.shares:
                if path is not None:
                    remove_unnamed(path)
                return
        with nullcontext() if path is None else writing(path) as folder:
            if rows.count > before.count:
                self._take_in(rows, before.count, folder)
                self._written[place] = len(store.with_deleted)
            known = before.count if same_rows(before.live, rows.live, before.count) else None
            self._curvatures.update(rows, self._seen, known, seen)
            if folder is not None:
                self._publish(folder)

    @classmethod
    def updated(cls, path: str | os.PathLike[str], store: GradientStore) -> InfluenceIndex:
        """Bring the index in a folder up to date with its store, as :meth:`update` does; what is there if nothing changed.

        An index whose store was compacted since, which does not load, is built anew, of the same kind.

        Raises:
            InputError, StoreError: as of :meth:`load` and :meth:`update`.
        """
        document = read_document(Path(path))
        entries = document["stores"]
        if len(entries) == 1 and store.with_deleted.digest_of(entries[0].get("written", -1)) != entries[0]["digest"]:
            begin, end = entries[0]["rows"]
            if (begin, end) != (0, entries[0].get("written", end)):
                raise InputError(f"store: was compacted, and {path} is an index of a part of it; build it again")
            for key in ("model", "projection"):
                if store.meta[key] != document[key]:
                    raise StoreError(f"store: another {key} than the index ({store.meta[key]}, {document[key]})")
            kept = Curvatures.open(Path(path), document.get("curvature", []), document["layers"], verifying(None))
            names = chosen_layers(store.layers, document["layers"])
            kept.load_all(Rows([(store, range(len(store.with_deleted)))], names))
            return cls._built(store, document["factory"], document["metric"], names, path=path, kept=kept)
        index = cls.load(path, store if len(entries) == 1 else None)
        index.update(store, path)
        return index

    def _take_in(self, rows: Rows, before: int, folder: IndexFolder | None = None) -> None:
        """Search these rows from now on, of which the first ``before`` are known."""
        if self._scan is not None:
            self._scan.add(rows, folder)
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
        method: str | None = None,
    ) -> tuple[Tensor, Any]:
        """The ``k`` most helpful rows for each query, or the most harmful.

        Args:
            queries: a store or ``{layer: (m, dim)}`` of the same layers and projection.
            k: rows to return, at most the number of rows.
            harmful: lowest scores first instead of highest first.
            layers: search by some of the layers, or by a weight for each (``Flat`` alone).
            only: a boolean mask ``(rows,)``, such as ``store.column("prediction") == 1``, or ids: rows to search among
                (``Flat`` alone).
            method: ``dot``, ``cosine``, ``datainf``, ``trak``, ``trackstar`` or ``ekfac`` in place of the index's metric
                (``Flat`` alone): queries are preconditioned by :meth:`add_curvature`'s sums, which are found now, and not
                saved, where there are none. Over several layers the score is the sum of their inner products; ``trackstar``
                divides it by both whitened lengths of all layers together, as ``cosine`` does.

        Returns:
            ``scores`` float32 ``(m, k)``, best first, ties in row order, and ``ids``: an int64 tensor ``(m, k)``, or lists
            where the store's ids are strings.

        Raises:
            InputError: ``k`` out of range, or what ``Flat`` alone can do. StoreError: another model or projection; a shard
                of the store that has changed. InfluenceError: an approximate index that finds fewer than ``k`` rows.
        """
        scores, rows = self.search_rows(queries, k, harmful, layers=layers, only=only, method=method)
        if (first := first_number(self._rows)) is not None:
            return scores.float(), rows + first
        names = [[self.name_of(row) for row in found] for found in rows.tolist()]
        if all(store.numbered for store, _ in self._rows.stores):
            return scores.float(), torch.tensor(names, dtype=torch.int64)
        return scores.float(), names

    def search_rows(
        self,
        queries: Gradients,
        k: int = 10,
        harmful: bool = False,
        *,
        layers: Sequence[str] | Mapping[str, float] | None = None,
        only: Tensor | Sequence[bool] | Sequence[int | str] | None = None,
        method: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`search`, with float64 scores and row numbers, both ``(m, k)``; errors as of :meth:`search`."""
        return self._search_rows(queries, k, harmful, layers, only, method, self._preconditioned)

    def _search_rows(
        self,
        queries: Gradients,
        k: int,
        harmful: bool,
        layers: Sequence[str] | Mapping[str, float] | None,
        only: Any,
        method: str | None,
        precondition: Callable[[str, Tensor, Mapping[str, float]], Preconditioned],
    ) -> tuple[Tensor, Tensor]:
        weights = layer_weights(self.layers, layers)
        values = self._values(queries, list(weights))
        allowed, live = None if only is None else row_mask(len(self), only, lambda: self.ids), self._rows.live
        most = len(self) if allowed is None else int(allowed.count_nonzero())
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
            left = "" if allowed is None else " that are left"
            raise InputError(f"k: expected an int from 1 to the {most} rows of the index{left}, got {k!r}")
        sign = -1 if harmful else 1
        if self._scan is not None:
            names, factors = list(weights), list(weights.values())
            how = self.metric if method is None else method
            ready = precondition(how, values, weights)
            mask = allowed if live is None else self._rows.alive
            if live is not None and mask is not None and allowed is not None:
                mask[torch.from_numpy(live)] = allowed
            scores, rows = self._scan.search(
                self._rows, sign * ready.values, names, factors, k, how == "cosine", mask, ready.rows
            )
            if ready.queries is not None:
                scores = torch.where(ready.queries > 0, 1 / ready.queries, 0)[:, None] * scores
        else:
            if layers is not None or allowed is not None or method not in (None, self.metric):
                raise InputError(
                    f"layers, only, method: chosen at query time by a Flat index alone, this one is {self.factory}"
                )
            _log.info("%s finds %.1f %% of the true best 10", self.factory, 100 * self.recall)
            scores, rows = find_rows(
                self._partitions, self._rows, sign * values, k, self.meta["breadth"], self.metric == "cosine"
            )
        if live is not None:
            rows = torch.from_numpy(np.searchsorted(live, rows.numpy()))
        # No -0 where a harmful search turned a zero.
        return sign * scores + 0.0, rows

    def gradients_at(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Gradients of some rows by number, such as to search for their neighbours: float32 ``(len(rows), dim)`` a layer."""
        numbers = self._numbers(rows)
        return {name: self._rows.take(name, numbers) for name in self.layers}

    def by_layer(self, queries: Gradients, rows: Sequence[int], method: str | None = None) -> dict[str, Tensor]:
        """What each layer adds to the scores of some rows by number: float64 ``(m, len(rows))``, which sum to the scores.

        Raises:
            InputError: no such row, or a method that this index does not answer.
        """
        how = self.metric if method is None else method
        weights, numbers = dict.fromkeys(self.layers, 1.0), self._numbers(rows)
        values = self._values(queries, self.layers)
        ready = Preconditioned(values) if how == self.metric else self._preconditioned(how, values, weights)
        gradients = {name: self._rows.take(name, numbers).double() for name in self.layers}
        return layer_scores(ready, gradients, numbers, how == "cosine")

    def _numbers(self, rows: Sequence[int]) -> Tensor:
        """Rows as the stores number them, deleted ones among them."""
        for row in rows:
            if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(self):
                raise InputError(f"rows: expected numbers from 0 to {len(self) - 1}, got {row!r}")
        numbers = np.asarray(rows, np.int64)
        return torch.from_numpy(numbers if self._rows.live is None else self._rows.live[numbers])

    def add_curvature(
        self,
        method: str,
        *,
        damping: float | Mapping[str, float] = 0.1,
        rank: int | None = None,
        factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Read the rows once for a method, so that searches by it read none again; :meth:`save` keeps what was found.

        A layer's curvature is whole, ``dim^2`` numbers, up to 4,096 numbers a row, and then the influence of
        :func:`~influence_fast.influence`. Of wider layers the largest eigenvalues are kept, by one randomised pass:
        :attr:`curvature` says how much of the trace they hold. :meth:`update` follows the store; another call replaces it.

        Args:
            method: ``datainf``, ``trak``, ``trackstar`` (two passes, and a length of each row and layer is kept; it serves
                ``trak`` too) or ``ekfac``.
            damping: as of :func:`~influence_fast.influence`.
            rank: eigenvalues to keep of every layer that has more numbers than this; takes ``dim * rank`` numbers. By
                default all up to 4,096 numbers, and of wider layers up to 1,024, fewer above 131,072 numbers.
            factors: ``{layer: (E[x x^T], E[dy dy^T])}`` of :func:`~influence_fast.kronecker_factors`, for ``ekfac``.

        Raises:
            InputError: unknown method, an index that is not ``Flat``, missing factors, gradients that are not finite.
        """
        self._check_method(method)
        self._curvatures.make(method, self._rows, self.layers, self._seen, damping, rank, factors or {})

    @property
    def curvature(self) -> dict[str, dict[str, float]]:
        """By method and layer, the share of the curvature's trace that the index keeps: 1 where it is whole."""
        return self._curvatures.shares

    def _check_method(self, method: str) -> None:
        if method not in METHODS:
            raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if self._scan is None:
            raise InputError(f"method: chosen by a Flat index alone, this one is {self.factory}")

    def _preconditioned(self, method: str, values: Tensor, weights: Mapping[str, float]) -> Preconditioned:
        self._check_method(method)
        if method in METRICS:
            return Preconditioned(values)
        if not self._curvatures.serves(method, list(weights)):
            _log.info("curvature for %s is not kept with the index; the rows are read for it", method)
            self.add_curvature(method)
        return self._curvatures.precondition(method, self._rows, values, weights, self._seen)

    @property
    def _seen(self) -> str:
        return digest_of_rows(self._rows, self._written)

    def column(self, name: str) -> Tensor:
        """``loss``, ``correct`` or ``prediction`` of every row of the index, from its stores: ``(rows,)``."""
        found = torch.cat([store.column(name)[rows.start : rows.stop] for store, rows in self._rows.stores])
        return found if self._rows.live is None else found[torch.from_numpy(self._rows.live)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index into a folder; ``index.json`` last, so that an index that was there stays until this one is whole.

        Raises:
            InputError: the folder holds something else than an index.
            InfluenceError: the disk is full, or nothing can be written there.
        """
        with writing(path) as folder:
            self._publish(folder)

    def _publish(self, folder: IndexFolder) -> None:
        folder.publish(
            {
                **self.meta,
                "stores": store_entries(self._rows, self._written, folder.path),
                "segments": [] if self._scan is None else self._scan.save(folder),
                "partitions": [partition.save(folder) for partition in self._partitions],
                **({"curvature": kept} if (kept := self._curvatures.save(folder, self._rows)) else {}),
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

        What is read of the index and of the store is checked when it is first read, files of FAISS as a whole now;
        ``verify=False`` leaves that out, but for the files of FAISS.

        Raises:
            StoreError: there is none, it is damaged, or the store is another than was indexed.
            InputError: another number of stores than was indexed.
        """
        folder = Path(path)
        document = read_document(folder)
        if verifying(verify):
            # Of version 3; later ones are checked block by block when a search has read them.
            check_files(folder, [part["data"] for part in document["segments"] if "blocks" not in part["data"]])
        rows, written = open_rows(folder, document, store, verify)
        meta = {key: document[key] for key in document if key not in _PARTS}
        exact = meta["factory"] == "Flat"
        scan = Scan.open(folder, rows, document["segments"], verifying(verify)) if exact else None
        width = sum(rows.dims.values())
        partitions = [NormPartition.load(folder, entry, width, rows.count) for entry in document["partitions"]]
        counted = scan.rows if scan is not None else sum(len(partition.rows) for partition in partitions)
        if counted != rows.count or exact == bool(partitions):
            raise StoreError(f"{folder}: damaged index, {counted} vectors where {rows.count} are named")
        loaded = cls(rows, meta, scan, partitions)
        loaded._curvatures = Curvatures.open(folder, document.get("curvature", []), rows.layers, verifying(verify))
        loaded._written = written
        return loaded

    def to_gpu(self) -> InfluenceIndex:
        """The same index with its partitions cloned to all GPUs, sharded; BackendError without faiss-gpu. ``Flat`` stays."""
        if self._scan is not None:
            return self
        partitions = on_gpus(self._partitions)
        return InfluenceIndex(self._rows, self.meta, None, partitions)

    def _values(self, queries: Gradients, layers: list[str]) -> Tensor:
        return query_values(queries, layers, self.meta, self.identity)

    def _widen(self, queries: Gradients | None, recall: float) -> None:
        """Search as wide as held-out queries take to find ``recall`` of their best 10, and note what was reached."""
        if queries is None:
            chosen = np.sort(np.random.default_rng(1).permutation(len(self))[:_HELD_OUT])
            numbers = torch.from_numpy(chosen if self._rows.live is None else self._rows.live[chosen])
            held_out = torch.cat([self._rows.take(name, numbers) for name in self.layers], 1)
        else:
            held_out = self._values(queries, self.layers)[:_HELD_OUT]
        k, cosine = min(10, len(self)), self.metric == "cosine"
        self.meta["breadth"], self.recall = tune(
            self._partitions, self._rows, held_out, k, self.meta["breadth"], cosine, recall
        )
        self.meta["recall"] = self.recall
