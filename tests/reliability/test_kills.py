"""A few kills of each command, other ones in every run; ``python -m tests.reliability.kills`` makes all of them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.reliability import kills


@pytest.mark.parametrize(
    "command",
    ["build", "build over damage", "index over another", "score", "upgrade", "append", "compact", "index update"],
)
def test_a_killed_command_ends_in_the_same_bytes(tmp_path: Path, command: str) -> None:
    pytest.importorskip("influence_fast_cpu")
    target = kills.Target(command, tmp_path)
    # Less than the file operations of any of them.
    most = {"index update": 6}.get(command, 9)
    at = random.Random(f"{os.environ['INFLUENCE_FAST_TEST_SEED']} {command}").randrange(most)
    for torn in (False, True):
        outcome = target.kill(at % 2 if torn else at, torn)
        assert outcome is not None
        assert outcome.what == "same bytes", outcome


def test_the_command_makes_no_more_operations_than_it_makes(tmp_path: Path) -> None:
    """A number beyond the last is no kill: that is how a run knows that it saw all of them."""
    target = kills.Target("upgrade", tmp_path)
    assert target.kill(10_000) is None
    assert kills.contents(tmp_path / "upgrade" / "folder") == target.expected


def test_counts_of_a_run_leave_those_of_other_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for outcomes in (
        [kills.Outcome("score", 1, False, "same bytes"), kills.Outcome("build", 0, True, "refused")],
        [kills.Outcome("build", at, False, "same bytes") for at in range(3)],
    ):
        kills._write(page, kills.counts(outcomes))
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    assert rows == ["| build | 3 | 3 | 0 | 0 | 0 | 0 |", "| score | 1 | 1 | 0 | 0 | 0 | 0 |"]
