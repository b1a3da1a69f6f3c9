"""Exact influence against the one-sample loop in float64, without a gradient being formed."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import influence_fast as inf
from influence_fast import ops
from influence_fast.attribution.exact_influence import factor_bytes


def expected(model: nn.Module, train: list[dict], queries: list[dict], layers: list[str], method: str) -> dict:
    g, v = (models.oracle(model, rows, layers) for rows in (train, queries))
    out = {}
    for name in layers:
        a, b = v[name].flatten(1), g[name].flatten(1)
        if method == "cosine":
            a, b = nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1)
        out[name] = (a @ b.T).float()
    return out


@pytest.mark.parametrize(
    ("name", "task", "lora"),
    [("bert", "classification", False), ("gpt2", "classification", True), ("llama", "causal", False)],
)
def test_equals_the_one_sample_loop(name: str, task: str, lora: bool) -> None:
    model = models.make(name, task, lora)
    train, queries = models.rows(task, 7, seed=1), models.rows(task, 4, seed=2)
    layers = [layer for layer in inf.select_layers(model, "all") if "position" not in layer]
    found = inf.exact_influence(model, train, queries, layers, ("dot", "cosine"), batch_tokens=24, progress=False)
    for method in ("dot", "cosine"):
        truth = expected(model, train, queries, layers, method)
        assert list(found[method]) == layers
        for layer in layers:
            scale = float(truth[layer].abs().max())
            torch.testing.assert_close(found[method][layer], truth[layer], rtol=1e-4, atol=1e-5 * max(scale, 1e-3))


@pytest.mark.parametrize("formed", [0, 1 << 30])
def test_both_ways_of_pairing_give_the_same(formed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens in pairs, or the queries' gradients formed once: a choice of speed alone."""
    monkeypatch.setattr("influence_fast.ops.specs._FORMED_BYTES", formed)
    random = torch.Generator().manual_seed(0)
    xa, dya = (torch.randint(-3, 4, (5, 9, d), generator=random).float() for d in (4, 3))
    xb, dyb = (torch.randint(-3, 4, (3, 7, d), generator=random).float() for d in (4, 3))
    lengths = torch.tensor([9, 0, 4, 9, 1])
    a, b = ops.outer(xa, dya, lengths).flatten(1), ops.outer(xb, dyb).flatten(1)
    assert torch.equal(ops.dot_outer(xa, dya, xb, dyb, lengths), a @ b.T)


def test_it_goes_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("ghost_dot", "score_outer", "ghost_norm"):
        plain = getattr(ops.specs, name)
        monkeypatch.setattr(ops.specs, name, lambda *a, n=name, f=plain, **k: (called.append(n), f(*a, **k))[1])
        monkeypatch.setattr(ops, name, getattr(ops.specs, name))
    rows = models.rows(count=5)
    inf.exact_influence(models.make("bert"), rows, rows, "attention", ("cosine",), progress=False)
    assert "ghost_norm" in called
    assert {"ghost_dot", "score_outer"} & set(called)


def test_what_is_refused() -> None:
    model, rows = models.make("gpt2", "causal"), models.rows("causal", 3)
    with pytest.raises(inf.InputError, match=r"shares its weight with a"):
        inf.exact_influence(model, rows, rows, "embedding,head", progress=False)
    with pytest.raises(inf.InputError, match=r"methods: expected some of dot, cosine"):
        inf.exact_influence(model, rows, rows, "attention", ("datainf",), progress=False)


def test_what_factors_take() -> None:
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 3))
    assert factor_bytes(model, ["0", "1"], 10) == 4 * 10 * (8 + 2 + 8 + 3)
