"""Nearest training samples by influence: a FAISS index over a gradient store.

An index holds, for each row, its layers' gradients side by side, so an inner product is the sum of the layers' inner
products. ``cosine`` divides by the length of that whole vector. The candidates of a ``Flat`` index are scored again in
float64, so it returns what brute force returns, ties in row order. Anything else is approximate: it carries the recall
that was measured when it was built.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from influence_fast.errors import InfluenceError, InputError, StoreError
from influence_fast.influence import Gradients, Source, chosen_layers
from influence_fast.store import GradientStore

METRICS = ("dot", "cosine")
_BLOCK_BYTES = 128 << 20
_FLAT_ROWS = 200_000
_TRAIN_ROWS = 50_000
_HELD_OUT = 64


class InfluenceIndex:
    """Searches the rows of a store. Made by :meth:`build` or :meth:`load`.

    For one index per layer build one with each of ``layers=[name]``.

    Attributes:
        factory: the FAISS factory string, ``Flat`` for exact search.
        metric: ``dot`` or ``cosine``.
        layers: what the vectors are made of, in this order.
        ids: names of the rows.
        recall: share of the true best 10 that the index finds, measured on held-out queries; 1.0 for ``Flat``.
    """

    def __init__(self, index: Any, meta: dict[str, Any]) -> None:
        self._index = index
        self.meta = meta
        self.factory: str = meta["factory"]
        self.metric: str = meta["metric"]
        self.layers: list[str] = meta["layers"]
        self.recall: float = meta["recall"]
        self.ids: Sequence[int | str] = range(meta["rows"]) if meta["ids"] is None else meta["ids"]

    def __len__(self) -> int:
        return self.meta["rows"]

    def __repr__(self) -> str:
        how = "exact" if self.factory == "Flat" else f"recall@10 {self.recall:.3f}"
        return f"InfluenceIndex({self.factory}, {self.metric}: {len(self)} rows, {len(self.layers)} layers, {how})"

    @classmethod
    def build(
        cls,
        store: GradientStore,
        factory: str = "auto",
        metric: str = "dot",
        layers: Sequence[str] | None = None,
        *,
        queries: Gradients | None = None,
    ) -> InfluenceIndex:
        """Index a store.

        Args:
            store: what to search.
            factory: ``Flat``, any FAISS factory string such as ``IVF256,Flat`` or ``HNSW32``, or ``auto``: ``Flat`` up to
                200,000 rows, an inverted file above, which is approximate.
            metric: ``dot`` or ``cosine``.
            layers: some of the layers, such as one alone; all by default.
            queries: held-out queries to measure recall on; rows of the store drawn by a seed by default.

        Raises:
            InputError: unknown metric, layer or factory string; too few rows to train the index.
        """
        if metric not in METRICS:
            raise InputError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
        names = chosen_layers(store.layers, layers)
        dim, rows = sum(store.dims[name] for name in names), len(store)
        if factory == "auto":
            factory = "Flat" if rows <= _FLAT_ROWS else f"IVF{int(4 * rows**0.5)},Flat"
        try:
            index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise InputError(f"factory: FAISS does not know {factory!r} for {dim} numbers ({_brief(error)})") from None
        vectors = _Vectors(store, names, metric)
        if not index.is_trained:
            sample = np.sort(np.random.default_rng(0).permutation(rows)[: min(rows, _TRAIN_ROWS)])
            try:
                index.train(vectors.read(sample))
            except RuntimeError as error:
                raise InputError(f"factory: {factory!r} cannot be trained on {rows} rows ({_brief(error)})") from None
        for begin in range(0, rows, vectors.step):
            index.add(vectors.read(slice(begin, begin + vectors.step)))
        meta = {
            "factory": factory,
            "metric": metric,
            "layers": names,
            "dims": {name: store.dims[name] for name in names},
            "rows": rows,
            "ids": None if isinstance(store.ids, range) else list(store.ids),
            "projection": store.meta["projection"],
            "model": store.meta["model"],
            "recall": 1.0,
        }
        built = cls(index, meta)
        if factory != "Flat":
            built.recall = meta["recall"] = built._measure(vectors, queries)
        return built

    def search(self, queries: Gradients, k: int = 10, harmful: bool = False) -> tuple[Tensor, Any]:
        """The ``k`` most helpful rows for each query, or the most harmful.

        Args:
            queries: a store or ``{layer: (m, dim)}`` of the same layers and projection.
            k: rows to return, at most the number of rows.
            harmful: lowest scores first instead of highest first.

        Returns:
            ``scores`` float32 ``(m, k)``, best first, and ``ids``: an int64 tensor ``(m, k)``, or lists where the
            store's ids are strings.

        Raises:
            InputError: ``k`` out of range. StoreError: another model or projection.
            InfluenceError: an approximate index that finds fewer than ``k`` rows however far it looks.
        """
        vectors = self._queries(queries)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(self):
            raise InputError(f"k: expected an int from 1 to the {len(self)} rows of the index, got {k!r}")
        sign = -1 if harmful else 1
        scores, rows = self._nearest(sign * vectors, k)
        if isinstance(self.ids, range):
            return sign * scores.float(), rows
        return sign * scores.float(), [[self.ids[row] for row in found] for found in rows.tolist()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index into a folder: ``index.faiss`` and ``index.json``."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self._index, str(folder / "index.faiss.part"))
        (folder / "index.json.part").write_text(json.dumps(self.meta, indent=1) + "\n")
        for name in ("index.faiss", "index.json"):
            (folder / f"{name}.part").rename(folder / name)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InfluenceIndex:
        """Read an index that :meth:`save` wrote. StoreError when there is none or it is damaged."""
        folder = Path(path)
        try:
            meta = json.loads((folder / "index.json").read_text())
            index = faiss.read_index(str(folder / "index.faiss"))
            built = cls(index, meta)
        except FileNotFoundError:
            raise StoreError(f"{folder}: no index (no index.json)") from None
        except (ValueError, KeyError, RuntimeError) as error:
            raise StoreError(f"{folder}: damaged index ({_brief(error)})") from None
        if index.ntotal != meta["rows"]:
            raise StoreError(f"{folder}: damaged index, {index.ntotal} vectors where {meta['rows']} are named")
        return built

    def _queries(self, queries: Gradients) -> np.ndarray:
        found = Source("queries", queries)
        for name in self.layers:
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
        values = torch.cat([found.read(name) for name in self.layers], 1)
        if not values.isfinite().all():
            row = int(values.isfinite().all(1).logical_not().nonzero()[0])
            raise InputError(f"queries: row {row} has NaN or infinity")
        return _normalised(values).numpy() if self.metric == "cosine" else values.numpy()

    def _nearest(self, vectors: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
        """Scores and rows, highest first, ties in row order."""
        values, rows = self._exactly(vectors, k) if self.factory == "Flat" else self._search(vectors, k)
        order = np.lexsort((rows, -values), axis=1)[:, :k]
        return tuple(torch.from_numpy(np.take_along_axis(found, order, 1)) for found in (values, rows))  # type: ignore

    def _exactly(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Candidates scored in float64, enough of them that none outside can belong to the best ``k``."""
        width = min(len(self), k + 16)
        while True:
            values, rows = self._index.search(vectors, width)
            # FAISS computes in float32: what lies this close to the k-th value may be above it.
            doubt = 1e-5 * np.abs(values).max(1)
            undecided = values[:, -1] >= values[:, k - 1] - doubt
            if width == len(self) or not undecided.any():
                break
            width = min(len(self), 4 * width)
        exact = np.empty(values.shape)
        for query, candidates in enumerate(rows):
            found = self._index.reconstruct_batch(candidates).astype(np.float64)
            exact[query] = found @ vectors[query].astype(np.float64)
        return exact, rows

    def _search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's answer, searched wider until every query has k rows: FAISS fills up with -1, which is no row."""
        values, found = self._index.search(vectors, k)
        name, limit = _breadth(self._index)
        breadth = 1
        while (found < 0).any():
            breadth *= 4
            if name is None or breadth >= 4 * limit:
                raise InfluenceError(
                    f"index {self.factory!r} finds fewer than k={k} rows for some query; build a Flat one"
                )
            faiss.ParameterSpace().set_index_parameter(self._index, name, min(breadth, limit))
            values, found = self._index.search(vectors, k)
        return values, found

    def _measure(self, vectors: _Vectors, queries: Gradients | None) -> float:
        k = min(10, len(self))
        if queries is None:
            rows = np.sort(np.random.default_rng(1).permutation(len(self))[:_HELD_OUT])
            asked = vectors.read(rows)
        else:
            asked = self._queries(queries)[:_HELD_OUT]
        true = vectors.brute_force(asked, k).tolist()
        found = self._index.search(asked, k)[1].tolist()
        return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(true, found, strict=True)]))


