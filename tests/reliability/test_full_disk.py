"""A disk that is full ends a command in one sentence, loses nothing, and the same command goes on when there is space."""

from __future__ import annotations

import contextlib
import io
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.reliability import kills

COMMANDS = ["build", "index over another", "score", "upgrade", "audit"]


def limited(job: Callable[[Path], None], size: int, folder: Path) -> None:
    """No file may grow beyond ``size`` bytes: to a program that is a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    # What is said goes to a file too.
    held = io.StringIO()
    try:
        with contextlib.redirect_stderr(held):
            job(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.stderr.write(held.getvalue())
        sys.stderr.flush()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_space(tmp_path: Path, command: str) -> None:
    target = kills.Target(command, tmp_path)
    before = kills.contents(target.scratch / "before")
    largest = max(len(data) for name, data in target.expected.items() if before.get(name) != data)
    for size in (largest // 2,) if command == "audit" else (100, largest // 2):
        folder = target.scratch / f"limited {size}"
        shutil.copytree(target.scratch / "before", folder)
        run = partial(limited, target.job, size)
        assert kills._run(run, folder, target.log) == 1
        said(target.log)
        assert [name for name in kills.contents(folder) if name.endswith(".part")] == []
        assert {name: data for name, data in kills.contents(folder).items() if name in before} == before
        goes_on(target, folder)


def said(log: Path) -> None:
    text = log.read_text(encoding="utf-8")
    # On the command line the sentence alone is printed; in Python it ends the traceback.
    assert ": the disk is full (" in text, text
    assert (
        text.strip()
        .splitlines()[-1]
        .startswith(("influence_fast.errors.InfluenceError: ", "RuntimeError: exit code 1"))
    )


def goes_on(target: kills.Target, folder: Path) -> None:
    assert kills._run(target.job, folder, target.log) == 0, target.log.read_text(encoding="utf-8")
    assert kills.contents(folder) == target.expected


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 pages, where root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may mount nothing")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_small_disk(tmp_path: Path, disk: Path) -> None:
    target = kills.Target("build", tmp_path)
    ballast = disk / "ballast"
    # Space for the manifest, and less and less for shards.
    for pages in (4, 6, 8):
        folder = disk / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        ballast.write_bytes(b"x" * 4096 * pages)
        if kills._run(target.job, folder, target.log) == 1:
            said(target.log)
            assert [name for name in kills.contents(folder) if name.endswith(".part")] == []
        else:
            assert pages < 8
        ballast.unlink()
        goes_on(target, folder)
