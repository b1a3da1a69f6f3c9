"""Metrics of a ranking against hand-made orders, scipy and scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import recall_score, roc_auc_score

import influence_fast as inf
from influence_fast.evaluation.comparison import _draws, _resampled_auc
from influence_fast.evaluation.metrics import interval


def tied(n: int, seed: int, levels: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, generator=random) < 0.25
    return torch.randint(levels, (n,), generator=random).double() - noise.double(), noise


def test_a_perfect_and_a_reversed_order() -> None:
    noise = torch.arange(10) < 4
    scores = torch.arange(10.0)
    assert inf.ndr_curve(scores, noise).tolist() == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    assert inf.ndr(scores, noise, at=0.3) == 0.75
    assert inf.ndr_auc(scores, noise) == pytest.approx(8.5 / 8)
    assert inf.ndr(-scores, noise, at=0.6) == 0
    assert inf.precision(scores, noise, at=0.5) == pytest.approx(0.8)


def test_random_order_at_the_size_of_the_paper() -> None:
    noise = torch.arange(4500) < 900
    assert (
        inf.ndr_auc(torch.zeros(4500), noise)
        == pytest.approx(4501 / 2 / (4500 - 450))
        == pytest.approx(0.5557, abs=1e-4)
    )


def test_ties_count_with_the_expectation_over_their_orders() -> None:
    scores, noise = torch.tensor([1.0, 0, 1, 1, 2, 0]), torch.tensor([True, False, False, True, True, False])
    curves = []
    for order in itertools.permutations(range(6)):
        if all(scores[a] <= scores[b] for a, b in itertools.pairwise(order)):
            curves.append(np.cumsum(noise[list(order)].numpy()) / 3)
    np.testing.assert_allclose(inf.ndr_curve(scores, noise), np.mean(curves, 0), rtol=1e-12)


def test_the_cut_is_not_off_by_one() -> None:
    noise = torch.zeros(100, dtype=torch.bool)
    noise[28] = True
    assert inf.ndr(torch.arange(100.0), noise, at=0.29) == 1, "0.29 * 100 is 28.999... in binary"
    assert inf.ndr(torch.arange(100.0), noise, at=0.28) == 0
    assert inf.ndr(torch.arange(100.0), noise, at=0.0) == 0


def test_roc_auc() -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (60,), generator=random).float()
    noise = torch.rand(60, generator=random) < 0.3
    assert inf.roc_auc(scores, noise) == pytest.approx(roc_auc_score(noise, -scores))


def test_bootstrap_covers_and_repeats() -> None:
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(400, generator=random) < 0.2
    scores = torch.randn(400, generator=random) - noise.float()
    low, high = inf.bootstrap(inf.ndr_auc, scores, noise)
    assert low < inf.ndr_auc(scores, noise) < high < low + 0.15
    assert (low, high) == pytest.approx(inf.bootstrap(inf.ndr_auc, scores, noise))
    narrow = inf.bootstrap(inf.ndr_auc, scores, noise, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_intervals_hold_the_truth_in_nineteen_of_twenty_draws() -> None:
    """Percentiles of these resamples hold it in 0.90 of draws; a binomial count of 300 strays by 0.013 (one deviation)."""
    random, bad = np.random.default_rng(0), np.arange(120) < 24
    ends = [inf.ndr_auc(torch.from_numpy(sign * bad), torch.from_numpy(bad)) for sign in (1.0, -1.0)]
    values, intervals = [], []
    for seed in range(300):
        scores = random.normal(size=120) - 2 * bad
        resampled = _resampled_auc(scores, bad, np.vstack([np.ones((1, 120)), _draws(bad, 200, seed)]))
        values.append(resampled[0])
        intervals.append(interval(resampled[0], resampled[1:], (ends[0], ends[1]), 24, 0.95))
    held = np.mean([low <= np.mean(values) <= high for low, high in intervals])
    assert 0.92 < held < 0.985


def test_bootstrap_at_an_end_is_binomial_and_stays_inside() -> None:
    noise = torch.arange(50) < 10
    low, high = inf.bootstrap(inf.ndr, -noise.double(), noise)
    assert (low, high) == (pytest.approx(0.025**0.1), 1)
    low, high = inf.bootstrap(inf.ndr, noise.double(), noise)
    assert (low, high) == (0, pytest.approx(1 - 0.025**0.1))
    nearly = -noise.double()
    nearly[0] = 0.5
    low, high = inf.bootstrap(inf.ndr, nearly, noise)
    assert 0 < low < inf.ndr(nearly, noise) < high < 1


@pytest.mark.parametrize(
    ("scores", "noise", "message"),
    [
        (torch.zeros(3), torch.ones(4, dtype=torch.bool), r"one length, got \(3,\) and \(4,\)"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.bool), "got 0 of 3 marked"),
        (torch.zeros(3), torch.ones(3, dtype=torch.bool), "got 3 of 3 marked"),
        (torch.zeros(3), torch.tensor([0, 1, 2]), "expected booleans"),
        (torch.tensor([0.0, float("nan"), 1]), torch.tensor([0, 1, 0]), "row 1 is not finite"),
    ],
)
def test_errors(scores, noise, message: str) -> None:
    for metric in (inf.ndr_curve, inf.ndr, inf.ndr_auc, inf.roc_auc, inf.precision):
        with pytest.raises(inf.InputError, match=message):
            metric(scores, noise)
    with pytest.raises(inf.InputError, match="at: expected a share"):
        inf.ndr(torch.zeros(2), torch.tensor([0, 1]), at=1.5)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_against_scipy_and_scikit_learn_with_ties(seed: int) -> None:
    scores, noise = tied(90, seed)
    n, m = 90, int(noise.sum())
    places = rankdata(scores)
    assert inf.ndr_auc(scores, noise) == pytest.approx((n + 1 - places[noise]).sum() / m / (n - m / 2))
    untied = scores + torch.rand(n, generator=torch.Generator().manual_seed(seed)).double() / 9
    found = torch.zeros(n, dtype=torch.bool)
    found[untied.argsort()[:27]] = True
    assert inf.ndr(untied, noise, 0.3) == pytest.approx(recall_score(noise, found))
    cells = {("a", "all", "mean"): scores, ("loss", "", ""): untied, ("random", "", ""): untied.flip(0)}
    for row, values in zip(inf.compare(cells, noise).rows, cells.values(), strict=True):
        assert row["roc_auc"] == pytest.approx(roc_auc_score(noise, -values))
        assert row["auc_ndr"] == pytest.approx(inf.ndr_auc(values, noise))
        assert row["ndr@30"] == pytest.approx(inf.ndr(values, noise, 0.3))
        assert row["precision@20"] == pytest.approx(inf.precision(values, noise, 0.2))


def test_correlation_within_tasks() -> None:
    random = np.random.default_rng(0)
    x, y, task = random.integers(5, size=30), random.integers(5, size=30), np.repeat(["a", "b", "c"], 10)
    expected = np.mean([spearmanr(x[task == t], y[task == t]).statistic for t in "abc"])
    assert inf.rank_correlation(x, y, task) == pytest.approx(expected)
    assert inf.rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert inf.rank_correlation([*x, 1, 1], [*y, 3, 4], [*task, "d", "d"]) == pytest.approx(expected), "d is constant"
    assert math.isnan(inf.rank_correlation([1, 1], [1, 2]))
