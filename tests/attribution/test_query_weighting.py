"""Fitted query weights against a logistic regression on gradients."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import influence_fast as inf

NAMES = ["bert", "gpt2", "llama"]


def rows(task: str = "classification", count: int = 7, seed: int = 1) -> list[dict]:
    return models.rows(task, count, seed)


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
    np.testing.assert_allclose(sum(found.values())[0], x @ weights, rtol=1e-4, atol=1e-5)
    for name, own in zip("ab", np.split(weights, 2), strict=True):
        np.testing.assert_allclose(found[name][0], parts[name][0].numpy() @ own, rtol=1e-4, atol=1e-5)
    # A query's own label had no part in what is said of it.
    for left in torch.randperm(23, generator=torch.Generator().manual_seed(0)).chunk(10):
        seen = np.setdiff1d(np.arange(23), left)
        expected = v[left.numpy()] @ model.fit(v[seen], right[seen]).coef_[0]
        np.testing.assert_allclose(asked[left], expected, rtol=1e-4, atol=1e-5)


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
    train, queries = ({"a": torch.randn(rows, 30, generator=random)} for rows in (40, 100))
    right = torch.arange(100) < 50
    matrix = inf.influence(train, queries, "trackstar")
    _, asked = inf.fitted_influence(matrix, right)
    assert abs(inf.roc_auc(-asked, right) - 0.5) < 0.15
    assert float(asked.abs().max()) < 1
    with pytest.raises(inf.InputError, match="matrix: expected influence by cosine or trackstar"):
        inf.fitted_influence(inf.influence(train, queries), right)
    for given, some, message in (
        (right[:5], None, r"right: expected \(100,\)"),
        (torch.ones(100), None, "some right and some wrong"),
        (right, torch.arange(25), "some right and some wrong"),
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
    torch.testing.assert_close(asked[others], (unit[0] @ by_hand)[:, 0], rtol=1e-4, atol=1e-5)