class _Vectors:
    """Rows of a store as the vectors of an index, read in blocks."""

    def __init__(self, store: GradientStore, layers: list[str], metric: str) -> None:
        self.store, self.layers, self.metric = store, layers, metric
        self.step = max(1, _BLOCK_BYTES // (4 * sum(store.dims[name] for name in layers)))

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        wanted = rows if isinstance(rows, slice) else rows.tolist()
        values = torch.cat([self.store.read(name, wanted) for name in self.layers], 1)
        return (_normalised(values) if self.metric == "cosine" else values).numpy()

    def brute_force(self, queries: np.ndarray, k: int) -> np.ndarray:
        blocks = [self.read(slice(b, b + self.step)) @ queries.T for b in range(0, len(self.store), self.step)]
        return np.argsort(-np.concatenate(blocks).T, axis=1, kind="stable")[:, :k]


def _normalised(values: Tensor) -> Tensor:
    norm = values.double().norm(dim=1, keepdim=True)
    return torch.where(norm > 0, values / norm, 0).float()


def _breadth(index: Any) -> tuple[str | None, int]:
    """The FAISS parameter that widens a search, and its largest useful value."""
    inner = faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index)
    if hasattr(inner, "nlist"):
        return "nprobe", inner.nlist
    if hasattr(inner, "hnsw"):
        return "efSearch", inner.ntotal
    return None, 0


def _brief(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].split("Error: ")[-1][:200]
