"""The rows that an index is of, as their stores keep them: read in blocks, and through addresses by the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.gradients.store_reader import StoreReader

try:
    import influence_fast_cpu as _native
except ImportError:
    _native = None


class Rows:
    """The exact rows: stores of the same layers, one behind the other, of each a range of the rows that were written.

    Attributes:
        stores: with the rows that are deleted, which are numbered like the others.
        live: numbers of the rows that are not deleted, int64 ascending; None where none is.
    """

    def __init__(self, stores: Sequence[tuple[StoreReader, range]], layers: Sequence[str]) -> None:
        self.given = list(stores)
        self.stores = [(store.with_deleted, rows) for store, rows in stores]
        self.layers = list(layers)
        self.dims = {name: self.stores[0][0].dims[name] for name in layers}
        self.count = sum(len(rows) for _, rows in self.stores)
        first = self.stores[0][0]
        self.factors, self.outs = first.factors, {name: out for name, out in first.outs.items() if name in self.dims}
        self.live = self._live()
        self._native: dict[tuple[str, ...], Any] = {}

    def _live(self) -> np.ndarray | None:
        if all(store.live is None for store, _ in self.given):
            return None
        found, first = [], 0
        for store, rows in self.given:
            live = np.arange(rows.start, rows.stop) if store.live is None else store.live
            low, high = np.searchsorted(live, [rows.start, rows.stop])
            found.append(live[low:high] - rows.start + first)
            first += len(rows)
        live = np.concatenate(found)
        return None if len(live) == self.count else live

    @property
    def alive(self) -> Tensor | None:
        """Which rows are not deleted: boolean ``(count,)``; None where none is."""
        if self.live is None:
            return None
        mask = torch.zeros(self.count, dtype=torch.bool)
        mask[torch.from_numpy(self.live)] = True
        return mask

    def read(self, layer: str, begin: int, end: int) -> Tensor:
        """Rows ``begin .. end`` of all stores together: float32."""
        found = [store.read(layer, there) for store, there in self._places(begin, end)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def read_factors(self, layer: str, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Of rows ``begin .. end`` what their gradients are the products of."""
        found = [store.read_factors(layer, there) for store, there in self._places(begin, end)]
        left, right = zip(*found, strict=True)
        return torch.cat(left), torch.cat(right)

    def _places(self, begin: int, end: int) -> Iterator[tuple[StoreReader, slice]]:
        """The stores that rows ``begin .. end`` of all together lie in, and where in each."""
        first = 0
        for store, rows in self.stores:
            low, high = max(begin - first, 0), min(end - first, len(rows))
            if low < high:
                yield store, slice(rows.start + low, rows.start + high)
            first += len(rows)

    def take(self, layer: str, numbers: Tensor) -> Tensor:
        out, first = torch.empty(len(numbers), self.dims[layer], dtype=torch.float32, device="cpu"), 0
        for store, rows in self.stores:
            mine = (numbers >= first) & (numbers < first + len(rows))
            if mine.any():
                out[mine] = store.read(layer, numbers[mine] - first + rows.start)
            first += len(rows)
        return out

    def id_of(self, row: int) -> int | str:
        """Name of a row."""
        first = 0
        for store, rows in self.stores:
            if row < first + len(rows):
                return store.ids[row - first + rows.start]
            first += len(rows)
        raise IndexError(row)

    def check(self, layers: Sequence[str], numbers: np.ndarray) -> None:
        """Check what the kernels read, or are about to, of some rows; StoreError names what is damaged."""
        first = 0
        for store, rows in self.stores:
            mine = numbers[(numbers >= first) & (numbers < first + len(rows))]
            if len(mine):
                store.check_rows(layers, mine - first + rows.start)
            first += len(rows)

    def shard_of(self, row: int) -> Path:
        first = 0
        for store, rows in self.stores:
            if row < first + len(rows):
                return store.shard_of(row - first + rows.start)
            first += len(rows)
        raise IndexError(row)

    def check_sizes(self) -> None:
        """Before the kernels may read any row; StoreError where a file is missing or has another size."""
        for store, _ in self.stores:
            store.check_sizes()

    def native(self, layers: Sequence[str]) -> Any:
        """What the kernels read rows through; addresses hold while the stores live, so that it is made once."""
        if (key := tuple(layers)) not in self._native:
            self._native[key] = self._addressed(layers)
        return self._native[key]

    def _addressed(self, layers: Sequence[str]) -> Any:
        firsts, data, scales, first = [], [], [], 0
        for store, rows in self.stores:
            edges = store.firsts
            kept = [s for s in range(len(edges) - 1) if edges[s] < rows.stop and edges[s + 1] > rows.start]
            names = [store.addresses(name)[kept] for name in layers]
            sizes = [store.addresses(f"@scale/{name}")[kept] for name in layers]
            # A shard that the range cuts begins before it: rows below the range are never asked for.
            firsts += [first + int(edges[s]) - rows.start for s in kept]
            data.append(np.stack(names, 1))
            scales.append(np.stack(sizes, 1))
            first += len(rows)
        # Which layers are kept as factors follows from their number, and from shapes and projection, which are the same.
        if len({store.factors for store, _ in self.stores}) > 1:
            raise InputError("store: expected stores with one number of factors")
        factored: dict[str, Any] = {}
        if self.factors:
            outs = np.array([self.outs.get(name, 0) for name in layers], np.int64)
            factored = {"factors": self.factors, "outs": outs}
        kinds = {store.meta["dtype"] for store, _ in self.stores}
        if len(kinds) > 1:
            raise InputError(f"store: expected stores of one dtype, got {', '.join(sorted(kinds))}")
        return _native.StoredRows(
            firsts=np.array([*firsts, first], np.int64),
            data=np.concatenate(data),
            scales=np.concatenate(scales),
            dims=np.array([self.dims[name] for name in layers], np.int64),
            dtype=kinds.pop(),
            **factored,
        )


def rescore(
    rows: Rows, queries: Tensor, layers: Sequence[str], weights: Sequence[float], numbers: Tensor, cosine: bool = False
) -> Tensor:
    """Exact scores of given rows: ``numbers`` int64 ``(m, c)`` -> float64 ``(m, c)``; NaN where a number is -1."""
    stored, weight = rows.native(layers), np.array(weights, np.float64)
    queries, numbers = queries.contiguous(), numbers.contiguous()
    rows.check(layers, numbers.numpy()[numbers.numpy() >= 0])
    scores = torch.empty(numbers.shape, dtype=torch.float64, device="cpu")
    _native.exact_scores(
        stored=stored,
        queries=query_matrix(queries),
        weights=weight,
        cosine=cosine,
        rows=numbers.data_ptr(),
        width=numbers.shape[1],
        scores=scores.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return scores


def query_matrix(values: Tensor) -> Any:
    """Queries as the kernels take them: float32, contiguous, alive as long as they are used."""
    return _native.Matrix(values.data_ptr(), "float32", values.shape, values.stride())
