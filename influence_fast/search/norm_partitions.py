"""Partitions of a store by gradient length, each searched by FAISS.

Inner products with lengths of a heavy tail follow no direction, so rows of similar length share an index over directions
``g / |g|``, and the longest rows, too few of any length to train on, are searched as whole vectors.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast._files import atomic_path, atomic_write
from influence_fast.errors import BackendError, InfluenceError, InputError, StoreError
from influence_fast.search.index_files import IndexFolder, check_files, describe
from influence_fast.search.segments import parts_of
from influence_fast.search.stored_rows import Rows, rescore

_BLOCK_BYTES = 32 << 20
_TRAIN_ROWS = 50_000
_RATIO = 1.5
_ROWS = 2_000
_SLOW_SCAN = 1 << 32
_SPREAD = 8


@dataclass
class NormPartition:
    """A FAISS index over the directions of rows of similar length, or over the longest rows as they are (``whole``)."""

    index: Any
    rows: np.ndarray
    longest: float
    whole: bool = False
    mapped: bool = False

    def add(self, values: np.ndarray, rows: np.ndarray) -> None:
        """Take in vectors of rows; what is mapped from a file, which cannot grow, is read into memory first."""
        if self.mapped:
            faiss = load_faiss()
            self.index, self.mapped = faiss.deserialize_index(faiss.serialize_index(self.index)), False
        self.index.add(values)
        self.rows = np.concatenate([self.rows, rows])

    @property
    def limit(self) -> int:
        """How wide a search can be."""
        inner = _inner(self.index)
        return getattr(inner, "nlist", None) or (inner.ntotal if hasattr(inner, "hnsw") else 1)

    @property
    def nbytes(self) -> int:
        faiss = load_faiss()

        return faiss.serialize_index(self.index).nbytes + self.rows.nbytes

    def search(self, unit: np.ndarray, k: int, breadth: int) -> np.ndarray:
        """Numbers of the rows nearest by direction, ``(m, k)``; -1 fills up."""
        if not len(self.rows):
            return np.full((len(unit), k), -1)
        inner = _inner(self.index)
        if hasattr(inner, "parallel_mode"):
            # Threads share the lists of few queries, or many queries; what another search sets meanwhile changes the speed.
            inner.parallel_mode = int(len(unit) < load_faiss().omp_get_max_threads())
        found = self.index.search(unit, min(k, len(self.rows)), params=_parameters(self.index, breadth))[1]
        return np.where(found >= 0, self.rows[np.maximum(found, 0)], -1)

    def save(self, folder: IndexFolder) -> dict[str, Any]:
        """Write the index and the numbers of its rows (int64); what ``index.json`` says of them."""
        faiss = load_faiss()

        index, rows = folder.new("band-{}.faiss"), folder.new("band-{}.rows")
        with atomic_path(index) as temporary:
            try:
                faiss.write_index(self.index, str(temporary))
            except RuntimeError as error:
                raise OSError(errno.EIO, last_line(error)) from None
        atomic_write(rows, self.rows.astype("<i8").tobytes())
        return {"longest": self.longest, "whole": self.whole, "index": describe(index), "rows": describe(rows)}

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], dim: int, count: int) -> NormPartition:
        """Map what :meth:`save` wrote: vectors of ``dim`` numbers of some of ``count`` rows.

        Raises:
            StoreError: a file is damaged. FAISS believes what it reads, so its file is always checked.
        """
        faiss = load_faiss()

        check_files(folder, [entry["index"], entry["rows"]])
        path = str(folder / entry["index"]["file"])
        try:
            index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, AttributeError):  # not every kind of index can be mapped
            try:
                index = faiss.read_index(path)
            except RuntimeError as error:
                raise StoreError(f"{path}: damaged index ({last_line(error)})") from None
        rows = np.fromfile(folder / entry["rows"]["file"], "<i8")
        if (index.ntotal, index.d) != (len(rows), dim):
            raise StoreError(
                f"{path}: damaged index, {index.ntotal} vectors of {index.d} numbers where {len(rows)} of {dim} are named"
            )
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            raise StoreError(f"{path}: damaged index, it names rows beyond the {count} of its stores")
        return cls(index, rows, entry["longest"], entry["whole"], mapped=True)


def build_partitions(rows: Rows, factory: str, metric: str) -> list[NormPartition]:
    """Train and fill an index for each range of lengths; one alone for cosines.

    Raises:
        InputError: a factory string that FAISS does not know, or cannot train on these rows.
    """
    faiss = load_faiss()

    dim = sum(rows.dims.values())
    try:
        faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(f"factory: FAISS does not know {factory!r} for {dim} numbers ({last_line(error)})") from None
    square = torch.zeros(rows.count, dtype=torch.float64)
    for begin, end, values in row_blocks(rows):
        square[begin:end] = values.double().square().sum(1)
    length = square.sqrt().numpy()
    lists = re.search(r"IVF(\d+)", factory)
    least = least_rows(int(lists[1]) if lists else 0)
    edges, has_longest = ([float(length.max())], False) if metric == "cosine" else _edges(length, least)
    # A partition takes rows up to its edge; rows longer than all, which come later, go to the last.
    place = np.minimum(np.searchsorted(edges, length), len(edges) - 1)
    partitions = []
    for number, edge in enumerate(edges):
        whole = has_longest and number == len(edges) - 1
        index = faiss.IndexFlatIP(dim) if whole else faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        inner = _inner(index)
        if hasattr(inner, "cp"):
            inner.cp.spherical = True
        mine = np.flatnonzero(place == number)
        if not index.is_trained:
            chosen = np.sort(np.random.default_rng(number).permutation(mine)[:_TRAIN_ROWS])
            sample = torch.cat([rows.take(name, torch.from_numpy(chosen)) for name in rows.layers], 1)
            try:
                index.train(directions(sample).numpy())
            except RuntimeError as error:
                raise InputError(
                    f"factory: {factory!r} cannot be trained on {len(mine)} rows ({last_line(error)})"
                ) from None
        partitions.append(NormPartition(index, np.empty(0, np.int64), edge, whole))
    add_to_partitions(partitions, rows, 0, metric)
    return partitions


def add_to_partitions(partitions: list[NormPartition], rows: Rows, first: int, metric: str) -> None:
    edges = [partition.longest for partition in partitions]
    for begin, _, values in row_blocks(rows, first):
        length = values.double().square().sum(1).sqrt().numpy()
        place = (
            np.minimum(np.searchsorted(edges, length), len(partitions) - 1)
            if metric == "dot"
            else np.zeros(len(length), int)
        )
        unit = directions(values)
        for number, partition in enumerate(partitions):
            mine = np.flatnonzero(place == number)
            if len(mine):
                partition.add((values if partition.whole else unit)[mine].numpy(), begin + mine)


def find_rows(
    partitions: Sequence[NormPartition], rows: Rows, queries: Tensor, k: int, breadth: int, cosine: bool
) -> tuple[Tensor, Tensor]:
    """Candidates of every partition by direction, scored exactly; searched wider until every query has k rows.

    Returns:
        float64 scores and row numbers, both ``(m, k)``.

    Raises:
        InfluenceError: some query finds fewer than ``k`` rows however wide it searches.
    """
    unit, alive = directions(queries).numpy(), rows.alive
    while True:
        numbers = torch.from_numpy(
            np.concatenate([partition.search(unit, _SPREAD * k, breadth) for partition in partitions], axis=1)
        )
        if alive is not None:
            numbers = torch.where((numbers >= 0) & alive[numbers], numbers, -1)
        if int((numbers >= 0).sum(1).min()) >= k:
            break
        breadth *= 4
        if breadth >= 4 * max(partition.limit for partition in partitions):
            raise InfluenceError(f"index finds fewer than k={k} rows for some query; build a Flat one")
    scores = rescore(rows, queries, rows.layers, [1.0] * len(rows.layers), numbers, cosine)
    order = np.lexsort((numbers.numpy(), -scores.numpy()), axis=1)[:, :k]  # NaN comes last
    place = torch.from_numpy(order)
    return scores.gather(1, place), numbers.gather(1, place)


def tune(
    partitions: Sequence[NormPartition],
    rows: Rows,
    queries: Tensor,
    k: int,
    breadth: int,
    cosine: bool,
    recall: float,
) -> tuple[int, float]:
    """How wide to search for these queries to find ``recall`` of their best ``k``, and the share that they then find.

    It begins at ``breadth``, doubles until enough is found, and then goes back as far as it can to an eighth. Enough is two
    standard errors more than what is asked for, as other queries are asked later.
    """
    true, limit = best_rows(rows, queries, k, cosine)[1].tolist(), max(partition.limit for partition in partitions)

    def enough(breadth: int) -> tuple[bool, float]:
        found = find_rows(partitions, rows, queries, k, breadth, cosine)[1].tolist()
        shares = np.array([len(set(a) & set(b)) / k for a, b in zip(true, found, strict=True)])
        error = shares.std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
        return bool(shares.mean() - 2 * error >= recall), float(shares.mean())

    narrow, (reached, share) = 0, enough(breadth)
    while not reached and breadth < limit:
        narrow, breadth = breadth, min(2 * breadth, limit)
        reached, share = enough(breadth)
    # A search costs what it reads, and twice the breadth is twice the cost.
    while reached and breadth - narrow > 1 + narrow // 8:
        middle = (narrow + breadth) // 2
        fine, found = enough(middle)
        if fine:
            breadth, share = middle, found
        else:
            narrow = middle
    return breadth, share


def best_rows(rows: Rows, queries: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    """Scores and row numbers of the best k by brute force, in the queries' dtype; as directions for cosines."""
    queries = directions(queries) if cosine else queries
    best, where = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for numbers, read in live_blocks(rows):
        values = read.to(queries.dtype)
        scores = queries @ (directions(values) if cosine else values).T
        best = torch.cat([best, scores], 1)
        where = torch.cat([where, numbers.expand(len(queries), -1)], 1)
        best, place = best.topk(min(k, best.shape[1]))
        where = where.gather(1, place)
    return best, where


