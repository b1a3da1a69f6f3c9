"""Exact search by its definition, which the index is held against."""

from __future__ import annotations

import torch
from torch import Tensor

import influence_fast as inf


def draw(rows: int, dims: dict[str, int], seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, dim, generator=random) for name, dim in dims.items()}


def scores(train: dict[str, Tensor], queries: dict[str, Tensor], weights: dict[str, float], cosine: bool) -> Tensor:
    """The definition. Every product is summed alike, so that equal rows score alike."""
    total, g2, v2 = 0, 0, 0
    for name, weight in weights.items():
        g, v = train[name].double(), queries[name].double()
        total = total + weight * (v[:, None] * g[None]).sum(2)
        g2, v2 = g2 + weight * g.square().sum(1), v2 + weight * v.square().sum(1)
    if not cosine:
        return total
    return torch.where((g2 * v2[:, None]) > 0, total / (g2 * v2[:, None]).sqrt(), 0)


def check(
    store: inf.GradientStore,
    index: inf.InfluenceIndex,
    queries: dict[str, Tensor],
    k: int,
    harmful: bool = False,
    layers: dict[str, float] | None = None,
    only: Tensor | None = None,
) -> None:
    train = {name: store.read(name) for name in store.layers}
    expected = scores(train, queries, layers or dict.fromkeys(store.layers, 1.0), index.metric == "cosine")
    if only is not None:
        expected[:, ~only] = float("inf") if harmful else -float("inf")
    got, ids = index.search(queries, k, harmful, layers=layers, only=only)
    order = expected.argsort(dim=1, descending=not harmful, stable=True)[:, :k]
    torch.testing.assert_close(got, expected.gather(1, order).float(), rtol=1e-6, atol=1e-12)
    # Sums in another order may turn what differs in the last bit; anything else is a wrong answer.
    close = (expected.gather(1, ids) - expected.gather(1, order)).abs() <= 1e-13 * expected.abs().amax(1, keepdim=True)
    assert torch.equal(ids, order) or close[ids != order].all()
    # Scores that are zero before they are rounded to float32: they tie.
    for row, values in zip(ids.tolist(), expected.gather(1, ids).tolist(), strict=True):
        assert len(set(row)) == k
        assert all(a < b for a, b, s, t in zip(row, row[1:], values, values[1:], strict=False) if s == t == 0)
