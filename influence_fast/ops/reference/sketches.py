"""Random matrices, and rows projected by them."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.ops import philox
from influence_fast.ops.arguments import Side, accumulator

_COLUMNS = 1 << 15
# Entries of a matrix, or of gradients, that exist at a time.
ENTRIES = 1 << 24


def sketch(g: Tensor, side: Side | Tensor) -> Tensor:
    dtype = accumulator(g.dtype)
    if isinstance(side, Tensor):
        return g.to(dtype) @ side.to(dtype).T
    out = g.new_zeros(g.shape[0], side.k, dtype=dtype)
    step = _COLUMNS if side.kind == "sjlt" else max(128, ENTRIES // side.k // 128 * 128)
    for begin in range(0, side.features, step):
        end = min(begin + step, side.features)
        piece = g[:, begin:end].to(dtype)
        if side.kind == "sjlt":
            index, sign = philox.sjlt(side.words, side.k, _columns(side, (begin, end)), g.device)
            out.index_add_(1, index, piece * sign)
        else:
            out += piece @ random_matrix(side, (0, side.k), (begin, end), dtype, g.device).T
    return out * side.scale if side.kind == "sjlt" and side.scale != 1 else out


def random_matrix(
    side: Side, rows: tuple[int, int], cols: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    cols = _columns(side, cols)
    if side.kind == "rademacher":
        return philox.rademacher(side.words, rows, cols, device).to(dtype) * side.scale
    if side.kind == "gaussian":
        return philox.gaussian(side.words, rows, cols, device).to(dtype) * side.scale
    index, sign = philox.sjlt(side.words, side.k, cols, device)
    return (index == torch.arange(*rows, device=device)[:, None]) * (sign.to(dtype) * side.scale)


def _columns(side: Side, cols: tuple[int, int]) -> tuple[int, int]:
    """Columns of a side as columns of its key's matrix."""
    return side.offset + cols[0], side.offset + cols[1]
