"""Files that appear whole or not at all, their hashes, and locks: the one home of durable writing.

A file is written under a temporary name in its own folder, fsynced, renamed, and the folder is fsynced. So whatever stops
the process, a reader sees the old file or the new one, and the newer of two files is never there without the older.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from influence_fast.errors import InfluenceError, StoreError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TAIL = 1 << 12


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name to write under; when the block ends well, what is there takes the name ``path``.

    For writers that want a path of their own (FAISS, Parquet, safetensors); :func:`atomic_write` takes the content.
    Nothing is left under the temporary name after an exception.

    Raises:
        InfluenceError: the disk is full, or nothing can be written there; says why.
    """
    target = Path(path)
    temporary = target.with_name(f"{target.name}.part")
    with disk_errors(target):
        try:
            # What is there is nobody's, and may be a link that leads elsewhere.
            temporary.unlink(missing_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
            _sync_folder(target.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """What the system says when ``target`` cannot be written, as one sentence.

    Raises:
        InfluenceError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            reason = error.strerror or str(error)
            raise InfluenceError(f"{target}: cannot be written ({reason[:1].lower()}{reason[1:]})") from error
        there = next((folder for folder in target.absolute().parents if folder.exists()), Path("/"))
        raise InfluenceError(
            f"{target}: the disk is full ({shutil.disk_usage(there).free:,} bytes are free). What was written before "
            "stays valid: free some space and run again to go on"
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there.

    Raises:
        InfluenceError: no permission, a file in the way, a name that is too long; says which.
    """
    with disk_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise InfluenceError(f"{path}: cannot be written (it is a file, expected a folder)") from None


def append_line(path: Path, make: Callable[[bytes], bytes]) -> None:
    """Add one line to a file that only grows, whole or not at all; ``make`` is given the last whole line that is there.

    What stands behind it, a line that was cut short, is removed. Only the end of the file is read.

    Raises:
        InfluenceError: the disk is full, or nothing can be written there; the file is as it was.
    """
    with disk_errors(path), open(path, "r+b", buffering=0) as file:
        size = begin = file.seek(0, os.SEEK_END)
        end = b""
        while begin and end.count(b"\n") < 2:
            stop, begin = begin, max(0, begin - _TAIL)
            end = os.pread(file.fileno(), stop - begin, begin) + end
        whole = end[: end.rfind(b"\n") + 1]
        size -= len(end) - len(whole)
        line = make(whole[whole.rfind(b"\n", 0, -1) + 1 :] if whole else b"")
        try:
            os.ftruncate(file.fileno(), size)
            file.seek(size)
            left = memoryview(line)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            os.ftruncate(file.fileno(), size)
            raise


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file whole or not at all; text is UTF-8 with line ends as given.

    Raises:
        InfluenceError: the disk is full, or nothing can be written there; says why.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while writing left in ``folder``, which the caller has locked."""
    for left in folder.glob("*.part"):
        left.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``, which stays where it is afterwards: removing it would let two in at once.

    Raises:
        StoreError: another process holds it, and ``wait`` is false; or it is a link.
    """
    if path.is_symlink():
        # Locking would empty what it leads to.
        raise StoreError(f"{path}: is a link, expected a file; remove it")
    lock = FileLock(path, timeout=-1 if wait else 0)
    with disk_errors(path):
        try:
            lock.acquire()
        except Timeout:
            raise StoreError(f"{path.parent}: another process is writing there") from None
    try:
        yield
    finally:
        lock.release()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
