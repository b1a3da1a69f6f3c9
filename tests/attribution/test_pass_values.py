"""What a pass over the model gives, against one sample at a time."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

import influence_fast as inf
from influence_fast.attribution.model_passes import kronecker_sums

NAMES = ["bert", "gpt2", "llama"]


def rows(task: str = "classification", count: int = 7, seed: int = 1) -> list[dict]:
    return models.rows(task, count, seed)


@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
@pytest.mark.parametrize(("name", "task"), [("bert", "classification"), ("llama", "causal")])
def test_hidden_states_one_sample_at_a_time(name: str, task: str, pooling: str) -> None:
    model, samples = models.make(name, task), rows(task)
    found = inf.hidden_states(model, samples, pooling, batch_tokens=20, progress=False)
    assert list(found) == ["embedding", "block 0", "block 1", "block 2", "block 3"]
    model.double()
    for i, sample in enumerate(samples):
        batch = models.collate([sample])
        batch.pop("labels")
        states = model(**batch, output_hidden_states=True).hidden_states
        for state, layer in zip(states, found, strict=True):
            expected = {"last": state[0, -1], "mean": state[0].mean(0), "first": state[0, 0]}[pooling]
            torch.testing.assert_close(found[layer][i].double(), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "task"), [("bert", "classification"), ("gpt2", "classification"), ("llama", "causal")]
)
def test_kronecker_sums_by_parts_of_the_rows(name: str, task: str) -> None:
    model, samples = models.make(name, task), rows(task)
    layers = inf.select_layers(model, "attention[0],mlp[3],head")
    parts = torch.tensor([1, 0, 2, 1, 1, 0, 2])
    found = kronecker_sums(model, samples, layers, parts, batch_tokens=20, progress=False)
    for part in (0, 1, 2, None):
        kept = [sample for sample, own in zip(samples, parts.tolist(), strict=True) if own != part]
        expected = inf.kronecker_factors(model, kept, layers, progress=False)
        for layer in layers:
            for factor, other in zip(found[layer].without(part), expected[layer], strict=True):
                torch.testing.assert_close(factor, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("name", "task"), [("bert", "classification"), ("gpt2", "classification"), ("llama", "causal")]
)
def test_kronecker_factors_one_token_at_a_time(name: str, task: str) -> None:
    model, samples = models.make(name, task), rows(task)
    layers = inf.select_layers(model, "attention[0],mlp[3],head")
    found = inf.kronecker_factors(model, samples, layers, batch_tokens=20, progress=False)
    model.double()
    modules = dict(model.named_modules())
    for layer in layers:
        xs, dys = [], []
        for sample in samples:
            kept: list[Tensor] = []

            def keep(module, args, output, kept=kept):
                output.retain_grad()
                kept += [args[0], output]

            handle = modules[layer].register_forward_hook(keep)
            models.losses(model, models.collate([sample])).sum().backward()
            handle.remove()
            xs.append(kept[0].detach().flatten(0, -2))
            dys.append(kept[1].grad.flatten(0, -2))
        x, dy = torch.cat(xs), torch.cat(dys)
        torch.testing.assert_close(found[layer][0], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[layer][1], dy.T @ dy / len(dy), rtol=1e-3, atol=1e-8)


def test_ekfac_from_a_model(tmp_path: Path) -> None:
    model = models.make("bert", lora=True)
    parts = [rows(count=9, seed=1), rows(count=4, seed=2)]
    stores = [
        inf.build_store(tmp_path / str(i), model, part, "lora", "identity", progress=False)
        for i, part in enumerate(parts)
    ]
    factors = inf.kronecker_factors(model, parts[0], stores[0].layers, progress=False)
    matrix = inf.influence(*stores, "ekfac", factors=factors)
    for layer in matrix.layers:
        a, s = factors[layer]
        g, v = (models.oracle(model, part, [layer])[layer] for part in parts)
        basis = torch.kron(torch.linalg.eigh(s).eigenvectors, torch.linalg.eigh(a).eigenvectors)
        eigenvalues = (g.flatten(1) @ basis).square().mean(0)
        inverse = basis / (eigenvalues + 0.1 * eigenvalues.mean()) @ basis.T
        expected = v.flatten(1) @ inverse @ g.flatten(1).T
        scale = 1e-3 * float(expected.abs().max())
        torch.testing.assert_close(matrix.layer(layer).double(), expected, rtol=1e-2, atol=scale)
