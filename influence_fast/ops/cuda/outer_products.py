"""Products of inputs and output gradients, summed over each sample's tokens and projected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeGuard

import torch
from torch import Tensor

from influence_fast.ops import reference
from influence_fast.ops.arguments import AdamState, Side, address, unit_stride
from influence_fast.ops.cuda import native
from influence_fast.ops.cuda.sketches import ENTRIES, sketch


def outer(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    out = native.empty(x, x.shape[0], dy.shape[2], x.shape[2])
    if not x.numel() or not dy.numel():
        return out.zero_()
    x, dy = unit_stride(x), unit_stride(dy)
    spans = None if spans is None else spans.contiguous()
    native.library.outer(
        x=native.tokens(x),
        dy=native.tokens(dy),
        spans=native.optional_address(spans),
        out=address("out", out),
        **native.where(x),
    )
    return out


def project_outer(
    x: Tensor, dy: Tensor, p_in: Side | Tensor | None, p_out: Side | Tensor | None, spans: Tensor | None
) -> Tensor:
    if _fused(p_in) and _fused(p_out) and x.numel() and dy.numel():
        return project_outer_grouped([(x, dy, p_in, p_out)], spans)[0]
    # Whatever becomes of tokens that do not count, the product does not read it.
    return outer(_projected(x, p_in), _projected(dy, p_out), spans)


def project_outer_grouped(layers: Sequence[tuple[Tensor, Tensor, Side, Side]], spans: Tensor | None) -> list[Tensor]:
    """``project_outer`` of several layers over the same tokens: ``(x, dy, p_in, p_out)`` each, one launch for 16.

    Sides are rademacher or sjlt with at most 128 outputs and 32,768 features, tensors are not empty and share dtype,
    device, samples and tokens: what the kernel is for. Small models are made of many launches otherwise.
    """
    results: list[Tensor] = []
    for begin in range(0, len(layers), native.library.LAYERS_PER_LAUNCH):
        group = layers[begin : begin + native.library.LAYERS_PER_LAUNCH]
        n, t = group[0][0].shape[:2]
        k_in, k_out = max(p_in.k for _, _, p_in, _ in group), max(p_out.k for _, _, _, p_out in group)
        splits = native.library.project_outer_splits(t, k_in, k_out)
        records, keep = [], []
        # Layers with a common input, such as query, key and value, share its copy.
        inputs = {id(tensor): tensor for x, dy, _, _ in group for tensor in (x, dy)}
        readable = {key: unit_stride(tensor) for key, tensor in inputs.items()}
        for x, dy, p_in, p_out in group:
            x, dy = readable[id(x)], readable[id(dy)]
            out = native.empty(x, n, p_out.k, p_in.k)
            parts = native.empty(x, n, splits, p_out.k, p_in.k) if splits > 1 else None
            keep.append(parts)
            results.append(out)
            records.append(
                native.library.Layer(
                    x=native.tokens(x),
                    dy=native.tokens(dy),
                    p_in=native.side(p_in),
                    p_out=native.side(p_out),
                    result=address("out", out),
                    parts=native.optional_address(parts),
                )
            )
        spans = None if spans is None else spans.contiguous()
        native.library.project_outer(
            layers=records,
            spans=native.optional_address(spans),
            row_warps=native.library.project_outer_row_warps(t, k_in, k_out),
            splits=splits,
            **native.where(group[0][0]),
        )
    return results


def sketch_outer(
    x: Tensor,
    dy: Tensor,
    side: Side | Tensor,
    spans: Tensor | None,
    scale: Tensor | None,
    adam: AdamState | None = None,
) -> Tensor:
    n, o, i = x.shape[0], dy.shape[2], x.shape[2]
    if isinstance(side, Tensor) or side.kind != "sjlt" or side.offset or adam is not None:
        # A dense matrix meets every entry of G: that many multiplications dwarf the writing of G, a few samples a time.
        # Adam's formula is not in the kernel either.
        k = side.shape[0] if isinstance(side, Tensor) else side.k
        out = native.empty(x, n, k)
        step = max(1, ENTRIES // max(1, o * i))
        for begin in range(0, n, step):
            rows = slice(begin, begin + step)
            g = outer(x[rows], dy[rows], None if spans is None else spans[rows])
            g = g if scale is None else g * scale.to(g.dtype)
            out[rows] = sketch((g if adam is None else adam.update(g)).flatten(1), side)
        return out
    if x.numel() == 0 or dy.numel() == 0:
        return native.empty(x, n, side.k).zero_()
    if side.scale != 1:
        return sketch_outer(x, dy, replace(side, scale=1.0), spans, scale) * side.scale  # type: ignore[type-var]
    x, dy, out = unit_stride(x), unit_stride(dy), native.empty(x, n, side.k)
    strips = native.library.sketch_outer_strips(i, o)
    parts = native.empty(x, n, strips, side.k) if strips > 1 else None
    spans = None if spans is None else spans.contiguous()
    scale = None if scale is None else scale.detach().to(torch.float32).contiguous()
    native.library.sketch_outer(
        x=native.tokens(x),
        dy=native.tokens(dy),
        spans=native.optional_address(spans),
        side=native.side(side),
        scale=native.optional_address(scale),
        out=address("out", out),
        parts=native.optional_address(parts),
        **native.where(x),
    )
    return out


def score_outer(x: Tensor, dy: Tensor, q: Tensor, spans: Tensor | None) -> Tensor:
    n, o, i, m = x.shape[0], dy.shape[2], x.shape[2], q.shape[0]
    out = native.empty(x, n, m)
    if not out.numel() or not x.numel() or not dy.numel():
        return out.zero_()
    x, dy, q = unit_stride(x), unit_stride(dy), q.to(torch.float32).contiguous()
    spans = None if spans is None else spans.contiguous()
    gradients, parts = native.library.score_outer_scratch(n, i, o, m)
    scratch = native.empty(x, gradients + parts)
    native.library.score_outer(
        x=native.tokens(x),
        dy=native.tokens(dy),
        spans=native.optional_address(spans),
        q=address("q", q),
        queries=m,
        out=address("out", out),
        gradients=address("workspace", scratch),
        parts=address("workspace", scratch[gradients:]),
        **native.where(x),
    )
    return out


def _fused(side: Side | Tensor | None) -> TypeGuard[Side]:
    """Whether the kernel of project_outer takes this side; the others are multiplied one after the other."""
    return (
        side is not None
        and not isinstance(side, Tensor)
        and side.kind in ("rademacher", "sjlt")
        and not side.offset
        and side.k <= native.library.PROJECT_MAX_K
        and side.features <= native.library.PROJECT_MAX_FEATURES
    )


def _projected(x: Tensor, side: Side | Tensor | None) -> Tensor:
    """``x P^T`` in float32; packed tokens are projected once."""
    if x.shape[0] > 1 and x.stride(0) == 0:
        return _projected(x[:1], side).expand(x.shape[0], -1, -1)
    if side is None or isinstance(side, Tensor):
        return reference.project(x.float(), side)
    return sketch(x.flatten(0, 1), side).unflatten(0, x.shape[:2])
