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
