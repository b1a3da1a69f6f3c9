"""Names of a store's rows in a file of their own, which is written once and read where it is asked.

A block file (``influence_fast._blocks``) with, before its table of checksums: names of one width each, ``(rows, width)``
bytes; or of any width, ``rows + 1`` int64 offsets into the text behind them and that text. ``type`` tells what a name is:
``int64`` (little-endian, of width 8), ``utf8``, or ``json`` where they are of both kinds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from influence_fast.errors import StoreError

FILE = "ids.bin"
TYPES = ("int64", "utf8", "json")
_AT_ONCE = 1 << 14


class Bytes(Protocol):
    """What names are read through."""

    path: Path
    size: int

    def read(self, at: int, size: int) -> bytes: ...


class RowIds(Sequence[int | str]):
    """Names of rows, read from the file when they are asked for."""

    def __init__(self, file: Bytes, rows: int, kind: str, width: int | None, size: int) -> None:
        """``size`` is the bytes of the names, without the checksums behind them."""
        self._file, self._rows, self._kind, self._width = file, rows, kind, width
        self._text = size - 8 * (rows + 1)
        least = rows * width if width is not None else 8 * (rows + 1)
        if (width is None and self._text < 0) or (width is not None and least != size):
            raise StoreError(f"{file.path}: damaged, {size} bytes cannot name {rows} rows")

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, row: int) -> int | str: ...
    @overload
    def __getitem__(self, row: slice) -> list[int | str]: ...
    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            begin, end, step = row.indices(self._rows)
            if step == 1:
                return [name for at in range(begin, end, _AT_ONCE) for name in self._read(at, min(at + _AT_ONCE, end))]
            return [self[i] for i in range(begin, end, step)]
        number = range(self._rows)[row]
        return self._read(number, number + 1)[0]

    def __iter__(self) -> Iterator[int | str]:
        for at in range(0, self._rows, _AT_ONCE):
            yield from self._read(at, min(at + _AT_ONCE, self._rows))

    def __repr__(self) -> str:
        return f"RowIds({self._rows} of {self._kind})"

    def _read(self, begin: int, end: int) -> list[int | str]:
        if end <= begin:
            return []
        if self._width is not None:
            raw = self._file.read(begin * self._width, (end - begin) * self._width)
            if self._kind == "int64":
                return np.frombuffer(raw, "<i8").tolist()
            edges = list(range(0, len(raw) + 1, self._width)) if self._width else [0] * (end - begin + 1)
        else:
            offsets = np.frombuffer(self._file.read(8 * begin, 8 * (end - begin + 1)), "<i8")
            low, high = int(offsets[0]), int(offsets[-1])
            if not 0 <= low <= high <= self._text or (np.diff(offsets) < 0).any():
                raise StoreError(f"{self._file.path}: damaged, names of rows {begin} to {end - 1} are outside the file")
            raw = self._file.read(8 * (self._rows + 1) + low, high - low)
            edges = (offsets - low).tolist()
        try:
            names = [raw[a:b].decode(errors="surrogatepass") for a, b in pairwise(edges)]
            return [_plain(json.loads(name)) for name in names] if self._kind == "json" else list(names)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{self._file.path}: damaged names of rows {begin} to {end - 1} ({error})") from None


class JoinedIds(Sequence[int | str]):
    """Names of the rows of several segments, one behind the other, of which the rows ``live`` are there (None: all)."""

    def __init__(self, parts: Sequence[Sequence[int | str]], live: np.ndarray | None) -> None:
        self._parts, self._live = list(parts), live
        self._firsts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._firsts[-1]) if self._live is None else len(self._live)

    @overload
    def __getitem__(self, row: int) -> int | str: ...
    @overload
    def __getitem__(self, row: slice) -> list[int | str]: ...
    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            begin, end, step = row.indices(len(self))
            return self._read(begin, end) if step == 1 else [self[i] for i in range(begin, end, step)]
        number = range(len(self))[row]
        return self._read(number, number + 1)[0]

    def __iter__(self) -> Iterator[int | str]:
        for at in range(0, len(self), _AT_ONCE):
            yield from self._read(at, min(at + _AT_ONCE, len(self)))

    def __repr__(self) -> str:
        return f"JoinedIds({len(self)} of {len(self._parts)} segments)"

    def _read(self, begin: int, end: int) -> list[int | str]:
        if end <= begin:
            return []
        numbers = None if self._live is None else self._live[begin:end]
        low, high = (begin, end) if numbers is None else (int(numbers[0]), int(numbers[-1]) + 1)
        found: list[int | str] = []
        for part, first in zip(self._parts, self._firsts.tolist(), strict=False):
            if first < high and first + len(part) > low:
                found += part[max(low - first, 0) : high - first]
        return found if numbers is None else [found[i] for i in (numbers - low).tolist()]


def encoded(ids: Sequence[int | str]) -> tuple[dict[str, Any] | None, Callable[[], Iterator[bytes]]]:
    """What a manifest says of these names (None: they are the row numbers) and their bytes, in pieces."""
    if isinstance(ids, range) and ids == range(len(ids)):
        return None, lambda: iter(())
    if all(type(name) is int and name == row for row, name in enumerate(ids)):
        return None, lambda: iter(())
    texts = all(isinstance(name, str) for name in ids)
    if all(type(name) is int and -(2**63) <= name < 2**63 for name in ids):
        kind, width = "int64", 8
    else:
        kind = "utf8" if texts else "json"
        widths = {len(_text(name, kind)) for name in ids}
        width = widths.pop() if len(widths) == 1 else -1

    def pieces() -> Iterator[bytes]:
        if kind == "int64":
            for some in _batches(ids):
                yield np.array(some, "<i8").tobytes()
            return
        if width < 0:
            at = 0
            yield np.zeros(1, "<i8").tobytes()
            for some in _batches(ids):
                ends = at + np.cumsum([len(_text(name, kind)) for name in some], dtype=np.int64)
                at = int(ends[-1])
                yield ends.astype("<i8").tobytes()
        for some in _batches(ids):
            yield b"".join(_text(name, kind) for name in some)

    digest, size = hashlib.sha256(), 0
    for piece in pieces():
        digest.update(piece)
        size += len(piece)
    about = {"file": FILE, "type": kind, "width": None if width < 0 else width, "bytes": size}
    return {**about, "sha256": digest.hexdigest()}, pieces


def _text(name: int | str, kind: str) -> bytes:
    """The bytes of a name; text that no encoding knows, half of a pair, stays as it is."""
    if kind == "json":
        return json.dumps(name if isinstance(name, str) else int(name)).encode()
    return str(name).encode(errors="surrogatepass")


def _plain(name: Any) -> int | str:
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise ValueError(f"expected a number or text, got {name!r}")
    return name


def _batches(ids: Sequence[int | str]) -> Iterator[list[int | str]]:
    names = iter(ids)
    while some := list(islice(names, _AT_ONCE)):
        yield some
