"""Calibrated probabilities of wrong labels on data whose truth is known, drawn over and over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from influence_fast.auditing.findings.calibration import calibrate, reliability
from influence_fast.data.label_noise import uniform


def draw(count: int, classes: int, strength: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels, and log-probabilities by an estimator that is too sure of itself."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    logits = torch.randn(count, classes, generator=random, dtype=torch.float64)
    logits[torch.arange(count), labels] += strength
    return labels, (3 * logits).log_softmax(1)


@pytest.mark.parametrize(("classes", "flipped"), [(2, 0.2), (4, 0.1)])
def test_intervals_hold_the_truth_and_probabilities_come_true(classes: int, flipped: float) -> None:
    covered, errors = 0, []
    for seed in range(10):
        own, asked = draw(300, classes, 2.0, 100 + seed)
        truth, train = draw(1500, classes, 2.0, seed)
        given, wrong = uniform(truth.tolist(), flipped, classes, seed)
        found = calibrate({"one": train}, torch.tensor(given), {"one": asked}, own)
        assert found is not None
        covered += found.low <= flipped <= found.high
        assert found.low <= found.share <= found.high
        errors.append(reliability(found.wrong.numpy(), wrong.double().numpy(), np.ones(1500))[1])
        assert float(found.wrong[wrong].mean()) > 2 * float(found.wrong[~wrong].mean())
    assert covered >= 9
    assert np.mean(errors) <= 0.05


def test_clean_labels_and_estimates_that_know_nothing() -> None:
    own, asked = draw(300, 2, 2.0, 1)
    truth, train = draw(1000, 2, 2.0, 2)
    clean = calibrate({"one": train}, truth, {"one": asked}, own)
    assert clean is not None
    assert clean.low < 0.02
    own, asked = draw(300, 2, 0.0, 3)
    truth, train = draw(1000, 2, 0.0, 4)
    assert calibrate({"one": train}, truth, {"one": asked}, own) is None


def test_reliability_by_hand() -> None:
    bins, error = reliability(np.array([0.05, 0.05, 0.95, 1.0]), np.array([0.0, 1, 1, 1]), np.array([3.0, 1, 2, 2]))
    assert [one["count"] for one in bins] == [2, 2]
    assert (bins[0]["predicted"], bins[0]["observed"]) == (pytest.approx(0.05), 0.25)
    assert error == pytest.approx(0.5 * 0.2 + 0.5 * 0.025)
