"""Inner products and norms of gradients that are never formed."""

from __future__ import annotations

from torch import Tensor

from influence_fast.ops.arguments import address, unit_stride
from influence_fast.ops.cuda import native

# Parts of the inner products, in floats, before samples are taken in pieces.
_SCRATCH = 1 << 26


def ghost_dot(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None
) -> Tensor:
    out = native.empty(xa, xa.shape[0], xb.shape[0])
    if not out.numel() or not all(tensor.numel() for tensor in (xa, dya, xb, dyb)):
        return out.zero_()
    xa, dya, xb, dyb = (unit_stride(tensor) for tensor in (xa, dya, xb, dyb))
    splits = native.library.ghost_splits(native.dtype_name(xa), xa.shape[1], xb.shape[1], False)
    step = max(1, _SCRATCH // (splits * xb.shape[0]))
    for begin in range(0, xa.shape[0], step):
        rows = slice(begin, begin + step)
        spans = None if spans_a is None else spans_a[rows]
        _launch(xa[rows], dya[rows], spans, xb, dyb, spans_b, out[rows], splits, paired=False)
    return out


def ghost_norm(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    out = native.empty(x, x.shape[0])
    if not x.numel() or not dy.numel():
        return out.zero_()
    x, dy = unit_stride(x), unit_stride(dy)
    splits = native.library.ghost_splits(native.dtype_name(x), x.shape[1], x.shape[1], True)
    _launch(x, dy, spans, x, dy, spans, out, splits, paired=True)
    # Rounding may leave the sum of a gradient that is zero below it.
    return out.clamp_min_(0).sqrt_()


def _launch(
    xa: Tensor,
    dya: Tensor,
    spans_a: Tensor | None,
    xb: Tensor,
    dyb: Tensor,
    spans_b: Tensor | None,
    out: Tensor,
    splits: int,
    paired: bool,
) -> None:
    parts = native.empty(out, splits, *out.shape) if splits > 1 else None
    spans_a = None if spans_a is None else spans_a.contiguous()
    spans_b = spans_a if paired else None if spans_b is None else spans_b.contiguous()
    native.library.ghost(
        xa=native.tokens(xa),
        dya=native.tokens(dya),
        spans_a=native.optional_address(spans_a),
        xb=native.tokens(xb),
        dyb=native.tokens(dyb),
        spans_b=native.optional_address(spans_b),
        paired=paired,
        out=address("out", out),
        parts=native.optional_address(parts),
        **native.where(out),
    )
