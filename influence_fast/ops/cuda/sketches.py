"""Random matrices, and rows projected by them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from influence_fast.ops import reference
from influence_fast.ops.arguments import Side, address, unit_stride
from influence_fast.ops.cuda import native

# Parts of a sketch, in floats, before its rows are taken in pieces.
_SCRATCH = 1 << 26
# Entries of G, or of a dense random matrix, that exist at a time where a kernel does not spare them.
ENTRIES = 1 << 26


def sketch(g: Tensor, side: Side | Tensor) -> Tensor:
    if isinstance(side, Tensor):
        return reference.sketch(g, side)
    if side.kind == "sjlt" and side.scale != 1:
        # The kernels for it know named sides, whose scale is 1.
        return sketch(g, replace(side, scale=1.0)) * side.scale  # type: ignore[type-var]
    if g.numel() == 0:
        return native.empty(g, g.shape[0], side.k).zero_()
    if side.kind == "sjlt" and side.offset:
        return reference.sketch(g, side)
    if side.kind == "gaussian" or side.offset:
        out = native.empty(g, g.shape[0], side.k).zero_()
        step = max(4, ENTRIES // side.k // 4 * 4)
        for begin in range(0, side.features, step):
            cols = (begin, min(begin + step, side.features))
            out += g[:, cols[0] : cols[1]].float() @ random_matrix(side, (0, side.k), cols, torch.float32, g.device).T
        return out
    g, out = unit_stride(g), native.empty(g, g.shape[0], side.k)
    splits = native.library.sketch_splits(side.kind, side.features, side.k)
    step = g.shape[0] if splits == 1 else min(g.shape[0], max(32, _SCRATCH // (splits * side.k)))
    parts = native.empty(g, splits, step, side.k) if splits > 1 else None
    for begin in range(0, g.shape[0], step):
        rows = g[begin : begin + step]
        native.library.sketch(
            g=native.matrix(rows),
            side=native.side(side),
            out=address("out", out[begin:]),
            parts=native.optional_address(parts),
            **native.where(g),
        )
    return out


def random_matrix(
    side: Side, rows: tuple[int, int], cols: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    out = torch.empty(rows[1] - rows[0], cols[1] - cols[0], dtype=dtype, device=device)
    if out.numel():
        # The kernel knows columns of a key's matrix alone.
        key0, key1 = side.words
        whole = {"kind": side.kind, "key0": key0, "key1": key1, "k": side.k, "scale": side.scale}
        native.library.random_matrix(
            side=native.library.Side(features=side.offset + side.features, **whole),
            row=rows[0],
            rows=out.shape[0],
            column=side.offset + cols[0],
            columns=out.shape[1],
            dtype=native.dtype_name(out),
            out=address("out", out),
            **native.where(out),
        )
    return out
