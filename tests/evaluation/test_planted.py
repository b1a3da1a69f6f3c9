"""AUC_NDR from planted labels: what it estimates, by simulation, and how often its interval holds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence_fast as inf


def drawn(n: int, wrong: float, classes: int, seed: int, apart: float = 2.0, planted: float = 0.1):
    """Scores by which labels are found, which are planted, and AUC_NDR on those that were wrong before."""
    random = np.random.default_rng(seed)
    true = random.integers(classes, size=n)
    given = np.where(random.random(n) < wrong, (true + random.integers(1, classes, n)) % classes, true)
    noise = random.normal(size=n)
    before = given != true
    truth = inf.ndr_auc(torch.from_numpy(noise - apart * before), torch.from_numpy(before))
    chosen = random.permutation(n)[: round(planted * n)]
    given[chosen] = (given[chosen] + random.integers(1, classes, len(chosen))) % classes
    marked = torch.zeros(n, dtype=torch.bool)
    marked[chosen] = True
    return torch.from_numpy(noise - apart * (given != true)), marked, truth


@pytest.mark.parametrize(("classes", "wrong"), [(2, 0.2), (2, 0.05), (5, 0.3)])
def test_it_is_that_of_the_wrong_labels_that_are_there(classes: int, wrong: float) -> None:
    scores, planted, truth = drawn(60_000, wrong, classes, 0)
    value, low, high = inf.ndr_auc_from_planted(scores, planted, wrong, classes, resamples=20)
    assert value == pytest.approx(truth, abs=0.01)
    assert low < value < high < low + 0.05
    assert abs(inf.ndr_auc(scores, planted) - truth) > 0.02


def test_the_interval_holds_it() -> None:
    held = []
    for seed in range(40):
        scores, planted, truth = drawn(400, 0.2, 2, seed)
        _, low, high = inf.ndr_auc_from_planted(scores, planted, 0.2, between=(0.15, 0.25), resamples=60)
        assert 0 < low < high < 1.01
        held.append(low <= truth <= high)
    assert sum(held) >= 36


def test_bad_arguments() -> None:
    scores, planted, _ = drawn(100, 0.2, 2, 0)
    for share, between, classes in ((0.0, None, 2), (0.2, (0.3, 0.4), 2), (0.46, None, 2), (0.2, None, 1)):
        with pytest.raises(inf.InputError, match="wrong"):
            inf.ndr_auc_from_planted(scores, planted, share, classes, between=between)
    with pytest.raises(inf.InputError, match="noise"):
        inf.ndr_auc_from_planted(scores, torch.zeros(100, dtype=torch.bool), 0.2)
