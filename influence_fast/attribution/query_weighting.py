"""Influence summed over the queries with weights that tell right labels from wrong ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from influence_fast.attribution.influence_matrix import InfluenceMatrix, InMemory, inner_products
from influence_fast.attribution.method_inputs import MethodInputs, of_no_query
from influence_fast.errors import InputError

# How freely fitted weights may follow the queries: the prior's variance, chosen out of fold.
_VARIANCES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_FOLDS = 10
_NEWTON_STEPS, _NEWTON_TOLERANCE = 50, 1e-9
METHODS = ("cosine", "trackstar")


def make_fitted(inputs: MethodInputs, method: str) -> InMemory:
    """``fitted-METHOD``: half of the queries are given a wrong label on purpose, to fit the weights to."""
    queries = inputs.mislabelled_queries()
    matrix = inner_products(inputs.train, queries.store, method)
    return of_no_query(fitted_influence(matrix, queries.right, inputs.fit_on)[0])


def fitted_influence(
    matrix: InfluenceMatrix, right: Sequence[bool] | Tensor, fit_on: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Influence summed over the queries with weights that tell right labels from wrong ones: ``{layer: (1, n)}``.

    A mean weighs all queries alike. Here some queries are given a wrong label on purpose (``right`` marks those that are
    not), and the weights ``a`` are those with which ``s(x) = sum_q a_q mean_l I_l(q, x)`` tells the two kinds
    apart best: kernel logistic regression without a bias, whose kernel is the influence between queries. With two classes
    it does not matter which are wrong, for a sample's two gradients are parallel::

        inf.fitted_influence(inf.influence(train, queries, "trackstar"), right)

    Args:
        matrix: influence by ``trackstar`` or ``cosine`` of queries that have their gradients with the label they are given.
        right: boolean ``(m,)``; some of each kind.
        fit_on: numbers of the queries that get a weight; all by default.

    Returns:
        What each layer adds to ``s``, and ``s`` of the queries, float64 ``(m,)``, each by weights that were fitted without
        it (10 folds): the logarithm of the odds that its label is right.

    Raises:
        InputError: another method, ``right`` of another length or of one kind, and all that reading influence raises.
    """
    if matrix.method not in METHODS:
        raise InputError(f"matrix: expected influence by {' or '.join(METHODS)}, got {matrix.method!r}")
    m, count = matrix.shape[0], len(matrix.layers)
    target = torch.as_tensor(right).double() * 2 - 1
    chosen = torch.arange(m) if fit_on is None else fit_on
    if target.shape != (m,) or len(target[chosen].unique()) < 2:
        raise InputError(f"right: expected ({m},), some right and some wrong, got {tuple(target.shape)}")
    kernel = torch.zeros(m, m, dtype=torch.float64)
    for name in matrix.layers:
        kernel += matrix.between_queries(name) / count

    def weights(rows: Tensor, variance: float) -> Tensor:
        out = torch.zeros(m, dtype=torch.float64)
        out[rows] = _query_weights(kernel[rows][:, rows], target[rows], variance)
        return out

    folds = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).chunk(_FOLDS)
    least, best, held_out = float("inf"), _VARIANCES[0], target
    for variance in _VARIANCES:
        logits = torch.zeros(m, dtype=torch.float64)
        for left in folds:
            seen = torch.ones(len(chosen), dtype=torch.bool)
            seen[left] = False
            logits[chosen[left]] = kernel[chosen[left]] @ weights(chosen[seen], variance)
        loss = float(nn.functional.softplus(-target[chosen] * logits[chosen]).mean())
        if loss < least:
            least, best, held_out = loss, variance, logits
    fitted = weights(chosen, best)
    out = kernel @ fitted
    out[chosen] = held_out[chosen]
    return {name: matrix.weighted(name, fitted[None] / count).float() for name in matrix.layers}, out


def _query_weights(kernel: Tensor, target: Tensor, variance: float) -> Tensor:
    """Most probable ``a`` for ``P(target) = sigmoid(target * kernel a)`` and ``kernel a ~ N(0, variance * kernel)``.

    Newton's method as for the Laplace approximation of a Gaussian process (Rasmussen and Williams, Algorithm 3.1), with
    ``a`` in units of the variance; at the optimum ``a = variance * pull``.
    """
    kernel = (kernel + kernel.T) / 2
    identity = torch.eye(len(target), dtype=torch.float64)

    def loss(weights: Tensor) -> float:
        logits = kernel @ weights
        return float(nn.functional.softplus(-target * logits).sum() + (weights @ logits) / (2 * variance))

    weights = torch.zeros(len(target), dtype=torch.float64)
    least = loss(weights)
    for _ in range(_NEWTON_STEPS):
        logits = kernel @ weights
        pull = target * torch.sigmoid(-target * logits)  # of each query on its own logit
        if (weights - variance * pull).abs().max() <= _NEWTON_TOLERANCE * variance:
            break
        spread = (torch.sigmoid(logits) * torch.sigmoid(-logits)).sqrt()
        towards = spread.square() * logits + pull
        system = torch.linalg.cholesky(identity + variance * spread[:, None] * kernel * spread)
        solved = torch.cholesky_solve((spread * (kernel @ towards))[:, None], system)[:, 0]
        step = variance * (towards - variance * spread * solved) - weights
        while (reached := loss(weights + step)) > least + 1e-12 * abs(least) and step.abs().max() > 1e-12:
            step = step / 2
        weights, least = weights + step, min(least, reached)
    return weights
