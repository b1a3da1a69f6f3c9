"""A damping of EK-FAC for each layer that is chosen by rows held out, without any retraining."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import influence_fast as inf

# Of the mean eigenvalue, as ``damping`` of ``influence``.
GRID = (1e-8, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
FOLDS = 5


def misfit(fitted: Tensor, held_out: Tensor, damping: float) -> float:
    """How badly damped eigenvalues of some rows stand for those of rows held out, but for a number that is always the same.

    For an inverse ``p`` each ``b p^2 - 2 p`` is least at ``1 / b``. It is linear in the held-out ``b``, whose noise hence
    favours no damping; the fitted eigenvalue is its weight, so that all have the same unit.
    """
    inverse = 1 / (fitted + damping * fitted.mean())
    return float((fitted * (held_out * inverse.square() - 2 * inverse)).sum())


def held_out_dampings(
    store: inf.GradientStore, model: nn.Module, rows: list[dict[str, Any]], layers: list[str]
) -> dict[str, float]:
    """For each layer the damping of ``GRID`` with the least misfit, each fifth of the rows held out once."""
    parts = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).chunk(FOLDS)
    totals = {layer: torch.zeros(len(GRID), dtype=torch.float64) for layer in layers}
    for number, held_out in enumerate(parts):
        fitted = torch.cat([*parts[:number], *parts[number + 1 :]])
        factors = inf.kronecker_factors(model, [rows[i] for i in fitted.tolist()], layers, progress=False)
        for layer, (inputs, outputs) in factors.items():
            right, left = (torch.linalg.eigh(factor.double()).eigenvectors for factor in (inputs, outputs))
            grads = store.read(layer).double().view(len(rows), len(left), len(right))
            squares = (left.T @ grads @ right).square().flatten(1)
            sides = squares[fitted].mean(0), squares[held_out].mean(0)
            totals[layer] += torch.tensor([misfit(*sides, damping) for damping in GRID], dtype=torch.float64)
    return {layer: GRID[int(total.argmin())] for layer, total in totals.items()}
