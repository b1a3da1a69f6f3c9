"""Metrics against literal definitions and known values."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import recall_score, roc_auc_score
from stores import write_store

import influence_fast as inf
from influence_fast.evaluation.rankings import baselines, groups_by_name
from influence_fast.evaluation.retraining import filter_and_retrain


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


def tied(n: int, seed: int, levels: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, generator=random) < 0.25
    return torch.randint(levels, (n,), generator=random).double() - noise.double(), noise


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


def test_intervals_are_those_of_literal_resamples_and_differences_are_paired() -> None:
    scores, noise = tied(40, 0)
    other = scores + torch.randn(40, generator=torch.Generator().manual_seed(1)).double().round()
    found = inf.compare({("a", "all", "mean"): scores, ("loss", "", ""): other}, noise, resamples=50, seed=3)
    random = np.random.default_rng(3)
    drawn = np.zeros((50, 40), dtype=int)
    for stratum in (np.flatnonzero(noise), np.flatnonzero(~noise)):
        drawn[:, stratum] = random.multinomial(len(stratum), np.full(len(stratum), 1 / len(stratum)), 50)
    literal = np.array([[inf.ndr_auc(v.repeat_interleave(torch.from_numpy(d)), noise.repeat_interleave(torch.from_numpy(d)))
                         for v in (scores, other)] for d in drawn])  # fmt: skip
    row = found.rows[0]
    np.testing.assert_allclose([row["low"], row["high"]], np.quantile(literal[:, 0], [0.025, 0.975]))
    np.testing.assert_allclose(row["over_loss"], np.quantile(literal[:, 0] - literal[:, 1], [0.025, 0.975]))
    np.testing.assert_allclose(
        found.wins[0, 1], np.mean((literal[:, 0] > literal[:, 1]) + 0.5 * (literal[:, 0] == literal[:, 1]))
    )
    assert found.wins.diagonal().tolist() == [0.5, 0.5]


def test_correlation_within_tasks() -> None:
    random = np.random.default_rng(0)
    x, y, task = random.integers(5, size=30), random.integers(5, size=30), np.repeat(["a", "b", "c"], 10)
    expected = np.mean([spearmanr(x[task == t], y[task == t]).statistic for t in "abc"])
    assert inf.rank_correlation(x, y, task) == pytest.approx(expected)
    assert inf.rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert inf.rank_correlation([*x, 1, 1], [*y, 3, 4], [*task, "d", "d"]) == pytest.approx(expected), "d is constant"
    assert math.isnan(inf.rank_correlation([1, 1], [1, 2]))


def test_the_whole_table_in_one_call(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    noise = torch.arange(60) % 4 == 0
    layers = ["h.0.attn.q", "h.1.attn.q", "h.1.mlp.up", "wte_embed", "classifier"]
    sign = 1 - 2 * noise.float()

    # In steps of an eighth inner products are exact, and so are the ranks that the table is held against.
    def draw(rows: int) -> torch.Tensor:
        return (8 * torch.randn(rows, 3, generator=random)).round() / 8

    train = {name: draw(60) + 2 * sign[:, None] for name in layers}
    train["classifier"] = draw(60)
    queries = {name: draw(8) + 2 for name in layers}
    stores = (
        write_store(tmp_path / "t", train, columns={"loss": noise.float() * torch.rand(60, generator=random)}),
        write_store(tmp_path / "q", queries, columns={"correct": torch.arange(8) > 2}),
    )
    keys = [("dot", "all", "mean"), ("cosine", "head", "rank-c"), ("loss", "", "")]
    found = inf.evaluate(
        *stores,
        noise,
        matrices={"mine": {"x": torch.randn(2, 60, generator=random)}},
        accuracy=dict(zip(keys, (0.9, 0.5, 0.8), strict=True)),
    )
    cells = {(row["method"], row["group"], row["aggregation"]): row for row in found.rows}
    assert [row["method"] for row in found.rows[:3]] == ["random", "loss", "self-influence"]
    assert {g for m, g, _ in cells if m == "dot"} == {
        "embedding",
        "attention",
        "mlp",
        "head",
        "block 0",
        "block 1",
        "all",
    }
    assert {a for m, _, a in cells if m == "dot"} == {"mean", "rank-c", "vote-c"}
    assert {(g, a) for m, g, a in cells if m == "mine"} == {
        (g, a) for g in ("x", "all") for a in ("mean", "rank", "vote")
    }
    expected = inf.aggregate(inf.influence(*stores), "vote-c", layers=groups_by_name(layers)["attention"])
    assert cells["dot", "attention", "vote-c"]["auc_ndr"] == pytest.approx(inf.ndr_auc(expected, noise))
    assert found.best["auc_ndr"] == max(row["auc_ndr"] for row in found.rows[3:])
    assert cells["dot", "attention", "mean"]["over_random"][0] > 0.2
    assert "Not better than a random order" in found.warnings[0]
    assert "mine x mean" in found.warnings[0] or "dot head" in found.warnings[0]
    assert set(found.correlation) == {"ndr@10", "ndr@20", "ndr@30", "auc_ndr", "roc_auc"}
    reached = [0.9, 0.5, 0.8]
    assert found.correlation["auc_ndr"] == pytest.approx(
        spearmanr([cells[k]["auc_ndr"] for k in keys], reached).statistic
    )
    assert set(baselines(train)) == {"random", "self-influence"}


def test_errors_of_the_table() -> None:
    scores, noise = tied(20, 0)
    with pytest.raises(inf.InputError, match="at least one ranking"):
        inf.compare({}, noise)
    with pytest.raises(inf.InputError, match="resamples, level"):
        inf.compare({("a", "", ""): scores}, noise, resamples=0)
    with pytest.raises(inf.InputError, match="one length"):
        inf.rank_correlation([1, 2], [1])
    with pytest.raises(inf.InputError, match=r"\(repeats, cells\)"):
        inf.wins(torch.zeros(3))
