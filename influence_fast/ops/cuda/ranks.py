"""Ranks and votes of the columns of an influence matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from influence_fast.ops.arguments import address, not_finite, unit_stride
from influence_fast.ops.cuda import native

# Entries that are ranked at a time; each takes about 50 bytes.
_SORTED = 1 << 23


def rank(influence: Tensor) -> Tensor:
    out = torch.empty(influence.shape, dtype=_rank_dtype(influence), device=influence.device)
    for begin, ranks in _ranked(influence):
        out[begin : begin + ranks.shape[0]] = ranks
    return out


def vote(influence: Tensor, k: int) -> Tensor:
    votes = _zeros(influence)
    _add_up(influence, k, votes, None)
    return votes


def rank_and_vote(influence: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rank_sums, votes = _zeros(influence), _zeros(influence)
    _add_up(influence, k, votes, rank_sums)
    return rank_sums, votes


def _zeros(influence: Tensor) -> Tensor:
    return torch.zeros(influence.shape[1], dtype=torch.float64, device=influence.device)


def _add_up(influence: Tensor, k: int, votes: Tensor, rank_sums: Tensor | None) -> None:
    """Adds every row's votes, and its ranks where they are wanted too, of one sort."""
    for _, ranks in _ranked(influence):
        native.library.vote(
            ranks=address("workspace", ranks),
            wide=ranks.dtype == torch.float64,
            rows=ranks.shape[0],
            columns=ranks.shape[1],
            k=k,
            votes=address("out", votes),
            rank_sums=native.optional_address(rank_sums),
            **native.where(votes),
        )


def _rank_dtype(influence: Tensor) -> torch.dtype:
    return torch.float32 if influence.shape[1] <= 1 << 22 else torch.float64


def _ranked(influence: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and ranks of consecutive groups of rows, in a buffer that the next group overwrites."""
    m, n = influence.shape
    if influence.numel() == 0:
        return
    influence, where = unit_stride(influence), native.where(influence)
    device, step = influence.device, min(m, max(1, _SORTED // n))
    keys = torch.empty(2, step, n, dtype=torch.int64, device=device)
    index = torch.empty(2, step, n, dtype=torch.int32, device=device)
    ranks = torch.empty(step, n, dtype=_rank_dtype(influence), device=device)
    bad = torch.full((), m, dtype=torch.int64, device=device)
    workspace = torch.empty(native.library.rank_workspace(step, n, where["device"]), dtype=torch.uint8, device=device)
    for begin in range(0, m, step):
        rows = influence[begin : begin + step]
        native.library.rank(
            values=native.matrix(rows),
            first_row=begin,
            keys=address("workspace", keys[0]),
            sorted_keys=address("workspace", keys[1]),
            index=address("workspace", index[0]),
            sorted_index=address("workspace", index[1]),
            workspace=address("workspace", workspace),
            workspace_bytes=workspace.numel(),
            ranks=address("workspace", ranks),
            wide=ranks.dtype == torch.float64,
            bad=address("workspace", bad),
            **where,
        )
        yield begin, ranks[: rows.shape[0]]
    if (row := int(bad)) < m:
        raise not_finite(row)
