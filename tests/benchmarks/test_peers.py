"""Cases are verified before they are timed, and both run first equally often."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers


def test_both_run_in_turn() -> None:
    calls: list[str] = []

    def job(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.ones(2)

    found = peers.measured(("case", lambda: job("theirs"), lambda: job("ours"), peers._same), 4)
    assert calls == ["theirs", "ours", *["ours", "theirs", "theirs", "ours"] * 2]
    assert found["ratio"] == pytest.approx(found["theirs_s"] / found["ours_s"], rel=0.5)


def test_what_does_not_agree_is_not_timed() -> None:
    with pytest.raises(AssertionError):
        peers.measured(("case", lambda: torch.ones(2), lambda: torch.zeros(2), peers._same), 1)
    vectors = torch.randn(4, 1000)
    good = vectors @ (torch.randn(1000, 256) / 16)
    peers._as_good(vectors, 1.0)(good, good)
    with pytest.raises(AssertionError, match="norms are off"):
        peers._as_good(vectors, 1.0)(good, 2 * good)
