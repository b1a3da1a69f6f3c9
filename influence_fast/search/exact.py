"""Exact search over a store: an 8-bit copy of its rows is scanned, and what its error cannot rule out is scored exactly.

The score of a row is the float64 sum of products of its stored numbers (float32, or what a narrower store widens to) with
the query's, layer by layer, times the layer's weight; best first, ties in row order. A cosine is that sum divided by both
lengths, ``sqrt(sum of weight * |layer|^2)``, and 0 where one is 0. The answer is proven to be the best k of these scores:
the copy's rounding error is known for every row, so a row is left out only where its score cannot reach the k-th best
(``csrc/cpu/exact_search.h``). It does not depend on threads, batches, instruction sets or on how the copy is cut.

The copy is a list of segments of consecutive rows, in memory or each a file that is mapped, with these arrays at multiples
of 64 bytes, one behind the other (P parts of a row: a layer, or 65,536 numbers of one; blocks are 192 rows). A layer of
which the store keeps factors is one part, of F such parts: codes of u_1, v_1, u_2, ..., each from a multiple of 4 bytes
on. S is P, and one more for every factor but the first:

==========  ===========================  ====================================================================
``codes``   uint8 ``(rows, stride)``     part = scale * (code - 128) + rest; 64 bytes more behind the last row
``scale``   float32 ``(S, rows)``        of factors the product of those of u_c and v_c
``error``   float32 ``(P, rows)``        at least the length of the rest; of factors the sum of |rest u_c| |v_c| and
                                         |u_c - rest| |rest v_c| over c
``norm``    float32 ``(P + F, rows)``    at least the length of the part; of factors ``sum |u_c| |v_c|``; lengths last
``order``   int32 ``(rows,)``            row of each position, longest row first; counted from the segment's first row
``bound``   float32 ``(1 + P, blocks)``  longest row of each block; longest part
==========  ===========================  ====================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast._files import atomic_path
from influence_fast.errors import BackendError, InputError, StoreError
from influence_fast.gradients.store_reader import StoreReader
from influence_fast.search.factor_codes import factor_codes, query_terms
from influence_fast.search.index_files import IndexFolder, describe

try:
    import influence_fast_cpu as _native
except ImportError as error:
    _native = None
    _missing = str(error)

_log = logging.getLogger("influence_fast")
_SEGMENT_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_PART = 1 << 16
SEGMENT = "scan-{:05d}.bin"
_NAMES = ("codes", "scale", "error", "norm", "order", "bound")
_KEPT_NATIVES = 4


@dataclass(frozen=True)
class Part:
    """Some numbers of a layer within a row of codes."""

    layer: str
    begin: int
    dim: int
    offset: int
    scale: int
    factors: int = 0
    out: int = 0

    @property
    def sides(self) -> tuple[int, int]:
        """Of a part that is factors, numbers of each side."""
        return self.out, self.dim // self.out


def parts_of(dims: dict[str, int], outs: Mapping[str, int], factors: int) -> tuple[list[Part], int]:
    """How rows of these layers lie side by side, and the bytes of a row; ``outs`` of those that are kept as factors."""
    parts: list[Part] = []
    offset = scale = 0
    for layer, dim in dims.items():
        if layer in outs:
            part = Part(layer, 0, dim, offset, scale, factors, outs[layer])
            parts.append(part)
            offset += factors * sum(-(-side // 4) * 4 for side in part.sides)
            scale += factors
            continue
        for begin in range(0, dim, _PART):
            part = Part(layer, begin, min(_PART, dim - begin), offset, scale)
            parts.append(part)
            offset += -(-part.dim // 4) * 4
            scale += 1
    return parts, -(-offset // 64) * 64


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
        found, first = [], 0
        for store, rows in self.stores:
            low, high = max(begin - first, 0), min(end - first, len(rows))
            if low < high:
                found.append(store.read(layer, slice(rows.start + low, rows.start + high)))
            first += len(rows)
        return found[0] if len(found) == 1 else torch.cat(found)

    def read_factors(self, layer: str, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Of rows ``begin .. end`` what their gradients are the products of."""
        found, first = [], 0
        for store, rows in self.stores:
            low, high = max(begin - first, 0), min(end - first, len(rows))
            if low < high:
                found.append(store.read_factors(layer, slice(rows.start + low, rows.start + high)))
            first += len(rows)
        left, right = zip(*found, strict=True)
        return torch.cat(left), torch.cat(right)

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

    def native(self, layers: Sequence[str]) -> Any:
        """What the kernels read rows through; addresses hold while the stores live, so that it is made once."""
        for store, _ in self.stores:
            store.check_sizes()
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


