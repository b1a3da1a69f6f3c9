"""Rows kept as factors: the best few outer products in place of a layer's gradient (LoRIF, arXiv 2601.21929).

A layer's gradient of one row, ``(out, in)`` after a two-sided projection or none, becomes the ``factors`` largest terms of
its singular value decomposition: ``factors`` vectors of ``out`` numbers, then as many of ``in``, each with the root of its
singular value. That is the nearest matrix of this rank (Eckart & Young 1936). A layer for which it would be no fewer numbers
stays whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Singular value decompositions at once.
_ROWS = 4096


def as_factors(gradients: Tensor, out: int, factors: int) -> Tensor:
    """Gradients ``(n, dim)`` as float32 ``(n, factors * (out + dim / out))``."""
    parts = []
    for some in gradients.split(_ROWS):
        # In float64: where two singular values are close, float32 finds another matrix than the nearest.
        left, values, right = torch.linalg.svd(some.double().unflatten(1, (out, -1)), full_matrices=False)
        root = values[:, :factors].sqrt()
        missing = factors - root.shape[1]
        left, right = left[:, :, :factors].mT * root[:, :, None], right[:, :factors] * root[:, :, None]
        if missing > 0:
            left, right = (torch.nn.functional.pad(side, (0, 0, 0, missing)) for side in (left, right))
        parts.append(torch.cat([left.flatten(1), right.flatten(1)], 1).float())
    return torch.cat(parts)


def sides(stored: Tensor, out: int, factors: int) -> tuple[Tensor, Tensor]:
    """What :func:`as_factors` gave, as ``(n, factors, out)`` and ``(n, factors, in)``."""
    left, right = stored.split([factors * out, stored.shape[1] - factors * out], 1)
    return left.unflatten(1, (factors, -1)), right.unflatten(1, (factors, -1))


def products(stored: Tensor, out: int, factors: int) -> Tensor:
    """The gradients that factors stand for: ``(n, dim)``."""
    left, right = sides(stored, out, factors)
    # Batched products of vectors are many small calls; this is one.
    return (left.mT * right if factors == 1 else left.mT @ right).flatten(1)
