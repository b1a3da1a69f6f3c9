"""What the kernels are made of: tiles of matrices, a sample's tokens, entries of a random matrix."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, row, column, rows, columns, stride_row, WIDEN: tl.constexpr):
    """``[row, column]`` of a matrix with unit column stride, 0 outside ``rows`` x ``columns`` (begin, end)."""
    inside = (row[:, None] >= rows[0]) & (row[:, None] < rows[1]) & (column[None, :] < columns)
    values = tl.load(pointer + row[:, None].to(tl.int64) * stride_row + column[None, :], mask=inside, other=0.0)
    return values.to(tl.float32) if WIDEN else values


@triton.jit
def token_span(spans, n, tokens, SPANS: tl.constexpr):
    if SPANS:
        begin, end = tl.load(spans + 2 * n), tl.load(spans + 2 * n + 1)
    else:
        begin, end = n * 0, n * 0 + tokens
    return begin, end


@triton.jit
def sign_tile(feature, row, key, FEATURES: tl.constexpr):
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
def side_tile(side, feature, row, k, features, ld, key, RANDOM: tl.constexpr, FEATURES: tl.constexpr):
    """``P^T`` of 128 features by some rows, float32: random signs, or a dense matrix from memory."""
    if RANDOM:
        return sign_tile(feature, row, key, FEATURES)
    column = feature + tl.arange(0, FEATURES)
    inside = (column[:, None] < features) & (row[None, :] < k)
    return tl.load(side + row[None, :].to(tl.int64) * ld + column[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _head(values):
    """The upper half of each float32: what bfloat16 holds of it, exactly."""
    return (values.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def product(values, entries, RANDOM: tl.constexpr, WIDEN: tl.constexpr, NARROW: tl.constexpr):
    """``values @ entries``, summed in float32.

    Where entries are +1 and -1, float32 values are taken as three parts of 8 bits that add up to them: products of those are
    exact in bfloat16, so that tensor cores can make them. Products in float32 take so many registers that some are spilled.
    """
    if RANDOM and WIDEN:
        PART: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
        signs = entries.to(PART)
        head = _head(values)
        middle = _head(values - head)
        low = values - head - middle
        total = tl.dot(low.to(PART), signs, input_precision="ieee")
        total = tl.dot(middle.to(PART), signs, total, input_precision="ieee")
        return tl.dot(head.to(PART), signs, total, input_precision="ieee")
    else:
        return tl.dot(values, entries.to(values.dtype), input_precision="ieee")


@triton.jit
def gradient_tile(
    x, dy, n, begin, end, row, column, i, o, xn, xt, dn, dt,
    WIDEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of one sample's gradient: ``sum_t dy[t, row] x[t, column]``."""
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        left = load_tile(dy + n * dn, token, row, (begin, end), o, dt, WIDEN)
        right = load_tile(x + n * xn, token, column, (begin, end), i, xt, WIDEN)
        total += tl.dot(tl.trans(left), right, input_precision="ieee")
    return total


@triton.jit
def inner_products(
    a, b, na, nb, token_a, token_b, span_a, span_b, features, an, at, bn, bt,
    WIDEN: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """``a[token_a] . b[token_b]`` for all pairs of two blocks of tokens."""
    total = tl.zeros((TOKENS, TOKENS), dtype=tl.float32)
    for first in range(0, features, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        left = load_tile(a + na * an, token_a, feature, span_a, features, at, WIDEN)
        right = load_tile(b + nb * bn, token_b, feature, span_b, features, bt, WIDEN)
        total += tl.dot(left, tl.trans(right), input_precision="ieee")
    return total
