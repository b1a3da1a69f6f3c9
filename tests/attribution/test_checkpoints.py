"""Influence summed over checkpoints."""

from __future__ import annotations

import models
import pytest
import torch

import influence_fast as inf

NAMES = ["bert", "gpt2", "llama"]


def rows(task: str = "classification", count: int = 7, seed: int = 1) -> list[dict]:
    return models.rows(task, count, seed)


def test_checkpoints_are_a_weighted_sum() -> None:
    dims = {"a": 3, "b": 2}
    # Of integers, and weights that are powers of two: sums are exact, so that ranks are too.
    sides = [
        [{name: torch.randint(-40, 41, (rows, dim)).float() for name, dim in dims.items()} for rows in (8, 4)]
        for _ in range(3)
    ]
    matrices = [inf.influence(*side) for side in sides]
    weights = [0.5, 2.0, 1.0]
    both = inf.Checkpoints(matrices, weights)
    expected = {n: sum(w * m.layer(n) for w, m in zip(weights, matrices, strict=True)) for n in ("a", "b")}
    for name, value in expected.items():
        torch.testing.assert_close(both.layer(name), value)
    for method in ("mean", "rank", "vote", "median"):
        torch.testing.assert_close(inf.aggregate(both, method), inf.aggregate(expected, method))
    with pytest.raises(inf.InputError, match="weights: expected 3"):
        inf.Checkpoints(matrices, [1.0])
    with pytest.raises(inf.InputError, match="at least one"):
        inf.Checkpoints([])
    with pytest.raises(inf.InputError, match="checkpoint 1 has 1 layers"):
        inf.Checkpoints([matrices[0], inf.influence({"a": torch.randn(8, 3)}, {"a": torch.randn(4, 3)})])


def gradients(count: int, rows: int, seed: int) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(rows, d, generator=random) for n, d in (("a", 5), ("b", 3))} for _ in range(count)]


def test_tracin_and_less_are_their_formulas() -> None:
    """Query by query and row by row, in float64."""
    train, queries, rates = gradients(3, 6, 0), gradients(3, 4, 1), [0.1, 0.05, 0.01]
    train[1]["a"][2], train[1]["b"][2] = 0, 0
    products, cosines = inf.tracin(train, queries, rates), inf.less(train, queries, rates)
    assert cosines.layers == ["all"]
    for i in range(4):
        for j in range(6):
            expected = dict.fromkeys(("a", "b"), 0.0)
            less = 0.0
            for rate, own, asked in zip(rates, train, queries, strict=True):
                for name in expected:
                    expected[name] += rate * float(own[name][j].double() @ asked[name][i].double())
                g, q = (torch.cat([side[n][k].double() for n in "ab"]) for side, k in ((own, j), (asked, i)))
                less += rate * float(g @ q / (g.norm() * q.norm())) if g.norm() else 0.0
            assert float(cosines.layer("all")[i, j]) == pytest.approx(less, abs=1e-6)
            for name, value in expected.items():
                assert float(products.layer(name)[i, j]) == pytest.approx(value, abs=1e-5)
    torch.testing.assert_close(inf.aggregate(cosines, "mean"), cosines.layer("all").double().mean(0))
    assert [values.shape[0] for _, values in cosines.columns()] == [1] * len(list(cosines.columns()))


def test_checkpoints_that_do_not_fit_are_refused(tmp_path) -> None:
    train, queries = gradients(2, 6, 0), gradients(2, 4, 1)
    with pytest.raises(inf.InputError, match="got 2, 2 and 1"):
        inf.tracin(train, queries, [1.0])
    with pytest.raises(inf.InputError, match="checkpoint 1 are not those of the first"):
        inf.less([train[0], gradients(1, 5, 0)[0]], queries, [1.0, 1.0])
    model, settings = models.make("bert"), {"layers": ["classifier"], "projection": "identity", "progress": False}
    state = {"classifier": inf.ops.AdamState(torch.zeros(3, 16), torch.ones(3, 16))}
    plain = inf.build_store(tmp_path / "plain", model, rows(), **settings)
    updates = inf.build_store(tmp_path / "updates", model, rows(), adam=state, **settings)
    assert inf.less([updates], [plain], [1.0]).shape == (7, 7)
    with pytest.raises(inf.InputError, match="train: expected a store of Adam's updates"):
        inf.less([plain], [plain], [1.0])
    with pytest.raises(inf.InputError, match="queries: expected a store of plain gradients"):
        inf.less([updates], [updates], [1.0])
