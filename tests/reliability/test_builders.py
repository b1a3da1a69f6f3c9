"""Two and three processes that build one store at once: one writes at a time, and the bytes are those of one alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.reliability import kills


@pytest.mark.parametrize(("command", "count"), [("build", 2), ("build", 3), ("index over another", 3)])
def test_at_once(tmp_path: Path, command: str, count: int) -> None:
    target = kills.Target(command, tmp_path)
    folder, logs = tmp_path / "folder", [tmp_path / f"log {i}" for i in range(count)]
    shutil.copytree(target.scratch / "before", folder)
    processes = [kills._server.Process(target=kills._work, args=(target.job, folder, log, None, False)) for log in logs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    assert 0 in codes
    for code, log in zip(codes, logs, strict=True):
        text = log.read_text(encoding="utf-8")
        assert code == 0 or (code == 1 and "another process is writing there" in text), text
    # Whoever was turned away finds it done.
    assert kills._run(target.job, folder, target.log) == 0
    assert kills.contents(folder) == target.expected
