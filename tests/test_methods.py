"""Methods beyond inner products of stores, on tiny models, against literal float64 loops."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
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


def whitened(train: Tensor, gradients: Tensor, method: str) -> Tensor:
    """Vectors whose inner products are the method's influence."""
    values = gradients.double()
    if method == "trackstar":
        moment = train.double().T @ train.double() / len(train)
        moment += 0.1 * moment.trace() / len(moment) * torch.eye(len(moment), dtype=torch.float64)
        values = values @ torch.linalg.inv(torch.linalg.cholesky(moment)).T
    return torch.nn.functional.normalize(values, dim=1)


@pytest.mark.parametrize("method", ["trackstar", "cosine"])
def test_fitted_influence_is_a_logistic_regression_on_gradients(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train, queries = ({name: torch.randn(rows, 6) for name in "ab"} for rows in (50, 23))
    right = torch.arange(23) % 3 > 0
    queries["a"][right, 0] += 1.5
    monkeypatch.setattr("influence_fast.attribution.query_weighting._VARIANCES", (3.0,))
    found, asked = inf.fitted_influence(inf.influence(train, queries, method), right)
    parts = {n: [whitened(train[n], side[n], method) / 2**0.5 for side in (train, queries)] for n in "ab"}
    x, v = (torch.cat([parts[name][side] for name in "ab"], 1).numpy() for side in (0, 1))
    model = LogisticRegression(C=3.0, fit_intercept=False, tol=1e-10, max_iter=1000)
    weights = model.fit(v, right).coef_[0]
    np.testing.assert_allclose(sum(found.values())[0], x @ weights, rtol=1e-3, atol=1e-4)
    for name, own in zip("ab", np.split(weights, 2), strict=True):
        np.testing.assert_allclose(found[name][0], parts[name][0].numpy() @ own, rtol=1e-3, atol=1e-4)
    # A query's own label had no part in what is said of it.
    for left in torch.randperm(23, generator=torch.Generator().manual_seed(0)).chunk(10):
        seen = np.setdiff1d(np.arange(23), left)
        expected = v[left.numpy()] @ model.fit(v[seen], right[seen]).coef_[0]
        np.testing.assert_allclose(asked[left], expected, rtol=1e-3, atol=1e-4)


def test_fitted_influence_finds_what_the_mean_over_queries_misses() -> None:
    random = torch.Generator().manual_seed(0)
    # What two directions share goes this way and that; their difference alone is of a right label.
    shared = 3 * torch.randn(600, 1, generator=random) + 0.5
    gradients = torch.cat([shared + 1, shared], 1) + 0.1 * torch.randn(600, 2, generator=random)
    noise, right = torch.arange(500) % 5 == 0, torch.arange(100) % 2 == 0
    train = {"a": torch.where(noise[:, None], -gradients[:500], gradients[:500])}
    queries = {"a": torch.where(right[:, None], gradients[500:], -gradients[500:])}
    scores, asked = inf.fitted_influence(inf.influence(train, queries, "cosine"), right)
    plain = inf.aggregate(inf.influence(train, {"a": gradients[500:]}, "cosine"), "mean")
    assert inf.ndr_auc(scores["a"][0].double(), noise) > inf.ndr_auc(plain, noise) + 0.05
    assert float(((asked > 0) == right).double().mean()) > 0.9


def test_fitted_influence_learns_nothing_from_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    train, queries = ({"a": torch.randn(rows, 30, generator=random)} for rows in (40, 200))
    right = torch.arange(200) < 100
    matrix = inf.influence(train, queries, "trackstar")
    _, asked = inf.fitted_influence(matrix, right)
    assert abs(inf.roc_auc(-asked, right) - 0.5) < 0.15
    assert float(asked.abs().max()) < 1
    with pytest.raises(inf.InputError, match="matrix: expected influence by cosine or trackstar"):
        inf.fitted_influence(inf.influence(train, queries), right)
    for given, some, message in (
        (right[:5], None, r"right: expected \(200,\)"),
        (torch.ones(200), None, "some right and some wrong"),
        (right, torch.arange(50), "some right and some wrong"),
    ):
        with pytest.raises(inf.InputError, match=message):
            inf.fitted_influence(matrix, given, some)


def test_fitted_influence_on_some_of_the_queries() -> None:
    train, queries = ({"a": torch.randn(rows, 6)} for rows in (50, 40))
    right, some = torch.rand(40) < 0.5, torch.randperm(40)[:25]
    queries["a"][right, 0] += 1.5
    found, asked = inf.fitted_influence(inf.influence(train, queries, "trackstar"), right, some)
    fewer = inf.influence(train, {"a": queries["a"][some]}, "trackstar")
    expected, held_out = inf.fitted_influence(fewer, right[some])
    torch.testing.assert_close(found["a"], expected["a"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(asked[some], held_out, rtol=1e-4, atol=1e-5)
    # One that no weight was fitted to may as well be a training sample.
    others = torch.ones(40, dtype=torch.bool)
    others[some] = False
    unit = [whitened(train["a"], part, "trackstar") for part in (queries["a"][others], train["a"])]
    by_hand = torch.linalg.lstsq(unit[1], expected["a"][0].double()[:, None]).solution
    torch.testing.assert_close(asked[others], (unit[0] @ by_hand)[:, 0], rtol=1e-3, atol=1e-4)


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
