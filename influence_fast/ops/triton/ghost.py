"""Inner products and norms of gradients that are never formed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from influence_fast.ops.triton.launch import device_of, given, unit, widened
from influence_fast.ops.triton.tiles import inner_products, token_span


@triton.jit
def _ghost(
    xa, dya, xb, dyb, spans_a, spans_b, out, tokens_a, tokens_b, i, o, samples_b,
    xan, xat, dan, dat, xbn, xbt, dbn, dbt, SPANS_A: tl.constexpr, SPANS_B: tl.constexpr, PAIRED: tl.constexpr,
    WIDEN: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """``<G_a, G_b> = sum over token pairs of (xa . xb)(dya . dyb)``; ``PAIRED`` takes sample n with sample n alone."""
    na = tl.program_id(0).to(tl.int64)
    nb = na if PAIRED else tl.program_id(1).to(tl.int64)
    begin_a, end_a = token_span(spans_a, na, tokens_a, SPANS_A)
    begin_b, end_b = token_span(spans_b, nb, tokens_b, SPANS_B)
    total = tl.zeros((TOKENS, TOKENS), dtype=tl.float32)
    for first_a in range(begin_a, end_a, TOKENS):
        token_a = first_a + tl.arange(0, TOKENS)
        for first_b in range(begin_b, end_b, TOKENS):
            token_b = first_b + tl.arange(0, TOKENS)
            inputs = inner_products(
                xa, xb, na, nb, token_a, token_b, (begin_a, end_a), (begin_b, end_b), i, xan, xat, xbn, xbt,
                WIDEN, TOKENS, FEATURES,
            )  # fmt: skip
            outputs = inner_products(
                dya, dyb, na, nb, token_a, token_b, (begin_a, end_a), (begin_b, end_b), o, dan, dat, dbn, dbt,
                WIDEN, TOKENS, FEATURES,
            )  # fmt: skip
            total += inputs * outputs
    place = na if PAIRED else na * samples_b + nb
    tl.store(out + place, tl.sum(total))


def ghost_dot(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None
) -> Tensor:
    return _launch_ghost(xa, dya, xb, dyb, spans_a, spans_b, paired=False)


def ghost_norm(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    return _launch_ghost(x, dy, x, dy, spans, spans, paired=True).clamp_min(0).sqrt()


def _launch_ghost(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None, paired: bool
) -> Tensor:
    na, nb, i, o = len(xa), len(xb), xa.shape[2], dya.shape[2]
    xa, dya, xb, dyb = (unit(tensor) for tensor in (xa, dya, xb, dyb))
    out = torch.empty((na,) if paired else (na, nb), dtype=torch.float32, device=xa.device)
    if out.numel():
        with device_of(xa):
            _ghost[(na,) if paired else (na, nb)](
                xa, dya, xb, dyb, given(spans_a, xa), given(spans_b, xa), out, xa.shape[1], xb.shape[1], i, o, nb,
                *xa.stride()[:2], *dya.stride()[:2], *xb.stride()[:2], *dyb.stride()[:2], spans_a is not None,
                spans_b is not None, paired, widened(xa), 16, 64,
            )  # fmt: skip
    return out