def on_gpus(partitions: Sequence[NormPartition]) -> list[NormPartition]:
    """The partitions cloned to all GPUs, sharded; BackendError without faiss-gpu."""
    faiss = load_faiss()

    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise BackendError("to_gpu: needs faiss-gpu and a GPU; search on the CPU instead")
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    return [replace(part, index=faiss.index_cpu_to_all_gpus(part.index, co=options)) for part in partitions]


def automatic_factory(rows: Rows, recall: float, memory: int | None) -> str:
    """A factory string by rows, numbers per row, memory and recall."""
    n, dim = rows.count, sum(rows.dims.values())
    _, stride = parts_of(rows.dims, rows.outs, rows.factors)
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


def least_rows(lists: int) -> int:
    """Rows that a partition of so many lists takes to be trained."""
    return max(_ROWS, 40 * lists)


def _edges(length: np.ndarray, least: int) -> tuple[list[float], bool]:
    """Upper lengths of the partitions, ascending: a factor of 1.5 apart, wider where one would have few rows; and whether
    the last has few, with a lower one to leave the rest to."""
    ordered = np.sort(length)
    has_longest = len(ordered) - int(np.searchsorted(ordered, ordered[-1] / _RATIO, "right")) < least
    edges, end = [float(ordered[-1])], len(ordered)
    while end > 0:
        begin = min(int(np.searchsorted(ordered, edges[-1] / _RATIO, "right")), end - least)
        if begin < least:
            break
        edges.append(float(ordered[begin - 1]))
        end = int(np.searchsorted(ordered, edges[-1], "right"))
    return edges[::-1], has_longest and len(edges) > 1


