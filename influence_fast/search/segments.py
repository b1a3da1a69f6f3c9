"""The files of an exact index, segments of consecutive rows, and what of them is checked when.

A segment is in memory, or a file that is mapped. It has these arrays at multiples of 64 bytes, one behind the other (P parts
of a row: a layer, or 65,536 numbers of one; blocks are 192 rows). A layer of which the store keeps factors is one part, of F
such parts: codes of u_1, v_1, u_2, ..., each from a multiple of 4 bytes on. S is P, and one more for every factor but the
first:

==========  ===========================  ====================================================================
``codes``   uint8 ``(rows, stride)``     part = scale * (code - 128) + rest; 64 bytes more behind the last row
``scale``   float32 ``(S, rows)``        of factors the product of those of u_c and v_c
``error``   float32 ``(P, rows)``        at least the length of the rest; of factors the sum of |rest u_c| |v_c| and
                                         |u_c - rest| |rest v_c| over c
``norm``    float32 ``(P + F, rows)``    at least the length of the part; of factors ``sum |u_c| |v_c|``; lengths last
``order``   int32 ``(rows,)``            row of each position, longest row first; counted from the segment's first row
``bound``   float32 ``(1 + P, blocks)``  longest row of each block; longest part
==========  ===========================  ====================================================================

The file ends with the checksums of its blocks of bytes (``influence_fast._blocks``). ``bound`` is checked when a file is
opened, since it says what a search may leave out, and the rest when a search has read it, before its answer is believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast._blocks import BLOCK, BlockFile, BlockSums, PlainFile, root_of
from influence_fast._files import atomic_path
from influence_fast.errors import StoreError
from influence_fast.search.index_files import IndexFolder, describe

try:
    import influence_fast_cpu as _native
except ImportError:
    _native = None

_PART = 1 << 16
_FILE = "scan-{:05d}.bin"
NAMES = ("codes", "scale", "error", "norm", "order", "bound")
ORDER_SEEN, ALL_SEEN = 1, 2
"""What a search has read of a block of rows."""


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


@dataclass
class Segment:
    """Consecutive rows of the copy.

    Attributes:
        first: number of the first of its rows.
        arrays: by :data:`NAMES`.
        file: where they are mapped from; None in memory.
        about: what ``index.json`` says of the file, where that is known.
        seen: what was checked of each block of rows: uint8 ``(blocks,)``.
    """

    first: int
    rows: int
    arrays: dict[str, np.ndarray]
    file: PlainFile | None = None
    about: Mapping[str, Any] | None = None
    seen: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        checked = self.file is None or not isinstance(self.file, BlockFile)
        self.seen = np.full(block_rows(self.rows), ALL_SEEN if checked else 0, np.uint8)

    @property
    def path(self) -> Path | None:
        return None if self.file is None else self.file.path

    def check(self, seen: np.ndarray) -> None:
        """Check what was read of each block of rows, uint8 ``(blocks,)``, unless that was done.

        Raises:
            StoreError: names the file that is damaged.
        """
        for what in (ORDER_SEEN, ALL_SEEN):
            fresh = np.flatnonzero((seen == what) & (self.seen < what))
            if len(fresh):
                self._ensure(fresh, ("order",) if what == ORDER_SEEN else NAMES[:-1])
                self.seen[fresh] = what

    def check_all(self) -> None:
        """Check every byte that is there."""
        if self.file is not None:
            self.file.check_all()
            self.seen[:] = ALL_SEEN

    def order(self) -> np.ndarray:
        """Row of each position, checked as a whole; StoreError where one is outside the segment."""
        self.check(np.full_like(self.seen, ORDER_SEEN))
        found = self.arrays["order"]
        if int(found.min()) < 0 or int(found.max()) >= self.rows:
            raise self.misplaced()
        return found

    def misplaced(self) -> StoreError:
        return StoreError(f"{self.path}: damaged index, it places rows outside its {self.rows}")

    def _ensure(self, blocks: np.ndarray, names: Sequence[str]) -> None:
        assert self.file is not None
        whole = self.file.mapped.ctypes.data
        for name in names:
            array = self.arrays[name]
            lines = 1 if name in ("codes", "order") else len(array)
            # Bytes of a row in each line of the array; behind all codes there are 64 more.
            width = (array.nbytes - 64 * (name == "codes")) // lines // self.rows
            begins = array.ctypes.data - whole + np.arange(lines)[:, None] * (width * self.rows)
            size = _native.block_rows * width
            self.file.ensure_each((begins + blocks * size).ravel(), size)


def block_rows(rows: int) -> int:
    """Blocks that so many rows are cut into."""
    return -(-rows // _native.block_rows)


class Layout:
    """How rows of some layers lie in a segment.

    Attributes:
        parts: of a row, in their order; ``factored`` are those that are factors.
        stride: bytes of a row of codes.
        scales: S of the table above.
    """

    def __init__(self, dims: dict[str, int], outs: Mapping[str, int], factors: int) -> None:
        self.parts, self.stride = parts_of(dims, outs, factors)
        self.factored = [part for part in self.parts if part.factors]
        self.scales = sum(part.factors or 1 for part in self.parts)

    def places(self, rows: int) -> tuple[dict[str, tuple[int, np.dtype, tuple[int, ...]]], int]:
        """Where each array of a segment begins, of what type and shape it is; and the bytes of all."""
        count = len(self.parts)
        shapes: list[tuple[Any, tuple[int, ...]]] = [
            (np.uint8, (rows * self.stride + 64,)),
            (np.float32, (self.scales, rows)),
            (np.float32, (count, rows)),
            (np.float32, (count + len(self.factored), rows)),
            (np.int32, (rows,)),
            (np.float32, (1 + count, block_rows(rows))),
        ]
        out, at = {}, 0
        for name, (dtype, shape) in zip(NAMES, shapes, strict=True):
            out[name] = (at, np.dtype(dtype), shape)
            at += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64
        return out, at

    def write(self, folder: IndexFolder, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """A new file of these arrays: what ``index.json`` says of it."""
        path, sums = folder.new(_FILE), BlockSums()
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            for name in NAMES:
                data = arrays[name].data.cast("B")
                for piece in (data, memoryview(bytes(-len(data) % 64))):
                    sums.add(piece)
                    file.write(piece)
            table = sums.table()
            file.write(table)
        return {**describe(path), "blocks": root_of(table)}

    def mapped(self, path: Path, first: int, rows: int, about: Mapping[str, Any], verify: bool) -> Segment:
        """Map a file that :meth:`write` made, and an index of version 3 without checksums of blocks.

        Raises:
            StoreError: it is missing, of another size, or damaged where it says what a search may leave out.
        """
        places, size = self.places(rows)
        summed = "blocks" in about
        size += 8 * -(-size // BLOCK) if summed else 0
        file = BlockFile(path, size, about["blocks"]) if summed and verify else PlainFile(path, size)
        file.where = lambda begin, end: "of an index; build it again"
        raw = file.mapped
        arrays = {}
        for name, (at, dtype, shape) in places.items():
            bytes_ = int(np.prod(shape)) * dtype.itemsize
            arrays[name] = raw[at : at + bytes_].view(dtype).reshape(shape)
        at = places["bound"][0]
        file.ensure(at, at + arrays["bound"].nbytes)
        return Segment(first, rows, arrays, file, about)
