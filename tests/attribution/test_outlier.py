"""Outliers against scikit-learn's SVM."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from sklearn.svm import OneClassSVM

import influence_fast as inf

NAMES = ["bert", "gpt2", "llama"]


def rows(task: str = "classification", count: int = 7, seed: int = 1) -> list[dict]:
    return models.rows(task, count, seed)


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
