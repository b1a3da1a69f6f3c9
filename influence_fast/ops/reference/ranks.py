"""Ranks and votes of the columns of an influence matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.ops.arguments import not_finite


def rank(influence: Tensor) -> Tensor:
    if influence.numel() == 0:
        return influence.new_zeros(influence.shape, dtype=torch.float32)
    finite = influence.isfinite().all(1)
    if not finite.all():
        raise not_finite(int(finite.logical_not().nonzero()[0]))
    ordered, position = influence.sort(1)
    n = influence.shape[1]
    place = torch.arange(n, device=influence.device, dtype=torch.float64).expand_as(ordered)
    fresh = ordered[:, 1:] != ordered[:, :-1]
    true = fresh.new_ones(fresh.shape[0], 1)
    first = torch.where(torch.cat([true, fresh], 1), place, 0).cummax(1).values
    last = torch.where(torch.cat([fresh, true], 1), place, n).flip(1).cummin(1).values.flip(1)
    ranks = torch.empty_like(first).scatter_(1, position, (first + last) / 2)
    return ranks.to(torch.float32) if n <= 1 << 22 else ranks


def vote(influence: Tensor, k: int) -> Tensor:
    return (rank(influence).double() - k).clamp_max(0).sum(0)


def rank_and_vote(influence: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ranks = rank(influence).double()
    return ranks.sum(0), (ranks - k).clamp_max(0).sum(0)
