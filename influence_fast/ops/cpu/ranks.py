"""Ranks and votes of the columns of an influence matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.ops.arguments import not_finite
from influence_fast.ops.cpu.native import address_of, library, matrix, new


def rank(influence: Tensor) -> Tensor:
    wide = influence.shape[1] > 1 << 22
    out = new(*influence.shape, dtype=torch.float64 if wide else torch.float32)
    if out.numel():
        values, _influence = matrix("influence", influence.to(torch.float32))
        _check(library.rank(values, address_of(out), wide, torch.get_num_threads()))
    return out


def vote(influence: Tensor, k: int) -> Tensor:
    out = new(influence.shape[1], dtype=torch.float64).zero_()
    if influence.numel():
        values, _influence = matrix("influence", influence.to(torch.float32))
        _check(library.vote(values, k, address_of(out), torch.get_num_threads()))
    return out


def rank_and_vote(influence: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ranks, votes = (new(influence.shape[1], dtype=torch.float64).zero_() for _ in range(2))
    if influence.numel():
        values, _influence = matrix("influence", influence.to(torch.float32))
        threads = torch.get_num_threads()
        _check(library.rank_and_vote(values, k, address_of(ranks), address_of(votes), threads))
    return ranks, votes


def _check(row: int) -> None:
    if row >= 0:
        raise not_finite(row)
