"""A damping of EK-FAC for each layer that is chosen by rows held out, without any retraining."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from influence_fast.attribution.gradient_source import Gradients, GradientSource, chosen_layers
from influence_fast.attribution.model_passes import KroneckerSums, Rows, kronecker_sums
from influence_fast.attribution.preconditioners import kronecker_basis, turned
from influence_fast.errors import InputError

GRID = (1e-8, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)


def held_out_damping(
    model: nn.Module,
    dataset: Rows,
    gradients: Gradients,
    layers: list[str] | None = None,
    *,
    grid: Sequence[float] = GRID,
    folds: int = 5,
    seed: int = 0,
    batch_tokens: int | str = "auto",
    progress: bool = True,
) -> dict[str, float]:
    """``{layer: damping}`` for ``influence(..., method="ekfac", damping=...)``, of ``grid`` what suits rows held out best.

    Cross-validation, by a rule of our own: EK-FAC's basis and eigenvalues ``a`` are fitted to all rows but a fold, and ``b``
    are the mean squares of the fold's gradients in that basis, the same curvature of rows it was not fitted to. For a
    gradient drawn from the rows that were fitted, the step by the damped inverse ``p = 1 / (a + damping * mean(a))`` changes
    the quadratic model of the rows held out by ``sum a (b p^2 - 2 p) / 2`` in the mean. Each layer takes the damping for
    which it is least, over all folds.

    It takes one pass over the model, as :func:`~influence_fast.kronecker_factors` does, with ``folds`` times the memory of
    its factors, and one over the gradients, which are turned ``folds`` times; and ``folds`` decompositions of a layer's
    factors.

    Of several checkpoints of one training let the last one choose for all: early ones may ask for less damping than serves
    retraining.

    Args:
        model, dataset: what the gradients are of.
        gradients: whole ones, of the same rows in the same order: a store, or ``{layer: (n, out * in)}``.
        layers: some of the layers; all by default.
        grid: shares of the mean eigenvalue to choose from.
        folds: how many parts the rows are split into, by ``seed``.
        batch_tokens, progress: as of :func:`~influence_fast.build_store`.

    Raises:
        InputError: a grid that is empty or not positive, fewer than 2 folds or rows than folds, gradients of another number
            of rows, projected or not finite, and as of :func:`~influence_fast.kronecker_factors`.
    """
    shares = [float(share) for share in grid]
    if not shares or not all(0 < share < float("inf") for share in shares):
        raise InputError(f"grid: expected positive shares of the mean eigenvalue, got {list(grid)!r}")
    found = held_out_misfits(
        model, dataset, gradients, layers, shares, folds, seed, batch_tokens=batch_tokens, progress=progress
    )
    return {name: shares[int(misfits.argmin())] for name, misfits in found.items()}


def held_out_misfits(
    model: nn.Module,
    dataset: Rows,
    gradients: Gradients,
    layers: list[str] | None,
    grid: Sequence[float],
    folds: int,
    seed: int,
    *,
    batch_tokens: int | str = "auto",
    progress: bool = True,
) -> dict[str, Tensor]:
    """For each layer the :func:`misfit` of each damping, summed over folds: float64 ``(len(grid),)``."""
    source = GradientSource("gradients", gradients)
    names = chosen_layers(source.layers, layers)
    if len(dataset) != source.rows:
        raise InputError(f"gradients: {source.rows} rows, dataset: {len(dataset)}; expected those of the same rows")
    if not 2 <= folds <= source.rows:
        raise InputError(f"folds: expected from 2 to the {source.rows} rows, got {folds!r}")
    parts = torch.empty(source.rows, dtype=torch.int64)
    order = torch.randperm(source.rows, generator=torch.Generator().manual_seed(seed))
    for number, rows in enumerate(order.tensor_split(folds)):
        parts[rows] = number
    sums = kronecker_sums(model, dataset, names, parts, batch_tokens=batch_tokens, progress=progress)
    out = {}
    for name in names:
        sides = list(zip(*_eigenvalues(source, name, sums.pop(name), parts), strict=True))
        totals = [torch.stack([misfit(fitted, held_out, share) for fitted, held_out in sides]).sum() for share in grid]
        out[name] = torch.stack(totals)
    return out


def misfit(fitted: Tensor, held_out: Tensor, damping: float) -> Tensor:
    """``sum a (b p^2 - 2 p)`` for eigenvalues ``a`` that were fitted and ``b`` of rows held out, least where ``p = 1 / b``.

    It is linear in ``b``, whose noise hence favours no damping; the weight ``a`` gives all terms the same unit.
    """
    shifted = fitted + damping * fitted.mean()
    # Without any gradient there is no curvature, and no step.
    inverse = torch.where(shifted > 0, 1 / shifted, 0)
    return (fitted * (held_out * inverse.square() - 2 * inverse)).sum()


def _eigenvalues(
    source: GradientSource, name: str, sums: KroneckerSums, parts: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """For each fold mean squares in the basis fitted without it, of the other rows and of its own: float64 ``(out, in)``."""
    source.sqnorm(name)  # Names the layer and row of a gradient that is not finite.
    folds = len(sums.counts)
    bases = [kronecker_basis(name, sums.without(fold), source.dim(name)) for fold in range(folds)]
    shape = len(bases[0][0]), len(bases[0][1])
    own = torch.zeros(folds, *shape, dtype=torch.float64)
    others = torch.zeros_like(own)
    for rows in source.blocks(name):
        block, of = source.read(name, rows), parts[rows]
        for fold, basis in enumerate(bases):
            squares = turned(block, *basis).square()
            own[fold] += squares[of == fold].sum(0, dtype=torch.float64)
            others[fold] += squares[of != fold].sum(0, dtype=torch.float64)
    sizes = parts.bincount(minlength=folds)
    fitted = [others[fold] / (len(parts) - int(sizes[fold])) for fold in range(folds)]
    return fitted, [own[fold] / int(sizes[fold]) for fold in range(folds)]
