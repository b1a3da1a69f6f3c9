"""Random matrices, and rows projected by them."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.ops.arguments import Side, accumulator, aligned, unit_stride
from influence_fast.ops.cpu import kept_matrices
from influence_fast.ops.cpu.native import address_of, implicit_side, in_memory, library, matrix, new


def sketch(g: Tensor, side: Side | Tensor) -> Tensor:
    dtype = accumulator(g.dtype)
    if isinstance(side, Tensor):
        return g.to(dtype) @ side.to(dtype).T
    out = new(g.shape[0], side.k, dtype=dtype)
    if out.numel() and dtype == torch.float64:
        g, at = aligned("g", unit_stride(in_memory("g", g)))
        library.sketch_wide(at, g.shape, g.stride(), implicit_side(side), address_of(out), torch.get_num_threads())
    elif out.numel():
        rows, _g = matrix("g", g, contiguous_rows=True)
        made = kept_matrices.panels(side) if side.kind == "gaussian" else None
        given = implicit_side(side) if made is None else library.with_panels(implicit_side(side), address_of(made))
        library.sketch(rows, given, address_of(out), torch.get_num_threads())
    return out


def random_matrix(
    side: Side, rows: tuple[int, int], cols: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    out = new(rows[1] - rows[0], cols[1] - cols[0])
    kept_matrices.fill(out, side, rows[0], cols[0])
    out = out.to(dtype)
    return out if side.scale == 1 else out.mul_(side.scale)
