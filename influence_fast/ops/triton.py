"""Triton kernels: on a GPU, or on the CPU through Triton's interpreter (``TRITON_INTERPRET=1`` before the import).

Nothing is added atomically: each program owns what it writes, and parts of a sum are added in a fixed order, so two
runs give the same bits. float32 products are IEEE, not TF32; float16 and bfloat16 go to the tensor cores as they are and
are summed in float32. Offsets are 64-bit. Work runs on the current stream of the tensors' device.

Where the time goes, for N samples, T tokens, i inputs, o outputs, on a GPU: ``project_outer`` reads ``N T (i + o)`` numbers
once (memory-bound up to k of about 128); ``sketch`` reads ``N D`` once, plus 2 k FLOPs per number for dense kinds;
``sketch_outer`` does ``2 N T i o`` FLOPs, its strips of G stay in the L2 cache; ``score_outer`` does ``2 N (T + m) i o``;
``ghost_dot`` ``2 Na Nb Ta Tb (i + o)``.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

from influence_fast.ops.arguments import AdamState, Side

try:
    import triton
    import triton.language as tl
except ImportError as error:
    _missing: str | None = f"triton is not installed ({error})"
else:
    _missing = None

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Entries of a strip of G: 16 MiB of float32, which stays in the L2 cache between being made and being sketched.
_STRIP = 1 << 22
# Programs that a sum over features is cut into at most.
_PARTS = 64


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if _missing is not None:
        return _missing
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, not {dtype}"
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRETED):
        return f"it works on tensors on a GPU, not on {device.type} (or anywhere under TRITON_INTERPRET=1)"
    return None


if _missing is None:

    @triton.jit
    def _tile(pointer, row, column, rows, columns, stride_row, WIDEN: tl.constexpr):
        """``[row, column]`` of a matrix with unit column stride, 0 outside ``rows`` x ``columns`` (begin, end)."""
        inside = (row[:, None] >= rows[0]) & (row[:, None] < rows[1]) & (column[None, :] < columns)
        values = tl.load(pointer + row[:, None].to(tl.int64) * stride_row + column[None, :], mask=inside, other=0.0)
        return values.to(tl.float32) if WIDEN else values

    @triton.jit
    def _signs(feature, row, key, FEATURES: tl.constexpr):
        """+-1 of 128 aligned features by ``row``: one Philox output holds a row's 128 signs."""
        zero = row * 0
        w = (zero + feature // FEATURES).to(tl.uint32)
        x0, x1, x2, x3 = tl.philox(key, w, row.to(tl.uint32), zero.to(tl.uint32), zero.to(tl.uint32))
        lane = tl.arange(0, FEATURES)[:, None]
        low = tl.where(lane < 32, x0[None, :], x1[None, :])
        high = tl.where(lane < 96, x2[None, :], x3[None, :])
        word = tl.where(lane < 64, low, high)
        bit = (word >> (lane % 32).to(tl.uint32)) & 1
        return tl.where(bit != 0, 1.0, -1.0)

    @triton.jit
    def _entries(side, feature, row, k, features, ld, key, RANDOM: tl.constexpr, FEATURES: tl.constexpr):
        """``P^T`` of 128 features by some rows, float32: random signs, or a dense matrix from memory."""
        if RANDOM:
            return _signs(feature, row, key, FEATURES)
        column = feature + tl.arange(0, FEATURES)
        inside = (column[:, None] < features) & (row[None, :] < k)
        return tl.load(side + row[None, :].to(tl.int64) * ld + column[:, None], mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _project(
        x, side, out, rows, features, k, stride, ld, per_part, scale, key,
        RANDOM: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, FEATURES: tl.constexpr,
    ):  # fmt: skip
        """``out[part] = x P^T`` over the part's features: ``x (rows, features)``, ``out (parts, rows, k)``."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        output = tl.program_id(1) * K + tl.arange(0, K)
        part = tl.program_id(2)
        total = tl.zeros((ROWS, K), dtype=tl.float32)
        for step in range(per_part):
            feature = (part * per_part + step).to(tl.int64) * FEATURES
            values = _tile(x, row, feature + tl.arange(0, FEATURES), (0, rows), features, stride, WIDEN)
            entries = _entries(side, feature, output, k, features, ld, key, RANDOM, FEATURES)
            total += tl.dot(values, entries.to(values.dtype), input_precision="ieee")
        place = (part.to(tl.int64) * rows + row[:, None]) * k + output[None, :]
        tl.store(out + place, total * scale, mask=(row[:, None] < rows) & (output[None, :] < k))

    @triton.jit
    def _span(spans, n, tokens, SPANS: tl.constexpr):
        if SPANS:
            begin, end = tl.load(spans + 2 * n), tl.load(spans + 2 * n + 1)
        else:
            begin, end = n * 0, n * 0 + tokens
        return begin, end

    @triton.jit
    def _project_outer(
        x, dy, spans, side_in, side_out, out, tokens, i, o, k_in, k_out, xn, xt, dn, dt, ld_in, ld_out, scale,
        key_in, key_out, SPANS: tl.constexpr, RANDOM_IN: tl.constexpr, RANDOM_OUT: tl.constexpr,
        WIDEN: tl.constexpr, TOKENS: tl.constexpr, K_IN: tl.constexpr, K_OUT: tl.constexpr, FEATURES: tl.constexpr,
    ):  # fmt: skip
        """One sample and one block of outputs: both sides and the outer product, padding skipped."""
        n = tl.program_id(0).to(tl.int64)
        right = tl.program_id(1) * K_IN + tl.arange(0, K_IN)
        left = tl.program_id(2) * K_OUT + tl.arange(0, K_OUT)
        begin, end = _span(spans, n, tokens, SPANS)
        total = tl.zeros((K_OUT, K_IN), dtype=tl.float32)
        for first in range(begin, end, TOKENS):
            token = first + tl.arange(0, TOKENS)
            inputs = tl.zeros((TOKENS, K_IN), dtype=tl.float32)
            for feature in range(0, i, FEATURES):
                values = _tile(x + n * xn, token, feature + tl.arange(0, FEATURES), (begin, end), i, xt, WIDEN)
                entries = _entries(side_in, feature, right, k_in, i, ld_in, key_in, RANDOM_IN, FEATURES)
                inputs += tl.dot(values, entries.to(values.dtype), input_precision="ieee")
            outputs = tl.zeros((TOKENS, K_OUT), dtype=tl.float32)
            for feature in range(0, o, FEATURES):
                values = _tile(dy + n * dn, token, feature + tl.arange(0, FEATURES), (begin, end), o, dt, WIDEN)
                entries = _entries(side_out, feature, left, k_out, o, ld_out, key_out, RANDOM_OUT, FEATURES)
                outputs += tl.dot(values, entries.to(values.dtype), input_precision="ieee")
            total += tl.dot(tl.trans(outputs), inputs, input_precision="ieee")
        place = (n * k_out + left[:, None]) * k_in + right[None, :]
        tl.store(out + place, total * scale, mask=(left[:, None] < k_out) & (right[None, :] < k_in))

    @triton.jit
    def _gradient(
        x, dy, n, begin, end, row, column, i, o, xn, xt, dn, dt,
        WIDEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A tile of one sample's gradient: ``sum_t dy[t, row] x[t, column]``."""
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for first in range(begin, end, TOKENS):
            token = first + tl.arange(0, TOKENS)
            left = _tile(dy + n * dn, token, row, (begin, end), o, dt, WIDEN)
            right = _tile(x + n * xn, token, column, (begin, end), i, xt, WIDEN)
            total += tl.dot(tl.trans(left), right, input_precision="ieee")
        return total

    @triton.jit
    def _outer(
        x, dy, spans, weight, out, tokens, i, o, first_row, rows, xn, xt, dn, dt,
        SPANS: tl.constexpr, WEIGHT: tl.constexpr, WIDEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Rows ``[first_row, first_row + rows)`` of each sample's gradient, times ``weight``: ``out (N, rows, i)``."""
        n = tl.program_id(2).to(tl.int64)
        row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        begin, end = _span(spans, n, tokens, SPANS)
        total = _gradient(x, dy, n, begin, end, first_row + row, column, i, o, xn, xt, dn, dt, WIDEN, TOKENS, BLOCK)
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
        begin, end = _span(spans, n, tokens, SPANS)
        total = _gradient(x, dy, n, begin, end, row, column, i, o, xn, xt, dn, dt, WIDEN, TOKENS, BLOCK)
        inside = (row[:, None] < o) & (column[None, :] < i)
        tile = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        for j in range(m):
            place = (j * o + row[:, None]).to(tl.int64) * i + column[None, :]
            query = tl.load(q + place, mask=inside, other=0.0)
            tl.store(out + (tile * samples + n) * m + j, tl.sum(total * query))

    @triton.jit
    def _inner(
        a, b, na, nb, token_a, token_b, span_a, span_b, features, an, at, bn, bt,
        WIDEN: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
    ):  # fmt: skip
        """``a[token_a] . b[token_b]`` for all pairs of two blocks of tokens."""
        total = tl.zeros((TOKENS, TOKENS), dtype=tl.float32)
        for first in range(0, features, FEATURES):
            feature = first + tl.arange(0, FEATURES)
            left = _tile(a + na * an, token_a, feature, span_a, features, at, WIDEN)
            right = _tile(b + nb * bn, token_b, feature, span_b, features, bt, WIDEN)
            total += tl.dot(left, tl.trans(right), input_precision="ieee")
        return total

    @triton.jit
    def _ghost(
        xa, dya, xb, dyb, spans_a, spans_b, out, tokens_a, tokens_b, i, o, samples_b,
        xan, xat, dan, dat, xbn, xbt, dbn, dbt, SPANS_A: tl.constexpr, SPANS_B: tl.constexpr, PAIRED: tl.constexpr,
        WIDEN: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
    ):  # fmt: skip
        """``<G_a, G_b> = sum over token pairs of (xa . xb)(dya . dyb)``; ``PAIRED`` takes sample n with sample n alone."""
        na = tl.program_id(0).to(tl.int64)
        nb = na if PAIRED else tl.program_id(1).to(tl.int64)
        begin_a, end_a = _span(spans_a, na, tokens_a, SPANS_A)
        begin_b, end_b = _span(spans_b, nb, tokens_b, SPANS_B)
        total = tl.zeros((TOKENS, TOKENS), dtype=tl.float32)
        for first_a in range(begin_a, end_a, TOKENS):
            token_a = first_a + tl.arange(0, TOKENS)
            for first_b in range(begin_b, end_b, TOKENS):
                token_b = first_b + tl.arange(0, TOKENS)
                inputs = _inner(
                    xa, xb, na, nb, token_a, token_b, (begin_a, end_a), (begin_b, end_b), i, xan, xat, xbn, xbt,
                    WIDEN, TOKENS, FEATURES,
                )  # fmt: skip
                outputs = _inner(
                    dya, dyb, na, nb, token_a, token_b, (begin_a, end_a), (begin_b, end_b), o, dan, dat, dbn, dbt,
                    WIDEN, TOKENS, FEATURES,
                )  # fmt: skip
                total += inputs * outputs
        place = na if PAIRED else na * samples_b + nb
        tl.store(out + place, tl.sum(total))

    @triton.jit
    def _sjlt(
        g, out, rows, first, last, k, stride, key, per_part, ADD: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        """Features ``[first, last)`` of every row, gathered by output: ``out (parts, rows, k)``, or added to it.

        Feature f is read from ``g[row, f - first]``. Chunk c of k features reaches output r from its lane
        ``(r - rotation) mod k``, so a block of outputs reads at most two contiguous runs of every chunk.
        """
        output = tl.program_id(0) * K + tl.arange(0, K)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        part = tl.program_id(2)
        zero = output * 0
        total = tl.zeros((ROWS, K), dtype=tl.float32)
        for step in range(per_part):
            chunk = first // k + part * per_part + step
            quad = (zero + chunk // 4).to(tl.int64)
            low, high = (quad & 0xFFFFFFFF).to(tl.uint32), (quad >> 32).to(tl.uint32)
            x0, x1, x2, x3 = tl.philox(key, low, high, (zero + 2).to(tl.uint32), zero.to(tl.uint32))
            place = chunk % 4
            word = tl.where(place < 2, tl.where(place == 0, x0, x1), tl.where(place == 2, x2, x3))
            rotation = tl.umulhi(word, (zero + k).to(tl.uint32)).to(tl.int64)
            lane = (output - rotation + k) % k
            feature = chunk.to(tl.int64) * k + lane
            w = feature // 128
            low, high = (w & 0xFFFFFFFF).to(tl.uint32), (w >> 32).to(tl.uint32)
            x0, x1, x2, x3 = tl.philox(key, low, high, (zero + 1).to(tl.uint32), zero.to(tl.uint32))
            which = (feature % 128) // 32
            word = tl.where(which < 2, tl.where(which == 0, x0, x1), tl.where(which == 2, x2, x3))
            sign = tl.where(((word >> (feature % 32).to(tl.uint32)) & 1) != 0, 1.0, -1.0)
            inside = (output < k) & (feature >= first) & (feature < last)
            mask = (row[:, None] < rows) & inside[None, :]
            values = tl.load(g + row[:, None].to(tl.int64) * stride + (feature - first)[None, :], mask=mask, other=0.0)
            total += values.to(tl.float32) * sign[None, :]
        place = (part.to(tl.int64) * rows + row[:, None]) * k + output[None, :]
        mask = (row[:, None] < rows) & (output[None, :] < k)
        if ADD:
            total += tl.load(out + place, mask=mask, other=0.0)
        tl.store(out + place, total, mask=mask)


def outer(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    x, dy = _unit(x), _unit(dy)
    out = torch.empty(x.shape[0], dy.shape[2], x.shape[2], dtype=torch.float32, device=x.device)
    _launch_outer(x, dy, spans, None, out, 0)
    return out


def project_outer(
    x: Tensor, dy: Tensor, p_in: Side | Tensor | None, p_out: Side | Tensor | None, spans: Tensor | None
) -> Tensor:
    n, t, i, o = *x.shape, dy.shape[2]
    if _fused(p_in) and _fused(p_out) and n:
        x, dy = _unit(x), _unit(dy)
        right, left = _Taken(p_in, x), _Taken(p_out, x)
        out = torch.empty(n, left.k, right.k, dtype=torch.float32, device=x.device)
        k_in, k_out = _power(right.k, 16, 64), _power(left.k, 16, 64)
        grid = (n, _blocks(right.k, k_in), _blocks(left.k, k_out))
        # Signs are exact in every dtype, the entries of a dense matrix are not.
        widen = _widen(x) or not (right.random and left.random)
        with _device(x):
            _project_outer[grid](
                x, dy, _or(spans, x), right.dense, left.dense, out, t, i, o, right.k, left.k, *x.stride()[:2],
                *dy.stride()[:2], right.ld, left.ld, right.scale * left.scale, right.key, left.key, spans is not None,
                right.random, left.random, widen, 16, k_in, k_out, 128,
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
    x, dy = _unit(x), _unit(dy)
    scale = None if scale is None else scale.detach().to(torch.float32).contiguous()
    rows = max(1, min(o, _STRIP // (n * i)))
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
            _launch_sjlt(strip.flatten(1), side, begin, end, out, parts=1, add=True)
        else:
            out += strip.flatten(1) @ _matrix(side, begin, end, x.device).T
    return out * side.scale if not isinstance(side, Tensor) and side.kind == "sjlt" and side.scale != 1 else out


def score_outer(x: Tensor, dy: Tensor, q: Tensor, spans: Tensor | None) -> Tensor:
    n, t, i, o, m = *x.shape, dy.shape[2], len(q)
    x, dy = _unit(x), _unit(dy)
    grid = (_blocks(i, 32), _blocks(o, 32), n)
    parts = torch.zeros(max(1, grid[0] * grid[1]), n, m, dtype=torch.float32, device=x.device)
    if n * m * i * o:
        with _device(x):
            _score[grid](
                x, dy, _or(spans, x), q.to(torch.float32).contiguous(), parts, t, i, o, m, n, *x.stride()[:2],
                *dy.stride()[:2], spans is not None, _widen(x), 16, 32,
            )  # fmt: skip
    return parts.sum(0)


def ghost_dot(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None
) -> Tensor:
    return _launch_ghost(xa, dya, xb, dyb, spans_a, spans_b, paired=False)


def ghost_norm(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    return _launch_ghost(x, dy, x, dy, spans, spans, paired=True).clamp_min(0).sqrt()


def sketch(g: Tensor, side: Side | Tensor) -> Tensor:
    g = _unit(g)
    n, d = g.shape
    if isinstance(side, Tensor) or side.kind == "gaussian" or (side.kind == "rademacher" and side.offset):
        k = side.shape[0] if isinstance(side, Tensor) else side.k
        out = torch.zeros(n, k, dtype=torch.float32, device=g.device)
        step = max(1, _STRIP // k)
        for begin in range(0, d, step):
            end = min(begin + step, d)
            part = side[:, begin:end].float() if isinstance(side, Tensor) else _matrix(side, begin, end, g.device)
            out += g[:, begin:end].float() @ part.T
        return out
    if not n:
        return torch.empty(0, side.k, dtype=torch.float32, device=g.device)
    if side.kind == "sjlt":
        found = _launch_sjlt(g, side, 0, d, None, parts=min(_PARTS, _blocks(d, side.k)), add=False)
        return found * side.scale if side.scale != 1 else found
    steps = _blocks(d, 128)
    parts = min(_PARTS, steps)
    per_part = _blocks(steps, parts)
    out = torch.empty(parts, n, side.k, dtype=torch.float32, device=g.device)
    rows, k = 16, _power(side.k, 16, 64)
    chosen = _Taken(side, g)
    with _device(g):
        _project[(_blocks(n, rows), _blocks(side.k, k), parts)](
            g, g, out, n, d, side.k, g.stride(0), 0, per_part, chosen.scale, chosen.key, True, _widen(g), rows, k, 128
        )
    return out.sum(0)


class _Taken:
    """What a fused kernel takes for a Rademacher side or a dense matrix."""

    def __init__(self, side: Side | Tensor | None, like: Tensor) -> None:
        if isinstance(side, Tensor):
            self.dense = side.to(torch.float32).contiguous()
            self.k, self.ld, self.scale, self.key, self.random = side.shape[0], side.shape[1], 1.0, 0, False
        elif side is not None:
            key = side.words
            self.dense, self.ld, self.random = like, 0, True
            self.k, self.scale = side.k, side.scale
            self.key = key[0] | key[1] << 32
            self.key -= (self.key >> 63) << 64  # as a signed 64-bit argument


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


def _matrix(side: Side, begin: int, end: int, device: torch.device) -> Tensor:
    from influence_fast.ops import reference

    return reference.random_matrix(side, (0, side.k), (begin, end), torch.float32, device)


def _launch_outer(x: Tensor, dy: Tensor, spans: Tensor | None, weight: Tensor | None, out: Tensor, first: int) -> None:
    n, rows, i = out.shape
    if out.numel():
        with _device(x):
            _outer[_blocks(i, 32), _blocks(rows, 32), n](
                x, dy, _or(spans, x), _or(weight, x), out, x.shape[1], i, dy.shape[2], first, rows, *x.stride()[:2],
                *dy.stride()[:2], spans is not None, weight is not None, _widen(x), 16, 32,
            )  # fmt: skip


def _launch_sjlt(g: Tensor, side: Side, first: int, last: int, out: Tensor | None, parts: int, add: bool) -> Tensor:
    n, k = len(g), side.k
    first, last = side.offset + first, side.offset + last
    chunks = _blocks(last, k) - first // k
    per_part = _blocks(chunks, parts)
    found = torch.empty(parts, n, k, dtype=torch.float32, device=g.device) if out is None else out
    key = _Taken(side, g).key
    rows, block = min(16, _power(n, 1, 16)), _power(k, 16, 128)
    with _device(g):
        _sjlt[_blocks(k, block), _blocks(n, rows), parts](
            g, found, n, first, last, k, g.stride(0), key, per_part, add, rows, block
        )
    return found.sum(0) if out is None else found


def _launch_ghost(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None, paired: bool
) -> Tensor:
    na, nb, i, o = len(xa), len(xb), xa.shape[2], dya.shape[2]
    xa, dya, xb, dyb = (_unit(tensor) for tensor in (xa, dya, xb, dyb))
    out = torch.empty((na,) if paired else (na, nb), dtype=torch.float32, device=xa.device)
    if out.numel():
        with _device(xa):
            _ghost[(na,) if paired else (na, nb)](
                xa, dya, xb, dyb, _or(spans_a, xa), _or(spans_b, xa), out, xa.shape[1], xb.shape[1], i, o, nb,
                *xa.stride()[:2], *dya.stride()[:2], *xb.stride()[:2], *dyb.stride()[:2], spans_a is not None,
                spans_b is not None, paired, _widen(xa), 16, 64,
            )  # fmt: skip
    return out


def _unit(x: Tensor) -> Tensor:
    """``x`` with a last stride of one; a packed batch stays views of the same tokens."""
    if x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    if x.dim() == 3 and x.stride(0) == 0:
        return x[:1].contiguous().expand(x.shape)
    return x.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is needed even where it is not read."""
    return other if tensor is None else tensor


def _widen(x: Tensor) -> bool:
    # The interpreter multiplies bfloat16 wrongly.
    return x.dtype == torch.float32 or _INTERPRETED


def _power(value: int, least: int, most: int) -> int:
    return max(least, min(most, 1 << (value - 1).bit_length()))


def _blocks(value: int, block: int) -> int:
    return -(-value // block)


def _device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
