"""Files appear whole or not at all, and one process at a time writes."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from influence_fast._files import append_line, atomic_path, atomic_write, locked, make_folder, remove_leftovers, sha256
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


@pytest.mark.parametrize("before", [b"", b"one\n", b"one\ntwo\n", b"x" * 5000 + b"\n" + b"y" * 9000 + b"\n"])
@pytest.mark.parametrize("torn", [b"", b"half", b"z" * 6000])
def test_a_line_is_added_behind_the_last_whole_one(tmp_path: Path, before: bytes, torn: bytes) -> None:
    (tmp_path / "a").write_bytes(before + torn)
    seen: list[bytes] = []
    append_line(tmp_path / "a", lambda last: (seen.append(last), b"new\n")[1])
    assert (tmp_path / "a").read_bytes() == before + b"new\n"
    assert seen == [before.splitlines(keepends=True)[-1] if before else b""]


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"one\n")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InfluenceError, match="the disk is full"):
        append_line(tmp_path / "a", lambda last: b"two\n")
    assert (tmp_path / "a").read_bytes() == b"one\n"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Folders from strangers may hold links under the names that we write."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".lock", "a.part"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(StoreError, match=r"\.lock: is a link"), locked(tmp_path / ".lock"):
        pass
    atomic_write(tmp_path / "a", "theirs")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a").read_text() == "theirs"
    assert not (tmp_path / "a").is_symlink()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(InfluenceError, match=r"cannot be written \("):
            make_folder(path)
