"""Methods beyond inner products of stores, on tiny models, against literal float64 loops."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import pytest
import torch
from sklearn.svm import OneClassSVM
from torch import Tensor

import influence_fast as inf

NAMES = ["bert", "gpt2", "llama"]


def rows(task: str = "classification", count: int = 7, seed: int = 1) -> list[dict]:
    return models.rows(task, count, seed)


def relabelled(samples: list[dict], label: int) -> list[dict]:
    return [{**sample, "labels": label} for sample in samples]


@pytest.mark.parametrize("name", NAMES)
def test_label_contrast_is_the_given_label_minus_the_mean_of_the_others(tmp_path: Path, name: str) -> None:
    model, samples = models.make(name), rows()
    store = inf.build_store(
        tmp_path / "s", model, samples, "attention,head", "identity", inf.label_contrast, progress=False
    )
    by_label = [models.oracle(model, relabelled(samples, label), store.layers) for label in range(3)]
    for layer in store.layers:
        given = torch.tensor([sample["labels"] for sample in samples])
        stack = torch.stack([gradients[layer].flatten(1) for gradients in by_label])
        own = stack[given, torch.arange(len(samples))]
        expected = own - (stack.sum(0) - own) / 2
        torch.testing.assert_close(store.read(layer).double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "task"), [("bert", "classification"), ("gpt2", "classification"), ("llama", "causal")]
)
def test_word_influence_is_the_embedding_gradient_row_by_row(name: str, task: str) -> None:
    model = models.make(name, task)
    samples = [rows(task, 7, 1), rows(task, 4, 2)]
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    train, queries = (models.oracle(model, part, [embedding])[embedding].mT for part in samples)
    words = [inf.word_gradients(model, part, batch_tokens=20, progress=False) for part in samples]
    expected = torch.einsum("qwd,nwd->qn", queries, train)
    found = inf.word_influence(words[0], words[1])["embedding"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)

    def longest(gradients: Tensor, k: int) -> Tensor:
        kept = gradients.norm(dim=2).topk(k, dim=1).indices
        return torch.zeros_like(gradients).scatter(1, kept[..., None].expand(-1, -1, gradients.shape[2]), 1) * gradients

    top = torch.einsum("qwd,nwd->qn", longest(queries, 2), longest(train, 2))
    found = inf.word_influence(words[0], words[1], top=2)["embedding"]
    torch.testing.assert_close(found.double(), top, rtol=1e-3, atol=1e-6)


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


def test_outlier_is_the_svm_of_its_class() -> None:
    train, queries = torch.randn(12, 4), torch.randn(10, 4)
    labels, asked = torch.arange(12) % 2, torch.arange(10) % 2
    correct = torch.arange(10) > 1
    for mask in (None, correct):
        found = inf.outlier({"a": train}, {"a": queries}, labels, asked, correct=mask)["a"]
        assert found.shape == (1, 12)
        for i in range(12):
            own = queries[(asked == labels[i]) & (correct if mask is not None else True)]
            expected = (
                OneClassSVM(nu=0.5).fit(own.double().numpy()).decision_function(train[i : i + 1].double().numpy())
            )
            np.testing.assert_allclose(found[0, i], expected[0], rtol=1e-4, atol=1e-6)
    with pytest.raises(inf.InputError, match="no query of class 1"):
        inf.outlier({"a": train}, {"a": queries}, labels, torch.zeros(10, dtype=torch.long))
    with pytest.raises(inf.InputError, match="train_labels: expected one label for each of the 12 rows"):
        inf.outlier({"a": train}, {"a": queries}, labels[:3], asked)
    assert inf.aggregate(inf.outlier({"a": train}, {"a": queries}, labels, asked), "rank").shape == (12,)


def test_checkpoints_are_a_weighted_sum() -> None:
    dims = {"a": 3, "b": 2}
    sides = [[{name: torch.randn(rows, dim) for name, dim in dims.items()} for rows in (8, 4)] for _ in range(3)]
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