class Segment:
    """Consecutive rows of the copy."""

    def __init__(
        self,
        first: int,
        rows: int,
        arrays: dict[str, np.ndarray],
        path: Path | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """``about`` is what ``index.json`` says of the file, where that is known."""
        self.first, self.rows, self.arrays, self.path, self.about = first, rows, arrays, path, about


class Scan:
    """The 8-bit copy of some rows, and the search over it."""

    def __init__(self, dims: dict[str, int], outs: Mapping[str, int], factors: int) -> None:
        if _native is None:
            raise BackendError(f"exact search needs the extension influence_fast_cpu, which is not built ({_missing})")
        self.dims = dims
        self.parts, self.stride = parts_of(dims, outs, factors)
        self.factored = [part for part in self.parts if part.factors]
        self.segments: list[Segment] = []
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
        for begin in range(self.rows, rows.count, step):
            end = min(begin + step, rows.count)
            arrays = self._quantised(rows, begin, end, codes[: end - begin], padded)
            path = None if folder is None else folder.new(SEGMENT)
            if path is not None:
                self._write(path, arrays)
                arrays = self._mapped(path, end - begin)
            self.segments.append(Segment(begin, end - begin, arrays, path))
        self._natives = {}

    def save(self, folder: IndexFolder) -> list[dict[str, Any]]:
        """Write the segments that are not there yet; what ``index.json`` says of all."""
        entries = []
        for segment in self.segments:
            path, about = segment.path, segment.about
            if path is None or not folder.has(path):
                path, about = folder.new(SEGMENT), None
                self._write(path, segment.arrays)
            entries.append({"rows": segment.rows, "data": about or describe(path)})
        return entries

    @classmethod
    def open(cls, folder: Path, rows: Rows, entries: Sequence[Mapping[str, Any]]) -> Scan:
        """Map the segments that :meth:`save` wrote of these rows; StoreError where one is damaged."""
        scan, first = cls(rows.dims, rows.outs, rows.factors), 0
        for entry in entries:
            path = (folder / entry["data"]["file"]).resolve()
            arrays = scan._mapped(path, entry["rows"])
            scan.segments.append(Segment(first, entry["rows"], arrays, path, entry["data"]))
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
        the scores of rows are divided by, 0 for a score of 0. StoreError names a shard whose row
        does not have the score that the copy allows: it has changed since.
        """
        if lengths is not None and (lengths.dtype != np.float64 or lengths.shape != (self.rows,)):
            raise StoreError(f"index: damaged, {lengths.shape} lengths of its {self.rows} rows")
        segments, _kept = self._segments(layers, cosine, lengths)
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
        stored, weight = rows.native(layers), np.array(weights, np.float64)
        mask = None if allowed is None else allowed.contiguous().view(torch.uint8)
        scores, found = (
            torch.empty(len(queries), k, dtype=torch.float64, device="cpu"),
            torch.empty(len(queries), k, dtype=torch.int64, device="cpu"),
        )
        # Each thread may keep a few times k candidates of every query.
        step = max(1, min(1024, (1 << 22) // k))
        scanned = 0
        for begin in range(0, len(queries), step):
            asked = queries[begin : begin + step].contiguous()
            read, bad, scored = _native.exact_search(
                segments=segments,
                parts=parts,
                stored=stored,
                queries=_queries(asked),
                weights=weight,
                cosine=cosine,
                allowed=0 if mask is None else mask.data_ptr(),
                k=k,
                scores=scores[begin : begin + step].data_ptr(),
                rows=found[begin : begin + step].data_ptr(),
                threads=torch.get_num_threads(),
                **divided,
                **(query_terms([matrices[part.layer][begin : begin + step] for part in factored]) if factored else {}),
            )
            scanned += read
            # What the answer follows from: the copy, which was checked when it was mapped, and these rows.
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
        scale = np.empty((self._scales, count), np.float32)
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
        return dict(zip(_NAMES, [*arrays, order.astype(np.int32), bound], strict=True))

    @property
    def _scales(self) -> int:
        return sum(part.factors or 1 for part in self.parts)

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
        mine = lengths[segment.first : segment.first + segment.rows][segment.arrays["order"]]
        with np.errstate(divide="ignore", over="ignore"):
            return np.where(mine > 0, 1 / mine, 0).astype(np.float32)

    def _bound(self, segment: Segment, layers: Sequence[str]) -> np.ndarray:
        """Longest rows of the blocks over the chosen layers."""
        bound, chosen = segment.arrays["bound"], [i for i, part in enumerate(self.parts) if part.layer in layers]
        if len(chosen) == len(self.parts):
            return bound[0]
        squares = np.square(bound[1:][chosen], dtype=np.float64).sum(0)
        return np.nextafter(np.sqrt(squares).astype(np.float32), np.float32(np.inf))

    def _layout(self, rows: int) -> dict[str, tuple[int, np.dtype, tuple[int, ...]]]:
        count, blocks = len(self.parts), -(-rows // _native.block_rows)
        shapes: list[tuple[Any, tuple[int, ...]]] = [
            (np.uint8, (rows * self.stride + 64,)),
            (np.float32, (self._scales, rows)),
            (np.float32, (count, rows)),
            (np.float32, (count + len(self.factored), rows)),
            (np.int32, (rows,)),
            (np.float32, (1 + count, blocks)),
        ]
        out, at = {}, 0
        for name, (dtype, shape) in zip(_NAMES, shapes, strict=True):
            out[name] = (at, np.dtype(dtype), shape)
            at += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64
        out["end"] = (at, np.dtype(np.uint8), ())
        return out

    def _write(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        layout = self._layout(len(arrays["order"]))
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            for name in _NAMES:
                file.seek(layout[name][0])
                file.write(arrays[name].data.cast("B") if arrays[name].size else b"")
            file.truncate(layout["end"][0])

    def _mapped(self, path: Path, rows: int) -> dict[str, np.ndarray]:
        layout = self._layout(rows)
        try:
            raw = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: damaged index ({error})") from None
        if len(raw) != layout["end"][0]:
            raise StoreError(f"{path}: damaged index, {len(raw)} bytes where {layout['end'][0]} are expected")
        out = {}
        for name in _NAMES:
            at, dtype, shape = layout[name]
            size = int(np.prod(shape)) * dtype.itemsize
            out[name] = raw[at : at + size].view(dtype).reshape(shape)
        # Used as row numbers by the kernels.
        if int(out["order"].min()) < 0 or int(out["order"].max()) >= rows:
            raise StoreError(f"{path}: damaged index, it places rows outside its {rows}")
        return out


def _factor_sizes(part: Part) -> dict[str, int]:
    out, in_ = part.sides
    dim = part.factors * sum(-(-side // 4) * 4 for side in part.sides)
    return {"dim": dim, "factors": part.factors, "out": out, "in_": in_}


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
        queries=_queries(queries),
        weights=weight,
        cosine=cosine,
        rows=numbers.data_ptr(),
        width=numbers.shape[1],
        scores=scores.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return scores


def _queries(values: Tensor) -> Any:
    return _native.Matrix(values.data_ptr(), "float32", values.shape, values.stride())
