"""Products of inputs and output gradients, summed over each sample's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.ops.arguments import AdamState, Side, accumulator
from influence_fast.ops.reference.sketches import ENTRIES, sketch


def live(x: Tensor, spans: Tensor | None) -> Tensor:
    """``x`` in the accumulator's dtype with the tokens outside each span replaced by zeros (they may be anything)."""
    x = x.to(accumulator(x.dtype))
    if spans is None:
        return x
    token = torch.arange(x.shape[1], device=x.device)
    live = (token >= spans[:, :1]) & (token < spans[:, 1:])
    return torch.where(live[..., None], x, 0)


def outer(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    return live(dy, spans).mT @ live(x, spans)


def project_outer(
    x: Tensor, dy: Tensor, p_in: Side | Tensor | None, p_out: Side | Tensor | None, spans: Tensor | None
) -> Tensor:
    return project(live(dy, spans), p_out).mT @ project(live(x, spans), p_in)


def project(x: Tensor, side: Side | Tensor | None) -> Tensor:
    """``x P^T`` along the last dimension."""
    if side is None:
        return x
    if isinstance(side, Tensor):
        return x @ side.to(x.dtype).T
    return sketch(x.flatten(0, -2), side).unflatten(0, x.shape[:-1])


def sketch_outer(
    x: Tensor,
    dy: Tensor,
    side: Side | Tensor,
    spans: Tensor | None,
    scale: Tensor | None,
    adam: AdamState | None = None,
) -> Tensor:
    out = x.new_empty(x.shape[0], side.shape[0] if isinstance(side, Tensor) else side.k, dtype=accumulator(x.dtype))
    step = max(1, ENTRIES // max(1, x.shape[-1] * dy.shape[-1]))
    for begin in range(0, x.shape[0], step):
        rows = slice(begin, begin + step)
        gradient = outer(x[rows], dy[rows], None if spans is None else spans[rows])
        if scale is not None:
            gradient = gradient * scale.to(gradient.dtype)
        if adam is not None:
            gradient = adam.update(gradient)
        out[rows] = sketch(gradient.flatten(1), side)
    return out


def score_outer(x: Tensor, dy: Tensor, q: Tensor, spans: Tensor | None) -> Tensor:
    x, dy = live(x, spans), live(dy, spans)
    q = q.to(x.dtype)
    return torch.stack([((dy @ weight) * x).sum((1, 2)) for weight in q], 1) if len(q) else x.new_zeros(len(x), 0)


def ghost_dot(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None
) -> Tensor:
    xa, dya, xb, dyb = live(xa, spans_a), live(dya, spans_a), live(xb, spans_b), live(dyb, spans_b)
    out = xa.new_empty(len(xa), len(xb))
    for i in range(len(xa)):
        out[i] = ((xb @ xa[i].T) * (dyb @ dya[i].T)).sum((1, 2))
    return out


def ghost_norm(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    x, dy = live(x, spans), live(dy, spans)
    return ((x @ x.mT) * (dy @ dy.mT)).sum((1, 2)).clamp_min(0).sqrt()
