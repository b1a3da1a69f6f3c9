"""LDS and leave-out, against ridge regression, where retraining is a closed form."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import influence_fast as inf
from influence_fast.evaluation.counterfactual import _spearman

N, M, D = 60, 7, 3
_RANDOM = torch.Generator().manual_seed(0)
X, XQ = (torch.randn(count, D, generator=_RANDOM).double() for count in (N, M))
_TRUE = torch.randn(D, generator=_RANDOM).double()
Y = X @ _TRUE + 0.5 * torch.randn(N, generator=_RANDOM).double()
YQ = XQ @ _TRUE + 0.5 * torch.randn(M, generator=_RANDOM).double()
EYE = torch.eye(D, dtype=torch.float64)


def train(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(X[rows].T @ X[rows] + EYE, X[rows].T @ Y[rows])


def losses(theta: torch.Tensor) -> torch.Tensor:
    return (XQ @ theta - YQ).square()


def influence() -> torch.Tensor:
    """What infinitesimal weight of row i takes off the loss of a query, (m, n), of the model with all rows."""
    theta = train(torch.arange(N))
    gradients, queries = (X @ theta - Y)[:, None] * X, 2 * (XQ @ theta - YQ)[:, None] * XQ
    return queries @ torch.linalg.solve(X.T @ X + EYE, gradients.T)


def noise(seed: int = 1) -> torch.Tensor:
    return torch.randn(M, N, generator=torch.Generator().manual_seed(seed)).double()


def test_lds_is_high_for_the_true_influence_and_near_zero_for_noise() -> None:
    found = inf.lds(
        train, losses, {"true": influence(), "noise": noise(), "minus": -influence()}, subsets=48, seed=3, fraction=0.9
    )
    table = found.table
    assert table.loc["true", "lds"] > 0.95
    assert table.loc["true", "lds"] == pytest.approx(-table.loc["minus", "lds"])
    assert abs(table.loc["noise", "lds"]) < 3 * table.loc["noise", "se"] < 0.5
    assert table.loc["noise", "low"] < 0 < table.loc["noise", "high"]
    assert table.loc["true", "se_best"] == 0 < table.loc["noise", "se_best"]
    # The definition, literally.
    for query in range(M):
        sums = [float(influence()[query][keep].sum()) for keep in found.subsets]
        reached = [-float(losses(train(keep.nonzero()[:, 0]))[query]) for keep in found.subsets]
        assert float(found.by_query["true"][query]) == pytest.approx(spearmanr(sums, reached).statistic)
    assert found.subsets.sum(1).tolist() == [54] * 48


def test_standard_error_over_queries_is_that_of_a_mean() -> None:
    found = inf.lds(train, losses, noise(), subsets=20, resamples=4000)
    expected = float(found.by_query["scores"].std(correction=0)) / math.sqrt(M)
    assert found.table.loc["scores", "se_queries"] == pytest.approx(expected, rel=0.05)


def test_error_over_subsets_is_the_spread_of_repeated_draws() -> None:
    """With the queries fixed, LDS of new subsets strays as far as the jackknife says, within a third."""
    runs = [inf.lds(train, losses, noise(), subsets=24, seed=seed, resamples=2, progress=False) for seed in range(30)]
    spread = np.std([run.table["lds"].iloc[0] for run in runs], ddof=1)
    assert np.mean([run.table["se_subsets"].iloc[0] for run in runs]) == pytest.approx(spread, rel=0.35)


def test_layers_are_summed_and_one_row_stands_for_all_queries() -> None:
    layers = {"a": influence() - noise(), "b": noise()}
    one = noise()[:1]
    found = inf.lds(train, losses, {"sum": layers, "whole": influence(), "one": one, "vector": one[0]}, subsets=12)
    torch.testing.assert_close(found.by_query["sum"], found.by_query["whole"])
    assert torch.equal(found.by_query["one"], found.by_query["vector"])
    gradients = {"l": torch.randn(N, 4)}, {"l": torch.randn(M, 4)}
    matrix = inf.influence(*gradients, "dot")
    both = inf.lds(train, losses, {"lazy": matrix, "dense": matrix.layer("l")}, subsets=12).by_query
    torch.testing.assert_close(both["lazy"], both["dense"])


def test_spearman_with_ties_is_scipys() -> None:
    random = np.random.default_rng(0)
    x, y = random.integers(4, size=(2, 30, 5)).astype(float)
    expected = [spearmanr(x[:, i], y[:, i]).statistic for i in range(5)]
    np.testing.assert_allclose(_spearman(x, y), expected)


def test_queries_without_a_correlation_are_named_and_left_out() -> None:
    def odd(theta: torch.Tensor) -> torch.Tensor:
        out = losses(theta)
        out[1], out[2] = 0.5, float("nan")
        return out

    scores = influence()
    scores[3] = 0
    found = inf.lds(train, odd, {"a": scores}, subsets=8)
    assert found.left_out["a"] == {
        1: "its loss is the same after every retraining",
        2: "its loss is NaN or infinity after retraining on subset 0",
        3: "its scores sum to the same in every subset",
    }
    assert found.table.loc["a", "queries"] == M - 3
    assert found.by_query["a"].isnan().nonzero()[:, 0].tolist() == [1, 2, 3]
    with pytest.raises(inf.InputError, match="'zero' has no query to be judged by; query 0: its scores sum"):
        inf.lds(train, losses, {"zero": torch.zeros(M, N)}, subsets=4)


def test_retrainings_are_kept_gone_on_with_and_shared_between_both(tmp_path: Path) -> None:
    calls = []

    def counted(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return train(rows)

    # The count is the test's own affair, not what the losses depend on.
    hidden = _Hidden(counted)
    run = lambda count: inf.lds(hidden, losses, noise(), subsets=count, folder=tmp_path / "k")  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        run(6)
    assert len(calls) == 5
    found = run(6)
    assert len(calls) == 7, "four were kept"
    assert run(6).table.equals(found.table)
    assert len(calls) == 7
    more = run(8)
    assert len(calls) == 9
    torch.testing.assert_close(more.losses[:6], found.losses)


class _Hidden:
    """A callable of which only the type is told apart."""

    __slots__ = ("call",)

    def __init__(self, call) -> None:
        self.call = call

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.call(rows)


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    y, x = Y, X

    def drawn(rows: torch.Tensor) -> torch.Tensor:
        noisy = y[rows] + 0.1 * torch.randn(len(rows)).double() + 0.1 * torch.from_numpy(np.random.randn(len(rows)))
        return torch.linalg.solve(x[rows].T @ x[rows] + torch.eye(3).double(), x[rows].T @ noisy)

    xq, yq = XQ, YQ
    own = lambda theta: (xq @ theta - yq).square()  # noqa: E731
    before = torch.get_rng_state()
    one = inf.lds(drawn, own, noise(), subsets=4, repeats=2)
    assert torch.equal(before, torch.get_rng_state())
    two = inf.lds(drawn, own, noise(), subsets=4, repeats=2, processes=2, folder=tmp_path)
    torch.testing.assert_close(one.losses, two.losses)
    assert not torch.equal(one.losses[0], inf.lds(drawn, own, noise(), subsets=4).losses[0])


def test_leave_out_finds_what_dropping_does(tmp_path: Path) -> None:
    scores = {"true": influence(), "noise": noise()}
    found = inf.leave_out(train, losses, scores, k=4, seeds=2, draws=40, folder=tmp_path)
    table = found.table
    over = found.by_query["over_random"]
    assert (over["true", "helpful"] > 0).all()
    # A loss that is near its least, 0, can only rise.
    high = (found.base[0] > 0.05).numpy()
    assert high.sum() > 3
    assert (over["true", "harmful"][high] < 0).all()
    assert table.loc[("true", "helpful"), "over_random"] > 2 * table.loc[("true", "helpful"), "se"] > 0
    assert not (over["noise", "helpful"] > 0).all()
    assert abs(table.loc[("noise", "helpful"), "over_random"]) < 3 * table.loc[("noise", "helpful"), "se"]
    kept = influence()[2].argsort()[:-4].sort().values
    expected = losses(train(kept))[2] - losses(train(torch.arange(N)))[2]
    line = found.by_query.loc[("true", "helpful", 2)]
    assert line["change"] == pytest.approx(float(expected))
    assert line["over_random"] == pytest.approx(line["change"] - line["random"])
    some = inf.leave_out(train, losses, scores, k=4, seeds=2, draws=40, queries=[2], folder=tmp_path)
    assert some.by_query.loc[("true", "helpful", 2)].equals(line)
    assert math.isnan(some.table.loc[("true", "helpful"), "se"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subsets": 2}, "expected at least 3"),
        ({"fraction": 0.001}, "leaves some in and some out"),
        ({"repeats": 0}, "at least 1"),
        ({"resamples": 1}, "resamples, level"),
        ({"processes": 0}, "processes: expected at least 1"),
        ({"scores": {}}, "scores: expected at least one"),
        ({"scores": torch.zeros(M + 1, N)}, f"each of the {M + 1} queries of the scores, got {M}"),
        ({"scores": {"a": torch.zeros(M, N), "b": torch.zeros(M, N + 1)}}, "as many queries and rows in each"),
        ({"losses": lambda theta: torch.tensor(1.0)}, "one loss for each query"),
    ],
)
def test_errors_of_lds(settings, message: str) -> None:
    arguments = {"train": train, "losses": losses, "scores": noise(), "subsets": 4, **settings}
    with pytest.raises(inf.InputError, match=message):
        inf.lds(**arguments)


def test_errors_of_scores_and_of_leave_out() -> None:
    bad = noise()
    bad[2, 5] = float("nan")
    with pytest.raises(inf.InputError, match="'a' has NaN or infinity in 'all' for query 2 and row 5"):
        inf.lds(train, losses, {"a": bad}, subsets=4)
    with pytest.raises(inf.InputError, match="k, seeds, draws, level: expected 1 to 59"):
        inf.leave_out(train, losses, noise(), k=N)
    with pytest.raises(inf.InputError, match="queries: expected numbers from 0 to 6"):
        inf.leave_out(train, losses, noise(), k=2, queries=[M])
    with pytest.raises(inf.InputError, match="losses: query 0 has NaN"):
        inf.leave_out(train, lambda theta: losses(theta) / 0 * 0, noise(), k=2)
