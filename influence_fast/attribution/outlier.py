"""One-class SVMs on the gradients of trusted queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from influence_fast.attribution.gradient_source import Gradients, GradientSource, chosen_layers
from influence_fast.attribution.influence_matrix import InMemory
from influence_fast.attribution.method_inputs import MethodInputs, of_no_query
from influence_fast.errors import InputError


def make_outlier(inputs: MethodInputs) -> InMemory:
    """``outlier``, fitted on the queries of each class."""
    return of_no_query(outlier(inputs.train, inputs.queries, *inputs.labels()))


def outlier(
    train: Gradients,
    queries: Gradients,
    train_labels: Sequence[int] | Tensor,
    query_labels: Sequence[int] | Tensor,
    layers: list[str] | None = None,
    *,
    correct: Tensor | None = None,
    nu: float = 0.5,
) -> dict[str, Tensor]:
    """How far a sample's gradient lies inside those of the trusted queries of its class: ``{layer: (1, n)}``, low = outside.

    For each layer and class a one-class SVM (Schoelkopf et al. 2001; scikit-learn, RBF kernel, ``gamma="scale"``) is fitted
    on the query gradients of the class; the score is its decision function. ``correct`` is a mask of the queries to fit on.

    Raises:
        InputError: labels of another length; a class of the training set that no query has.
    """
    from sklearn.svm import OneClassSVM

    given, trusted = GradientSource("train", train), GradientSource("queries", queries)
    given.check_matches(trusted)
    labels = [torch.as_tensor(values) for values in (train_labels, query_labels)]
    for name, values, side in zip(("train_labels", "query_labels"), labels, (given, trusted), strict=True):
        if values.shape != (side.rows,):
            raise InputError(f"{name}: expected one label for each of the {side.rows} rows, got {tuple(values.shape)}")
    mask = torch.ones(trusted.rows, dtype=torch.bool) if correct is None else correct
    classes = labels[0].unique().tolist()
    members = {label: torch.nonzero((labels[1] == label) & mask)[:, 0] for label in classes}
    for label, found in members.items():
        if not len(found):
            raise InputError(f"query_labels: no query of class {label} to fit on, which training samples have")
    out = {}
    for name in chosen_layers(given.layers, layers):
        gradients = trusted.read(name)
        models = {label: OneClassSVM(nu=nu).fit(gradients[rows].double().numpy()) for label, rows in members.items()}
        scores = torch.empty(1, given.rows)
        for block in given.blocks(name):
            values, own = given.read(name, block).double(), labels[0][block]
            for label, model in models.items():
                rows = own == label
                if rows.any():
                    found = model.decision_function(values[rows].numpy())
                    scores[0, block][rows] = torch.from_numpy(found).float()
        out[name] = scores
    return out
