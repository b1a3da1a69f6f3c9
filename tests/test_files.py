"""Files appear whole or not at all, and one process at a time writes."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from influence_fast._files import atomic_path, atomic_write, locked, remove_leftovers, sha256
from influence_fast.errors import InfluenceError, StoreError


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic_write(target, "one\r\n")
    assert target.read_bytes() == b"one\r\n"

    def stop_midway() -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        stop_midway()
    assert target.read_bytes() == b"one\r\n"
    assert list(tmp_path.iterdir()) == [target]
    atomic_write(target, b"two")
    assert sha256(target) == hashlib.sha256(b"two").hexdigest()


def test_content_and_name_reach_the_disk_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before its name, the name before anything that comes after: a power cut leaves no empty file."""
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(number: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def renamed(self: Path, target: Path) -> Path:
        order.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    atomic_write(tmp_path / "a", "x")
    assert order == ["a.part", "rename", tmp_path.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(InfluenceError, match=r"a: the disk is full \([\d,]+ bytes are free\)"),
        atomic_path(tmp_path / "a"),
    ):
        raise OSError(number, "full")
    with pytest.raises(InfluenceError, match=r"a: cannot be written \(no\)"), atomic_path(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")


def test_one_holder_at_a_time_and_the_lock_file_stays(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    code = (
        "import sys, pathlib; from influence_fast._files import locked; from influence_fast.errors import StoreError\n"
        "try:\n  with locked(pathlib.Path(sys.argv[1])): print('in')\nexcept StoreError as e: print('out')"
    )

    def other() -> str:
        return subprocess.run([sys.executable, "-c", code, str(lock)], capture_output=True, text=True).stdout.strip()

    with locked(lock):
        assert other() == "out"
        with pytest.raises(StoreError, match="another process"), locked(lock):
            pass
    assert lock.exists()
    assert other() == "in"


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a.part", "a", "part"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "part"]
