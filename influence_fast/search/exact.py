"""Exact search over a store: an 8-bit copy of its rows is scanned, and what its error cannot rule out is scored exactly.

The score of a row is the float64 sum of products of its stored numbers (float32, or what a narrower store widens to) with
the query's, layer by layer, times the layer's weight; best first, ties in row order. A cosine is that sum divided by both
lengths, ``sqrt(sum of weight * |layer|^2)``, and 0 where one is 0. The answer is proven to be the best k of these scores:
the copy's rounding error is known for every row, so a row is left out only where its score cannot reach the k-th best
(``csrc/cpu/exact_search.h``). It does not depend on threads, batches, instruction sets or on how the copy is cut.

The copy is a list of segments of consecutive rows, in memory or each a file that is mapped (``segments``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast._memory import GiveBack
from influence_fast.errors import BackendError, StoreError
from influence_fast.search.factor_codes import factor_codes, query_terms
from influence_fast.search.index_files import IndexFolder
from influence_fast.search.segments import ALL_SEEN, NAMES, Layout, Part, Segment
from influence_fast.search.stored_rows import Rows, query_matrix

try:
    import influence_fast_cpu as _native
except ImportError as error:
    _native = None
    _missing = str(error)

_log = logging.getLogger("influence_fast")
_SEGMENT_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_KEPT_NATIVES = 4


class Scan:
    """The 8-bit copy of some rows, and the search over it."""

    def __init__(self, dims: dict[str, int], outs: Mapping[str, int], factors: int) -> None:
        if _native is None:
            raise BackendError(f"exact search needs the extension influence_fast_cpu, which is not built ({_missing})")
        self.dims = dims
        self.layout = Layout(dims, outs, factors)
        self.parts, self.stride, self.factored = self.layout.parts, self.layout.stride, self.layout.factored
        self.segments: list[Segment] = []
        self._seen: tuple[np.ndarray, np.ndarray] | None = None
        self._natives: dict[tuple[str, ...], tuple[list[Any], Any]] = {}
        self._lock = Lock()

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for segment in self.segments for array in segment.arrays.values())

    def add(self, rows: Rows, folder: IndexFolder | None = None) -> None:
        """Copy the rows that are not yet in it; with ``folder`` each segment into a file, which is then mapped.

        A last segment with space left is copied again with them: many additions of few rows give no more segments than one.
        """
        step = max(_native.block_rows, _SEGMENT_BYTES // (4 * sum(self.dims.values())))
        if rows.count > self.rows and self.segments and self.segments[-1].rows < step:
            self.segments.pop()
        # One buffer for all segments: freed and asked for again, it would leave holes that the allocator cannot fill.
        count = min(step, rows.count - self.rows)
        codes = np.empty((count, self.stride), np.uint8)
        padded = None if folder is None else np.empty(count * self.stride + 64, np.uint8)
        give_back = GiveBack(0.1)
        for begin in range(self.rows, rows.count, step):
            end = min(begin + step, rows.count)
            arrays = self._quantised(rows, begin, end, codes[: end - begin], padded)
            segment = Segment(begin, end - begin, arrays)
            if folder is not None:
                about = self.layout.write(folder, arrays)
                segment = self.layout.mapped(folder.path / about["file"], begin, end - begin, about, verify=False)
            self.segments.append(segment)
            give_back()
        self._natives, self._seen = {}, None

    def save(self, folder: IndexFolder) -> list[dict[str, Any]]:
        """Write the segments that are not there yet; what ``index.json`` says of all."""
        entries = []
        for segment in self.segments:
            about = segment.about
            if about is None or not folder.has(segment.path):
                segment.check_all()
                about = self.layout.write(folder, segment.arrays)
            entries.append({"rows": segment.rows, "data": about})
        return entries

    @classmethod
    def open(cls, folder: Path, rows: Rows, entries: Sequence[Mapping[str, Any]], verify: bool) -> Scan:
        """Map the segments that :meth:`save` wrote of these rows; StoreError where one is damaged."""
        scan, first = cls(rows.dims, rows.outs, rows.factors), 0
        for entry in entries:
            path = (folder / entry["data"]["file"]).resolve()
            scan.segments.append(scan.layout.mapped(path, first, entry["rows"], entry["data"], verify))
            first += entry["rows"]
        return scan

    def search(
        self,
        rows: Rows,
        queries: Tensor,
        layers: Sequence[str],
        weights: Sequence[float],
        k: int,
        cosine: bool = False,
        allowed: Tensor | None = None,
        lengths: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The ``k`` best rows: float64 scores ``(m, k)`` and int64 row numbers ``(m, k)``.

        ``queries`` float32 ``(m, dims of layers)``; ``allowed`` a boolean ``(rows,)``; ``lengths`` float64 ``(rows,)`` that
        the scores of rows are divided by, 0 for a score of 0. StoreError names a file that is damaged, or a shard whose row
        does not have the score that the copy allows: it has changed since.
        """
        if lengths is not None and (lengths.dtype != np.float64 or lengths.shape != (self.rows,)):
            raise StoreError(f"index: damaged, {lengths.shape} lengths of its {self.rows} rows")
        segments, _kept = self._segments(layers, cosine, lengths)
        edges, checked = self._checked()
        divided = {} if lengths is None else {"lengths": lengths.ctypes.data}
        parts = [
            _native.RowPart(
                offset=p.offset,
                index=i,
                layer=layers.index(p.layer),
                begin=p.begin,
                scales=p.scale - i,
                lengths=len(self.parts) + self.factored.index(p) - i if p.factors else 0,
                **({"dim": p.dim} if not p.factors else _factor_sizes(p)),
            )
            for i, p in enumerate(self.parts)
            if p.layer in layers
        ]
        factored = [part for part in self.factored if part.layer in layers]
        by_layer = dict(zip(layers, queries.split([self.dims[name] for name in layers], 1), strict=True))
        matrices = {part.layer: by_layer[part.layer].unflatten(1, part.sides) for part in factored}
        rows.check_sizes()
        stored, weight = rows.native(layers), np.array(weights, np.float64)
        mask = None if allowed is None else allowed.contiguous().view(torch.uint8)
        scores, found = (
            torch.empty(len(queries), k, dtype=torch.float64, device="cpu"),
            torch.empty(len(queries), k, dtype=torch.int64, device="cpu"),
        )
        # Each thread may keep a few times k candidates of every query.
        step = max(1, min(1024, (1 << 22) // k))
        scanned = 0
        seen = np.zeros(len(checked) if int(checked.min()) < ALL_SEEN else 0, np.uint8)
        for begin in range(0, len(queries), step):
            asked = queries[begin : begin + step].contiguous()
            read, bad, misplaced, scored = _native.exact_search(
                segments=segments,
                parts=parts,
                stored=stored,
                queries=query_matrix(asked),
                weights=weight,
                cosine=cosine,
                allowed=0 if mask is None else mask.data_ptr(),
                k=k,
                scores=scores[begin : begin + step].data_ptr(),
                rows=found[begin : begin + step].data_ptr(),
                threads=torch.get_num_threads(),
                seen=seen,
                **divided,
                **(query_terms([matrices[part.layer][begin : begin + step] for part in factored]) if factored else {}),
            )
            scanned += read
            # What the answer follows from: what was read of the copy, and these rows.
            if len(seen):
                self._check(seen, edges, checked)
            if misplaced >= 0:
                raise self.segments[misplaced].misplaced()
            rows.check(layers, scored)
            if bad >= 0:
                raise StoreError(
                    f"{rows.shard_of(bad)}: its row {bad} has not the score that the index allows; one of them is damaged, "
                    "or the store is another than was indexed"
                )
        if len(found) and int(found.min()) < 0:
            raise StoreError(f"index: damaged, it finds fewer than {k} rows; build it again")
        # Those of a batch share what they read: a row counts once for each 64 queries.
        _log.debug("read %d of %d rows for %d queries", scanned, self.rows, len(queries))
        return scores, found

    def _quantised(
        self, rows: Rows, begin: int, end: int, codes: np.ndarray, padded: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        count = end - begin
        codes[:] = 128
        scale = np.empty((self.layout.scales, count), np.float32)
        error = np.empty((len(self.parts), count), np.float32)
        norm = np.empty((len(self.parts) + len(self.factored), count), np.float32)
        step = max(1, _READ_BYTES // (4 * max(self.dims.values())))
        for low in range(0, count, step):
            high = min(low + step, count)
            values: Tensor | None = None
            for i, part in enumerate(self.parts):
                if part.factors:
                    span, place = slice(begin + low, begin + high), slice(low, high)
                    made = self._factors(part, rows, span, codes[place], scale[part.scale :, place])
                    error[i, place], norm[i, place], norm[len(self.parts) + self.factored.index(part), place] = made
                    continue
                if values is None or part.begin == 0:
                    values = rows.read(part.layer, begin + low, begin + high)
                piece = values[:, part.begin : part.begin + part.dim]
                _native.quantise(
                    rows=_native.Matrix(piece.data_ptr(), "float32", piece.shape, piece.stride()),
                    codes=codes[low:].ctypes.data + part.offset,
                    stride=self.stride,
                    scale=scale[part.scale, low:].ctypes.data,
                    error=error[i, low:].ctypes.data,
                    norm=norm[i, low:].ctypes.data,
                    threads=torch.get_num_threads(),
                )
        length = np.sqrt(np.square(norm[: len(self.parts)], dtype=np.float64).sum(0))
        order = np.argsort(-length, kind="stable")
        starts = np.arange(0, count, _native.block_rows)
        norm = np.ascontiguousarray(norm[:, order])
        longest = np.nextafter(np.maximum.reduceat(length[order], starts).astype(np.float32), np.float32(np.inf))
        bound = np.concatenate([longest[None], np.maximum.reduceat(norm[: len(self.parts)], starts, axis=1)])
        size = count * self.stride + 64
        padded = np.empty(size, np.uint8) if padded is None else padded[:size]
        np.take(codes, order, axis=0, out=padded[:-64].reshape(codes.shape), mode="clip")
        padded[-64:] = 128
        arrays: list[np.ndarray] = [
            padded,
            np.ascontiguousarray(scale[:, order]),
            np.ascontiguousarray(error[:, order]),
            norm,
        ]
        return dict(zip(NAMES, [*arrays, order.astype(np.int32), bound], strict=True))

    def _factors(
        self, part: Part, rows: Rows, span: slice, codes: np.ndarray, scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes and scales of a layer's factors, in their places; error, norm and length of each row."""
        length = np.empty(span.stop - span.start, np.float32)
        step = max(1, _READ_BYTES // (4 * part.dim))
        for low in range(0, len(length), step):
            values = rows.read(part.layer, span.start + low, min(span.start + low + step, span.stop))
            length[low : low + step] = torch.linalg.vector_norm(values.double(), dim=1).float()
        sides = rows.read_factors(part.layer, span.start, span.stop)
        return (*factor_codes(*sides, codes, part.offset, scale), length)

    def _segments(
        self, layers: Sequence[str], cosine: bool, lengths: np.ndarray | None = None
    ) -> tuple[list[Any], Any]:
        """What the kernels take for the segments; with it what must outlive the call."""
        if lengths is not None:
            inverted = [(None, self._inverted(segment, lengths)) for segment in self.segments]
            return self._made(inverted), inverted
        # Lengths bound no cosine.
        key = () if cosine else tuple(layers)
        with self._lock:
            found = self._natives.pop(key, None)
            if found is None:
                given = [(self._bound(segment, layers) if key else None, None) for segment in self.segments]
                found = self._made(given), given
            self._natives[key] = found
            while len(self._natives) > _KEPT_NATIVES:
                self._natives.pop(next(iter(self._natives)))
        return found

    def _made(self, given: Sequence[tuple[np.ndarray | None, np.ndarray | None]]) -> list[Any]:
        """Segments with the longest rows of their blocks, which bound inner products, and what rows are multiplied by."""
        return [
            _native.Segment(
                **{name: segment.arrays[name].ctypes.data for name in ("codes", "scale", "error", "norm", "order")},
                stride=self.stride,
                first=segment.first,
                rows=segment.rows,
                parts=len(self.parts),
                longest=0 if bound is None else bound.ctypes.data,
                factor=0 if factor is None else factor.ctypes.data,
            )
            for segment, (bound, factor) in zip(self.segments, given, strict=True)
        ]

    @staticmethod
    def _inverted(segment: Segment, lengths: np.ndarray) -> np.ndarray:
        """What the scan multiplies the scores of rows with, in the order of the segment."""
        mine = lengths[segment.first : segment.first + segment.rows][segment.order()]
        with np.errstate(divide="ignore", over="ignore"):
            return np.where(mine > 0, 1 / mine, 0).astype(np.float32)

    def _bound(self, segment: Segment, layers: Sequence[str]) -> np.ndarray:
        """Longest rows of the blocks over the chosen layers."""
        bound, chosen = segment.arrays["bound"], [i for i, part in enumerate(self.parts) if part.layer in layers]
        if len(chosen) == len(self.parts):
            return bound[0]
        squares = np.square(bound[1:][chosen], dtype=np.float64).sum(0)
        return np.nextafter(np.sqrt(squares).astype(np.float32), np.float32(np.inf))

    def _checked(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of the first block of each segment, and of all together; and what was checked of each block, 0 to 2."""
        with self._lock:
            if self._seen is None:
                edges = np.cumsum([0, *(len(segment.seen) for segment in self.segments)])
                whole = np.concatenate([segment.seen for segment in self.segments])
                for segment, begin, end in zip(self.segments, edges[:-1], edges[1:], strict=True):
                    segment.seen = whole[begin:end]
                self._seen = edges, whole
            return self._seen

    def _check(self, seen: np.ndarray, edges: np.ndarray, checked: np.ndarray) -> None:
        """Check what a search read of each block of rows, unless that was done."""
        fresh = np.flatnonzero(seen > checked)
        for number in np.unique(np.searchsorted(edges, fresh, "right") - 1).tolist():
            self.segments[number].check(seen[edges[number] : edges[number + 1]])


def _factor_sizes(part: Part) -> dict[str, int]:
    out, in_ = part.sides
    dim = part.factors * sum(-(-side // 4) * 4 for side in part.sides)
    return {"dim": dim, "factors": part.factors, "out": out, "in_": in_}
