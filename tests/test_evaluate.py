"""Metrics against literal definitions and known values."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from stores import write_store

import influence_fast as inf
from influence_fast.evaluate import filter_and_retrain


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
    assert (low, high) == inf.bootstrap(inf.ndr_auc, scores, noise)
    narrow = inf.bootstrap(inf.ndr_auc, scores, noise, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_cancellation(tmp_path: Path, monkeypatch) -> None:
    data = {"a": torch.randn(30, 4), "b": torch.tensor([[1.0], [-1.0]] * 15)}
    expected = float(data["a"].abs().sum() / data["a"].sum(0).abs().sum())
    for source in (data, write_store(tmp_path / "s", data)):
        assert inf.cancellation(source)["a"] == pytest.approx(expected, rel=1e-5)
        assert inf.cancellation(source, ["b"]) == {"b": math.inf}
    with pytest.raises(inf.InputError, match="expected some of a, b, got 'z'"):
        inf.cancellation(data, ["z"])


def test_filter_and_retrain_chooses_the_epoch_on_the_other_split() -> None:
    noise = torch.arange(20) % 5 == 0
    seen = {}

    def train(rows):
        dirty = float(noise[rows].double().mean())
        seen[len(seen)] = rows
        return [(0.5, 0.99), (0.9 - dirty, 0.8 - dirty), (0.6, 0.1)]

    scores = torch.where(noise, 0.0, 1.0) + torch.arange(20) / 100
    arms = filter_and_retrain(train, {"ours": scores}, noise, drop=0.3)
    assert set(arms) == {"all", "ours", "random", "oracle"}
    assert len(arms["all"].rows) == 20
    for name in ("ours", "random", "oracle"):
        assert len(arms[name].rows) == 14
        assert (arms[name].rows.diff() > 0).all()
    assert not noise[arms["ours"].rows].any()
    assert not noise[arms["oracle"].rows].any()
    assert arms["ours"].epoch == 1
    assert arms["ours"].reported == pytest.approx(0.8)


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
