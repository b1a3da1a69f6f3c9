"""Products of inputs and output gradients, summed over each sample's tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from influence_fast.ops.arguments import AdamState, Side
from influence_fast.ops.triton.launch import NARROW, STRIP, Taken, blocks, device_of, given, power, unit, widened
from influence_fast.ops.triton.sketches import launch_sjlt, matrix, sketch
from influence_fast.ops.triton.tiles import gradient_tile, load_tile, product, side_tile, token_span


@triton.jit
def _project_outer(
    x, dy, spans, side_in, side_out, out, tokens, i, o, k_in, k_out, xn, xt, dn, dt, ld_in, ld_out, scale,
    key_in, key_out, SPANS: tl.constexpr, RANDOM_IN: tl.constexpr, RANDOM_OUT: tl.constexpr,
    WIDEN: tl.constexpr, NARROW: tl.constexpr, TOKENS: tl.constexpr, K_IN: tl.constexpr, K_OUT: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """One sample and one block of outputs: both sides and the outer product, padding skipped."""
    n = tl.program_id(0).to(tl.int64)
    right = tl.program_id(1) * K_IN + tl.arange(0, K_IN)
    left = tl.program_id(2) * K_OUT + tl.arange(0, K_OUT)
    begin, end = token_span(spans, n, tokens, SPANS)
    total = tl.zeros((K_OUT, K_IN), dtype=tl.float32)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inputs = tl.zeros((TOKENS, K_IN), dtype=tl.float32)
        for feature in range(0, i, FEATURES):
            values = load_tile(x + n * xn, token, feature + tl.arange(0, FEATURES), (begin, end), i, xt, WIDEN)
            entries = side_tile(side_in, feature, right, k_in, i, ld_in, key_in, RANDOM_IN, FEATURES)
            inputs += product(values, entries, RANDOM_IN, WIDEN, NARROW)
        outputs = tl.zeros((TOKENS, K_OUT), dtype=tl.float32)
        for feature in range(0, o, FEATURES):
            values = load_tile(dy + n * dn, token, feature + tl.arange(0, FEATURES), (begin, end), o, dt, WIDEN)
            entries = side_tile(side_out, feature, left, k_out, o, ld_out, key_out, RANDOM_OUT, FEATURES)
            outputs += product(values, entries, RANDOM_OUT, WIDEN, NARROW)
        total += tl.dot(tl.trans(outputs), inputs, input_precision="ieee")
    place = (n * k_out + left[:, None]) * k_in + right[None, :]
    tl.store(out + place, total * scale, mask=(left[:, None] < k_out) & (right[None, :] < k_in))


@triton.jit
def _outer(
    x, dy, spans, weight, out, tokens, i, o, first_row, rows, xn, xt, dn, dt,
    SPANS: tl.constexpr, WEIGHT: tl.constexpr, WIDEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows ``[first_row, first_row + rows)`` of each sample's gradient, times ``weight``: ``out (N, rows, i)``."""
    n = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin, end = token_span(spans, n, tokens, SPANS)
    total = gradient_tile(x, dy, n, begin, end, first_row + row, column, i, o, xn, xt, dn, dt, WIDEN, TOKENS, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < i)
    if WEIGHT:
        place = (first_row + row[:, None]).to(tl.int64) * i + column[None, :]
        total *= tl.load(weight + place, mask=inside, other=0.0)
    tl.store(out + (n * rows + row[:, None]) * i + column[None, :], total, mask=inside)


