"""A build of four processes that loses one, wherever it is then; ``python -m tests.reliability.lost_ranks`` takes many."""

from __future__ import annotations

import secrets
from pathlib import Path

from tests.reliability.lost_ranks import losses


def test_a_lost_process_costs_no_byte(tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    found = list(losses(tmp_path, rounds=1, ranks=4, seed=seed))
    assert len(found) == 1
    assert all(outcome.startswith("same bytes") for outcome in found), (seed, found)
