"""Every operation in plain torch: any device, any dtype. The oracle of the kernels, and what runs where none is built.

Arguments arrive checked and normalised by ``ops/__init__.py``: ``x (N, T, i)`` and ``dy (N, T, o)``, ``spans`` either
None or an int64 ``(N, 2)`` of the token range ``[begin, end)`` that counts in each sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.ops import philox
from influence_fast.ops.arguments import AdamState, Side, accumulator, not_finite

_COLUMNS = 1 << 15
_ENTRIES = 1 << 24


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``op`` cannot run here, or None: the reference always can."""
    return None


def _live(x: Tensor, spans: Tensor | None) -> Tensor:
    """``x`` in the accumulator's dtype with the tokens outside each span replaced by zeros (they may be anything)."""
    x = x.to(accumulator(x.dtype))
    if spans is None:
        return x
    token = torch.arange(x.shape[1], device=x.device)
    live = (token >= spans[:, :1]) & (token < spans[:, 1:])
    return torch.where(live[..., None], x, 0)


def outer(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    return _live(dy, spans).mT @ _live(x, spans)


def project_outer(
    x: Tensor, dy: Tensor, p_in: Side | Tensor | None, p_out: Side | Tensor | None, spans: Tensor | None
) -> Tensor:
    return project(_live(dy, spans), p_out).mT @ project(_live(x, spans), p_in)


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
    step = max(1, _ENTRIES // max(1, x.shape[-1] * dy.shape[-1]))
    for begin in range(0, x.shape[0], step):
        rows = slice(begin, begin + step)
        gradient = outer(x[rows], dy[rows], None if spans is None else spans[rows])
        if scale is not None:
            gradient = gradient * scale.to(gradient.dtype)
        if adam is not None:
            gradient = adam.update(gradient)
        out[rows] = sketch(gradient.flatten(1), side)
    return out


def sketch(g: Tensor, side: Side | Tensor) -> Tensor:
    dtype = accumulator(g.dtype)
    if isinstance(side, Tensor):
        return g.to(dtype) @ side.to(dtype).T
    out = g.new_zeros(g.shape[0], side.k, dtype=dtype)
    step = _COLUMNS if side.kind == "sjlt" else max(128, _ENTRIES // side.k // 128 * 128)
    for begin in range(0, side.features, step):
        end = min(begin + step, side.features)
        piece = g[:, begin:end].to(dtype)
        if side.kind == "sjlt":
            index, sign = philox.sjlt(side.words, side.k, _columns(side, (begin, end)), g.device)
            out.index_add_(1, index, piece * sign)
        else:
            out += piece @ random_matrix(side, (0, side.k), (begin, end), dtype, g.device).T
    return out * side.scale if side.kind == "sjlt" and side.scale != 1 else out


def score_outer(x: Tensor, dy: Tensor, q: Tensor, spans: Tensor | None) -> Tensor:
    x, dy = _live(x, spans), _live(dy, spans)
    q = q.to(x.dtype)
    return torch.stack([((dy @ weight) * x).sum((1, 2)) for weight in q], 1) if len(q) else x.new_zeros(len(x), 0)


def ghost_dot(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None
) -> Tensor:
    xa, dya, xb, dyb = _live(xa, spans_a), _live(dya, spans_a), _live(xb, spans_b), _live(dyb, spans_b)
    out = xa.new_empty(len(xa), len(xb))
    for i in range(len(xa)):
        out[i] = ((xb @ xa[i].T) * (dyb @ dya[i].T)).sum((1, 2))
    return out


def ghost_norm(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    x, dy = _live(x, spans), _live(dy, spans)
    return ((x @ x.mT) * (dy @ dy.mT)).sum((1, 2)).clamp_min(0).sqrt()


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