def row_blocks(rows: Rows, first: int = 0, layers: Sequence[str] | None = None) -> Iterator[tuple[int, int, Tensor]]:
    names = rows.layers if layers is None else layers
    step = max(1, _BLOCK_BYTES // (4 * sum(rows.dims[name] for name in names)))
    for begin in range(first, rows.count, step):
        end = min(begin + step, rows.count)
        yield begin, end, torch.cat([rows.read(name, begin, end) for name in names], 1)


def live_blocks(rows: Rows, layers: Sequence[str] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers and gradients of the rows that are not deleted, block by block."""
    alive = rows.alive
    for begin, end, values in row_blocks(rows, layers=layers):
        numbers = torch.arange(begin, end)
        if alive is not None:
            numbers, values = numbers[alive[begin:end]], values[alive[begin:end]]
        yield numbers, values


def directions(values: Tensor) -> Tensor:
    """Rows of unit length; a zero row stays zero."""
    norm = values.double().norm(dim=1, keepdim=True)
    return torch.where(norm > 0, values / norm, 0).to(values.dtype)


def _inner(index: Any) -> Any:
    faiss = load_faiss()

    return faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index)


def _parameters(index: Any, breadth: int) -> Any:
    """How wide to search, for this call alone: other threads may ask for something else."""
    faiss = load_faiss()

    inner, found = _inner(index), None
    if hasattr(inner, "nlist"):
        found = faiss.SearchParametersIVF(nprobe=min(breadth, inner.nlist))
    elif hasattr(inner, "hnsw"):
        found = faiss.SearchParametersHNSW(efSearch=min(max(16, breadth), max(16, inner.ntotal)))
    if found is not None and isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=found)
    return found


def load_faiss() -> Any:
    """FAISS, which exact search does without.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise BackendError(f"factory: any but Flat needs FAISS (pip install faiss-cpu): {error}") from None
    return faiss


def last_line(error: Exception) -> str:
    """What FAISS says at the end of its many lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].split("Error: ")[-1][:200]
