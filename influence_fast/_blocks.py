"""Files that are checked while they are read: a checksum a block, kept behind the data, or one hash of the whole.

A *block file* is D bytes of data and a table of the XXH3 (64 bits, seed 0) of every 16,384 bytes of them, unsigned
little-endian; the XXH3 of the table is kept elsewhere, by whoever names the file. The table takes the last ``8 n`` bytes,
``n = ceil(size / (16,384 + 8))``. Each block is checked when it is first read in a process, from the bytes that are handed
on, so that checking costs no second read; what is read through a memory map is checked by :meth:`PlainFile.ensure`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from influence_fast.errors import StoreError

BLOCK = 1 << 14
_WHOLE_READ = 1 << 20


class BlockSums:
    """The table of a block file that is being written."""

    def __init__(self) -> None:
        self._rest = b""
        self._sums: list[int] = []

    def add(self, data: memoryview) -> None:
        """Take in the next bytes of the file."""
        begin = 0
        if self._rest:
            begin = min(BLOCK - len(self._rest), len(data))
            self._rest += bytes(data[:begin])
            if len(self._rest) < BLOCK:
                return
            self._sums.append(xxh3_64_intdigest(self._rest))
        end = begin + (len(data) - begin) // BLOCK * BLOCK
        self._sums += [xxh3_64_intdigest(data[at : at + BLOCK]) for at in range(begin, end, BLOCK)]
        self._rest = bytes(data[end:])

    def table(self) -> bytes:
        """The checksums, once all bytes are in."""
        last = [xxh3_64_intdigest(self._rest)] if self._rest else []
        return np.array([*self._sums, *last], "<u8").tobytes()


def root_of(table: bytes | bytearray | memoryview) -> str:
    """Checksum of a table: 16 hexadecimal digits."""
    return xxh3_64_hexdigest(table)


def block_count(size: int) -> int:
    """Blocks of a block file of so many bytes, table included."""
    return -(-size // (BLOCK + 8))


class PlainFile:
    """A file of known size, read without a check of its content.

    Attributes:
        path: where it is.
        size: bytes that it must have.
        where: says what some of its bytes hold, for errors.
        gone: says more of a file that is missing.
    """

    gone: Callable[[], str]

    def __init__(self, path: Path, size: int, where: Callable[[int, int], str] | None = None) -> None:
        self.path, self.size = path, size
        self.where = where or (lambda begin, end: f"bytes {begin} to {end - 1}")
        self.gone = str

    def check_size(self) -> None:
        """StoreError unless the file is there, plain, and as long as it was written."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            raise StoreError(f"{self.path}: missing ({self.where(0, self.size)}){self.gone()}") from None
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read ({error})") from None
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{self.path}: expected a file, found something else")
        if found.st_size != self.size:
            raise StoreError(
                f"{self.path}: damaged, {found.st_size} bytes long where {self.size} were written "
                f"({self.where(min(found.st_size, self.size), self.size)})"
            )

    def read(self, at: int, size: int) -> bytes:
        """Some bytes, checked."""
        out = bytearray(self._bounded(at, size))
        self.read_into(memoryview(out), at)
        return bytes(out)

    def read_into(self, view: memoryview, at: int) -> None:
        """Fill ``view`` from ``at`` on, checked."""
        self._bounded(at, len(view))
        self._fill(view, at)

    def ensure(self, begin: int, end: int) -> None:
        """Check bytes that are about to be read, or were read, through :attr:`mapped`."""

    def ensure_each(self, begins: np.ndarray, size: int) -> None:
        """:meth:`ensure` of ``size`` bytes from each of many places, int64, on."""

    def check_all(self) -> None:
        """Check every byte."""
        self.check_size()
        for at in range(0, self.size, _WHOLE_READ):
            self.ensure(at, min(at + _WHOLE_READ, self.size))

    @cached_property
    def mapped(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        """The file in memory, as long as it was written; unchecked until :meth:`ensure`."""
        self.check_size()
        try:
            found = np.memmap(self.path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path}: cannot be read ({error})") from None
        if len(found) != self.size:
            raise StoreError(f"{self.path}: changed while it was opened")
        return found

    def damaged(self, what: str, begin: int, end: int) -> StoreError:
        """The error that says what is damaged and what it held."""
        return StoreError(f"{self.path}: damaged, {what} ({self.where(begin, end)})")

    def _bounded(self, at: int, size: int) -> int:
        if not 0 <= at <= at + size <= self.size:
            raise StoreError(f"{self.path}: damaged, {size} bytes at {at} are outside its {self.size} bytes")
        return size

    def _fill(self, view: memoryview, at: int) -> None:
        """A file that has become shorter is an error here, and would be a crash through a map."""
        try:
            # Opened for each read: a store of many shards would hold a file of each.
            with open(self.path, "rb", buffering=0) as file:
                while len(view):
                    count = os.preadv(file.fileno(), [view], at)
                    if count == 0:
                        raise StoreError(f"{self.path}: damaged, it ends at {at} where there should be more")
                    view, at = view[count:], at + count
        except FileNotFoundError:
            raise StoreError(f"{self.path}: missing ({self.where(0, self.size)}){self.gone()}") from None
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read ({error})") from None


class HashedFile(PlainFile):
    """A file with a SHA-256 of the whole alone, as version 1 has them: hashed when it is first read."""

    def __init__(self, path: Path, size: int, sha256: str, where: Callable[[int, int], str] | None = None) -> None:
        super().__init__(path, size, where)
        self.sha256 = sha256
        self._good = False

    def read_into(self, view: memoryview, at: int) -> None:
        self.ensure(at, at + len(view))
        super().read_into(view, at)

    def ensure(self, begin: int, end: int) -> None:
        if self._good:
            return
        self.check_size()
        found = sha256_of(self)
        if found != self.sha256:
            raise self.damaged(f"its SHA-256 is {found}, {self.sha256} was written", 0, self.size)
        self._good = True

    def ensure_each(self, begins: np.ndarray, size: int) -> None:
        self.ensure(0, self.size)


class BlockFile(PlainFile):
    """A block file, whose table has the checksum ``root``."""

    def __init__(self, path: Path, size: int, root: str, where: Callable[[int, int], str] | None = None) -> None:
        super().__init__(path, size, where)
        self.root = root
        self.blocks = block_count(size)
        self.covered = size - 8 * self.blocks
        self._good = np.zeros(self.blocks, bool)
        if self.covered < 0 or -(-self.covered // BLOCK) != self.blocks:
            raise StoreError(f"{path}: damaged, a size of {size} bytes cannot hold its checksums")

    def read_into(self, view: memoryview, at: int) -> None:
        super().read_into(view, at)
        self._check(at, at + len(view), view)

    def ensure(self, begin: int, end: int) -> None:
        self._check(begin, end, None)

    def ensure_each(self, begins: np.ndarray, size: int) -> None:
        first, last = begins // BLOCK, np.minimum(begins + max(size - 1, 0), self.covered - 1) // BLOCK
        asked = np.zeros(self.blocks, bool)
        for step in range(int((last - first).max(initial=0)) + 1):
            asked[np.minimum(first + step, last)] = True
        self._compare(np.flatnonzero(asked & ~self._good), 0, self.size, None)

    @property
    def _table(self) -> np.ndarray:
        # From the map where there is one: of many large files they would be megabytes of memory.
        return self._mapped_table if "mapped" in self.__dict__ else self._read_table

    @cached_property
    def _mapped_table(self) -> np.ndarray:
        self.__dict__.pop("_read_table", None)
        return self._checked(self.mapped[self.covered :]).view("<u8")

    @cached_property
    def _read_table(self) -> np.ndarray:
        self.check_size()
        raw = np.empty(8 * self.blocks, np.uint8)
        self._fill(raw.data, self.covered)
        return self._checked(raw).view("<u8")

    def _checked(self, raw: np.ndarray) -> np.ndarray:
        if root_of(raw.data) != self.root:
            raise self.damaged("its checksums are not those that were written", 0, self.size)
        return raw

    def _check(self, begin: int, end: int, view: memoryview | None) -> None:
        """Check the blocks that ``begin .. end`` touches and that were not yet; ``view`` holds these bytes already."""
        end = min(end, self.covered)
        if begin >= end:
            self._table  # noqa: B018 (which checks itself)
            return
        first, last = begin // BLOCK, -(-end // BLOCK)
        self._compare(first + np.flatnonzero(~self._good[first:last]), begin, end, view)

    def _compare(self, numbers: np.ndarray, begin: int, end: int, view: memoryview | None) -> None:
        """Check blocks, from ``view`` of the bytes ``begin .. end`` or else from the map."""
        if not len(numbers):
            return
        table = self._table
        source = memoryview(self.mapped) if view is None else view  # type: ignore[arg-type]
        offset = 0 if view is None else begin
        found = []
        for n in numbers.tolist():
            start, stop = n * BLOCK, min((n + 1) * BLOCK, self.covered)
            if view is not None and (start < begin or stop > end):
                found.append(self._edge(start, stop, begin, end, view))
            else:
                found.append(xxh3_64_intdigest(source[start - offset : stop - offset]))
        wrong = np.flatnonzero(np.array(found, np.uint64) != table[numbers])
        if len(wrong):
            number = int(numbers[wrong[0]])
            stop = min((number + 1) * BLOCK, self.covered)
            raise self.damaged(f"the checksum of bytes {number * BLOCK} to {stop - 1} is wrong", number * BLOCK, stop)
        self._good[numbers] = True

    def _edge(self, start: int, stop: int, begin: int, end: int, view: memoryview) -> int:
        """A block at the end of what is read is read as a whole; what the caller gets is what was checked."""
        data = bytearray(stop - start)
        self._fill(memoryview(data), start)
        low, high = max(start, begin), min(stop, end)
        view[low - begin : high - begin] = data[low - start : high - start]
        return xxh3_64_intdigest(data)


def sha256_of(file: PlainFile) -> str:
    """SHA-256 of a file as long as it should be, in hexadecimal, block by block and unchecked otherwise."""
    digest = hashlib.sha256()
    buffer = bytearray(min(_WHOLE_READ, max(file.size, 1)))
    for at in range(0, file.size, _WHOLE_READ):
        view = memoryview(buffer)[: min(_WHOLE_READ, file.size - at)]
        file._fill(view, at)
        digest.update(view)
    return digest.hexdigest()
