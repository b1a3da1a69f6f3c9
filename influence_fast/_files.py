"""Files that appear whole or not at all, their hashes, and locks: the one home of durable writing.

A file is written under a temporary name in its own folder, fsynced, renamed, and the folder is fsynced. So whatever stops
the process, a reader sees the old file or the new one, and the newer of two files is never there without the older.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from influence_fast.errors import InfluenceError, StoreError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name to write under; when the block ends well, what is there takes the name ``path``.

    For writers that want a path of their own (FAISS, Parquet, safetensors); :func:`atomic_write` takes the content.
    Nothing is left under the temporary name after an exception.

    Raises:
        InfluenceError: the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f"{target.name}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(target.parent).free
        raise InfluenceError(
            f"{target}: the disk is full ({free:,} bytes are free). What was written before stays valid: free some "
            "space and run again to go on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file whole or not at all; text is UTF-8 with line ends as given.

    Raises:
        InfluenceError: the disk is full.
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
        StoreError: another process holds it, and ``wait`` is false.
    """
    try:
        with FileLock(path, timeout=-1 if wait else 0):
            yield
    except Timeout:
        raise StoreError(f"{path.parent}: another process is writing there") from None


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
