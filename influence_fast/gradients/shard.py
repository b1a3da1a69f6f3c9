"""A shard of a store: one safetensors file, whose header is held against what the store says of it, entry by entry."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from influence_fast.errors import StoreError
from influence_fast.gradients import block_scales
from influence_fast.gradients.row_factors import products

# What a store's numbers may be, and what tensors hold them.
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int8_block": torch.int8,
    "int4": torch.uint8,
}
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint64: "U64",
}
_TORCH = {name: dtype for dtype, name in _NAMES.items()}
SUMS = "@blocks"
# Headers are read as a whole: what one of so many tensors can take, names aside, and for columns.
_HEADER_MOST = 1 << 16
_ENTRY_MOST = 256


class Bytes(Protocol):
    """What a shard is read through: a file of known size, checked as far as its reader knows how."""

    path: Path
    size: int
    where: Callable[[int, int], str]

    def check_size(self) -> None: ...
    def read(self, at: int, size: int) -> bytes: ...
    def read_into(self, view: memoryview, at: int) -> None: ...
    def ensure_each(self, begins: np.ndarray, size: int) -> None: ...
    def check_all(self) -> None: ...
    @property
    def mapped(self) -> np.memmap[Any, np.dtype[np.uint8]]: ...


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the file."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def end(self) -> int:
        return self.start + self.dtype.itemsize * math.prod(self.shape)


class Shard:
    """Rows ``first .. first + rows`` of a store. Runs of rows are read; addresses are of the mapped file."""

    def __init__(
        self,
        file: Bytes,
        first: int,
        rows: int,
        dims: Mapping[str, int],
        dtype: str,
        named: Mapping[str, str] | None = None,
        factors: int = 0,
        outs: Mapping[str, int] | None = None,
    ) -> None:
        """``named`` is what the header's metadata must say, if it says anything; ``outs`` of layers kept as factors."""
        self.file, self.first, self.rows = file, first, rows
        self.path = file.path
        self.dims, self.dtype, self._named = dims, DTYPES[dtype], named
        self.bits = block_scales.BITS.get(dtype, 0)
        self.factors, self.outs = factors, dict(outs or {})
        self._locating = False
        file.where = self.where

    @property
    def span(self) -> str:
        """The rows, for people."""
        return f"rows {self.first} to {self.first + self.rows - 1}"

    def where(self, begin: int, end: int) -> str:
        """What some bytes of the file hold: layers and rows of the store, as far as its header can be read."""
        if self._locating:
            # The header itself cannot be read.
            return f"all layers, {self.span}"
        self._locating = True
        try:
            places = self.places
        except StoreError:
            return f"all layers, {self.span}"
        finally:
            self._locating = False
        found = []
        for name, place in places.items():
            low, high = max(begin, place.start), min(end, place.end)
            if low < high and name != SUMS and place.width:
                rows = ((low - place.start) // place.width, (high - place.start - 1) // place.width)
                found.append(f"{_described(name)} rows {self.first + rows[0]} to {self.first + rows[1]}")
        if not found:
            return f"all layers, {self.span}"
        return "; ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")

    def check_all(self) -> None:
        """Check every byte, the header, and that no number is NaN or infinite."""
        self.file.check_all()
        for layer in self.dims:
            if not self.tensor(f"@sqnorm/{layer}").isfinite().all():
                raise StoreError(f"{self.path}: gradients of {layer!r} are not finite ({self.span})")

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each tensor is.

        Raises:
            StoreError: a header that cannot be read, says something else than the store, or places a tensor outside
                the file or over another one.
        """
        size = int.from_bytes(self.file.read(0, min(8, self.file.size)), "little")
        names = sum(len(json.dumps(name)) for name in self.dims)
        most = _HEADER_MOST + 3 * (names + _ENTRY_MOST * len(self.dims))
        if not 2 <= size <= min(self.file.size - 8, most):
            raise self._bad(f"its length is {size} bytes")
        try:
            header = json.loads(self.file.read(8, size).decode(), object_pairs_hook=_each_name_once)
        except RecursionError:
            raise self._bad("nested too deeply") from None
        except ValueError as error:
            raise self._bad(str(error)) from None
        if not isinstance(header, dict):
            raise self._bad("expected an object")
        said = header.pop("__metadata__", {})
        if self._named is not None and said != dict(self._named):
            raise self._bad(f"expected that of {self._short(self._named)}, found that of {self._short(said)}")
        places = {name: self._place(name, entry, 8 + size) for name, entry in header.items()}
        at = 8 + size
        for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
            if place.start != at:
                raise self._bad(f"{name!r} begins at byte {place.start}, expected {at}")
            at = place.end
        if at != self.file.size:
            raise self._bad(f"its tensors end at byte {at} of {self.file.size}")
        self._check_names(places)
        return places

    def _place(self, name: str, entry: Any, start: int) -> Place:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"{name!r}: expected dtype, shape and data_offsets, got {self._short(entry)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _TORCH:
            raise self._bad(f"{name!r}: dtype: expected one of {', '.join(_TORCH)}, got {self._short(dtype)}")
        for key, values, count in (("shape", shape, (1, 2)), ("data_offsets", offsets, (2,))):
            fine = isinstance(values, list) and len(values) in count
            if not fine or not all(type(value) is int and 0 <= value <= self.file.size for value in values):
                raise self._bad(f"{name!r}: {key}: expected numbers within the file, got {self._short(values)}")
        place = Place(start + offsets[0], tuple(shape), _TORCH[dtype])
        # The checksums alone are read as bytes, wherever they begin.
        aligned = name == SUMS or place.start % place.dtype.itemsize == 0
        if place.end != start + offsets[1] or not aligned:
            raise self._bad(f"{name!r}: {dtype} {shape} does not fit bytes {offsets[0]} to {offsets[1]}")
        return place

    def _check_names(self, places: Mapping[str, Place]) -> None:
        """Every layer with what belongs to it, and nothing else than columns."""
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for layer in self.dims:
            width = self.numbers(layer)
            held = block_scales.elements(width, self.bits) if self.bits else width
            expected[layer] = ((self.rows, held), self.dtype)
            expected[f"@sqnorm/{layer}"] = ((self.rows,), torch.float64)
            if self.bits:
                expected[f"@scale/{layer}"] = ((self.rows, block_scales.blocks(width)), torch.bfloat16)
            # Half precision is scaled too, but was not in version 0.1.
            elif self.dtype == torch.int8 or (self.dtype == torch.float16 and f"@scale/{layer}" in places):
                expected[f"@scale/{layer}"] = ((self.rows,), torch.float32)
        for name, (shape, dtype) in expected.items():
            if name not in places:
                raise self._bad(f"it lacks {name!r}")
            if (places[name].shape, places[name].dtype) != (shape, dtype):
                raise self._bad(
                    f"{name!r}: expected {_NAMES[dtype]} {list(shape)}, "
                    f"got {_NAMES[places[name].dtype]} {list(places[name].shape)}"
                )
        for name, place in places.items():
            if name not in expected and name != SUMS:
                if not name.startswith("@column/"):
                    raise self._bad(f"{name!r} is no layer of the store")
                if place.shape != (self.rows,):
                    raise self._bad(f"{name!r}: expected {self.rows} rows, got {list(place.shape)}")

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [name.removeprefix("@column/") for name in self.places if name.startswith("@column/")]

    def address(self, name: str) -> int:
        """Where a tensor begins in memory."""
        return int(self.file.mapped.ctypes.data) + self._found(name).start

    def ensure(self, names: list[str], rows: np.ndarray) -> None:
        """Check the bytes of some rows (counted from the shard's first) that are read through addresses."""
        for name in names:
            place = self._found(name)
            self.file.ensure_each(place.start + rows * place.width, place.width)

    def tensor(self, name: str, rows: slice | np.ndarray = slice(None)) -> Tensor:
        """A copy of some rows of a tensor, in its own dtype."""
        place = self._found(name)
        if not isinstance(rows, slice):
            return self._here_and_there(place, rows)
        begin, end, _ = rows.indices(place.shape[0])
        out = torch.empty(end - begin, *place.shape[1:], dtype=place.dtype, device="cpu")
        self._read(out, place.start + begin * place.width)
        return out

    def _here_and_there(self, place: Place, rows: np.ndarray) -> Tensor:
        out = torch.empty(len(rows), *place.shape[1:], dtype=place.dtype, device="cpu")
        low, high = int(rows.min()), int(rows.max()) + 1
        # One read of all between is cheaper than many of a few bytes.
        if (high - low) * place.width <= max(1 << 16, 8 * len(rows) * place.width):
            whole = torch.empty(high - low, *place.shape[1:], dtype=place.dtype, device="cpu")
            self._read(whole, place.start + low * place.width)
            return torch.index_select(whole, 0, torch.from_numpy(rows - low))
        for i, row in enumerate(rows.tolist()):
            self._read(out[i : i + 1], place.start + row * place.width)
        return out

    def gradients(self, layer: str, rows: slice | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Rows of a layer in float32, into ``out`` if given."""
        place = self._found(layer)
        if layer in self.outs:
            values = products(self.stored(layer, rows), self.outs[layer], self.factors)
            return values if out is None else out.copy_(values)
        if out is not None and isinstance(rows, slice) and place.dtype == torch.float32:
            self._read(out, place.start + rows.start * place.width)
            return out
        values = self.stored(layer, rows)
        return values if out is None else out.copy_(values)

    def numbers(self, layer: str) -> int:
        """Numbers that are kept of a row: those of its gradient, or of its factors."""
        dim, out = self.dims[layer], self.outs.get(layer)
        return dim if out is None else self.factors * (out + dim // out)

    def stored(self, layer: str, rows: slice | np.ndarray = slice(None)) -> Tensor:
        """The numbers that are kept of some rows, float32: gradients, or their factors."""
        values, scale = self.tensor(layer, rows), f"@scale/{layer}"
        if self.bits:
            return block_scales.unpacked(self.tensor(scale, rows), values, self.numbers(layer), self.bits)
        if scale in self.places:
            return values.float() * self.tensor(scale, rows)[:, None]
        return values.float()

    def _found(self, name: str) -> Place:
        if name not in self.places:
            raise StoreError(f"{self.path}: has no {name!r}")
        return self.places[name]

    def _read(self, out: Tensor, at: int) -> None:
        self.file.read_into(out.view(torch.uint8).numpy().reshape(-1).data, at)

    def _bad(self, what: str) -> StoreError:
        return StoreError(f"{self.path}: damaged header ({what}); it holds {self.span}")

    @staticmethod
    def _short(value: Any) -> str:
        shown = repr(dict(value) if isinstance(value, Mapping) else value)
        return shown if len(shown) <= 120 else f"{shown[:117]}..."


def row_bytes(dtype: str, numbers: int) -> int:
    """Bytes of a row of a layer: so many numbers, what they are multiplied with and the squared length."""
    if bits := block_scales.BITS.get(dtype):
        return block_scales.elements(numbers, bits) + 2 * block_scales.blocks(numbers) + 8
    return numbers * DTYPES[dtype].itemsize + (12 if dtype in ("int8", "float16") else 8)


def layout(tensors: Mapping[str, Tensor], named: Mapping[str, str], block: int) -> tuple[bytes, list[str]]:
    """The header of a shard, and the order of its tensors: wide numbers first, so that all are aligned; the table of
    checksums of ``block`` bytes last."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(named)}
    at = 0
    for name in names:
        end = at + tensors[name].nbytes
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [at, end],
        }
        at = end
    blocks, size = 0, b""
    # The header's length depends on the number of blocks, which depends on the header's length.
    for _ in range(8):
        header[SUMS] = {"dtype": "U64", "shape": [blocks], "data_offsets": [at, at + 8 * blocks]}
        size = json.dumps(header, separators=(",", ":")).encode()
        size += b" " * (-len(size) % 8)
        count = -(-(8 + len(size) + at) // block)
        if count == blocks:
            break
        blocks = count
    return len(size).to_bytes(8, "little") + size, names


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _described(name: str) -> str:
    for start, what in (("@sqnorm/", "|g|^2 of layer"), ("@scale/", "scales of layer"), ("@column/", "column")):
        if name.startswith(start):
            return f"{what} {name.removeprefix(start)!r}"
    return f"layer {name!r}"