@triton.jit
def _score(
    x, dy, spans, q, out, tokens, i, o, m, samples, xn, xt, dn, dt,
    SPANS: tl.constexpr, WIDEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[tile, n, j]``: a tile of the gradient times the same tile of every query."""
    n = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin, end = token_span(spans, n, tokens, SPANS)
    total = gradient_tile(x, dy, n, begin, end, row, column, i, o, xn, xt, dn, dt, WIDEN, TOKENS, BLOCK)
    inside = (row[:, None] < o) & (column[None, :] < i)
    tile = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    for j in range(m):
        place = (j * o + row[:, None]).to(tl.int64) * i + column[None, :]
        query = tl.load(q + place, mask=inside, other=0.0)
        tl.store(out + (tile * samples + n) * m + j, tl.sum(total * query))


def outer(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    x, dy = unit(x), unit(dy)
    out = torch.empty(x.shape[0], dy.shape[2], x.shape[2], dtype=torch.float32, device=x.device)
    _launch_outer(x, dy, spans, None, out, 0)
    return out


def project_outer(
    x: Tensor, dy: Tensor, p_in: Side | Tensor | None, p_out: Side | Tensor | None, spans: Tensor | None
) -> Tensor:
    n, t, i, o = *x.shape, dy.shape[2]
    if _fused(p_in) and _fused(p_out) and n:
        x, dy = unit(x), unit(dy)
        right, left = Taken(p_in, x), Taken(p_out, x)
        out = torch.empty(n, left.k, right.k, dtype=torch.float32, device=x.device)
        k_in, k_out = power(right.k, 16, 64), power(left.k, 16, 64)
        grid = (n, blocks(right.k, k_in), blocks(left.k, k_out))
        # Signs are exact in every dtype, the entries of a dense matrix are not.
        widen = widened(x) or not (right.random and left.random)
        with device_of(x):
            _project_outer[grid](
                x, dy, given(spans, x), right.dense, left.dense, out, t, i, o, right.k, left.k, *x.stride()[:2],
                *dy.stride()[:2], right.ld, left.ld, right.scale * left.scale, right.key, left.key, spans is not None,
                right.random, left.random, widen, NARROW, 16, k_in, k_out, 128, num_warps=8,
            )  # fmt: skip
        return out
    # Identity, Gaussian and sparse sides: each side by itself, tokens that do not count left out of the product.
    return outer(_one_side(x, p_in, spans), _one_side(dy, p_out, spans), spans)


def sketch_outer(
    x: Tensor,
    dy: Tensor,
    side: Side | Tensor,
    spans: Tensor | None,
    scale: Tensor | None,
    adam: AdamState | None = None,
) -> Tensor:
    """Strips of whole rows of G are made, weighted and sketched while they are in the L2 cache."""
    n, i, o = x.shape[0], x.shape[2], dy.shape[2]
    k = side.shape[0] if isinstance(side, Tensor) else side.k
    out = torch.zeros(n, k, dtype=torch.float32, device=x.device)
    if not out.numel() or not i * o:
        return out
    x, dy = unit(x), unit(dy)
    scale = None if scale is None else scale.detach().to(torch.float32).contiguous()
    rows = max(1, min(o, STRIP // (n * i)))
    for first in range(0, o, rows):
        count = min(rows, o - first)
        strip = torch.empty(n, count, i, dtype=torch.float32, device=x.device)
        _launch_outer(x, dy, spans, scale, strip, first)
        if adam is not None:
            strip = adam.update(strip, slice(first, first + count))
        begin, end = first * i, (first + count) * i
        if isinstance(side, Tensor):
            out += strip.flatten(1) @ side[:, begin:end].to(torch.float32).T
        elif side.kind == "sjlt":
            launch_sjlt(strip.flatten(1), side, begin, end, out, parts=1, add=True)
        else:
            out += strip.flatten(1) @ matrix(side, begin, end, x.device).T
    return out * side.scale if not isinstance(side, Tensor) and side.kind == "sjlt" and side.scale != 1 else out


def score_outer(x: Tensor, dy: Tensor, q: Tensor, spans: Tensor | None) -> Tensor:
    n, t, i, o, m = *x.shape, dy.shape[2], len(q)
    x, dy = unit(x), unit(dy)
    block = _tile(x, i, o)
    grid = (blocks(i, block), blocks(o, block), n)
    parts = torch.zeros(max(1, grid[0] * grid[1]), n, m, dtype=torch.float32, device=x.device)
    if n * m * i * o:
        with device_of(x):
            _score[grid](
                x, dy, given(spans, x), q.to(torch.float32).contiguous(), parts, t, i, o, m, n, *x.stride()[:2],
                *dy.stride()[:2], spans is not None, widened(x), 16, block,
            )  # fmt: skip
    return parts.sum(0)


def _fused(side: Side | Tensor | None) -> bool:
    return isinstance(side, Tensor) or (side is not None and side.kind == "rademacher" and not side.offset)


def _one_side(x: Tensor, side: Side | Tensor | None, spans: Tensor | None) -> Tensor:
    if side is None:
        return x.to(torch.float32)
    if x.stride(0) == 0 and len(x) > 1:
        return _one_side(x[:1], side, None).expand(len(x), -1, -1)
    if spans is not None:
        token = torch.arange(x.shape[1], device=x.device)
        live = (token >= spans[:, :1]) & (token < spans[:, 1:])
        x = torch.where(live[..., None], x, 0)
    k = side.shape[0] if isinstance(side, Tensor) else side.k
    return sketch(x.flatten(0, 1), side).view(*x.shape[:2], k)


def _tile(x: Tensor, i: int, rows: int) -> int:
    """Rows and columns of a tile of G: 64 of 16-bit inputs are loaded 16 bytes at a time, and each from L2 half as often."""
    return 64 if x.element_size() == 2 and min(i, rows) >= 64 else 32


def _launch_outer(x: Tensor, dy: Tensor, spans: Tensor | None, weight: Tensor | None, out: Tensor, first: int) -> None:
    n, rows, i = out.shape
    block = _tile(x, i, rows)
    if out.numel():
        with device_of(x):
            _outer[blocks(i, block), blocks(rows, block), n](
                x, dy, given(spans, x), given(weight, x), out, x.shape[1], i, dy.shape[2], first, rows, *x.stride()[:2],
                *dy.stride()[:2], spans is not None, weight is not None, widened(x), 16, block,
            )  # fmt: skip
