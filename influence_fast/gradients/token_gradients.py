"""Whole or sketched gradients of an embedding, from its ids."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.gradients.sample_rows import TokenIds
from influence_fast.ops import philox
from influence_fast.ops.arguments import accumulator
from influence_fast.ops.projections import Matrices, Side

# The unprojected gradient of an embedding is as large as its table, for every sample.
_DENSE_EMBEDDING_BYTES = 4 << 30
_TOKEN_ENTRIES = 1 << 20


def tokens_gradient(
    name: str, single: Side | None, tokens: TokenIds, transposed: bool, dy: Tensor, matrices: Matrices
) -> Tensor:
    """``(N, dim)`` of output gradients ``dy (N, T, width)``; ``transposed`` in the frame of a tied head."""
    dy = dy.to(accumulator(dy.dtype))
    n, _, width = dy.shape
    if single is not None and single.kind == "sjlt":
        return _sketch_tokens(single, tokens, transposed, dy)
    if n * width * tokens.size * dy.element_size() > _DENSE_EMBEDDING_BYTES:
        raise InputError(
            f"layer {name!r}: whole gradients of {n} samples take {n * width * tokens.size * 4 / 2**30:.1f} GiB; "
            "project with two sides (rademacher:16x16) or sjlt:K, use smaller batches, or leave the embedding out"
        )
    table = dy.new_zeros(n * tokens.size, width)
    offset = torch.arange(n, device=dy.device)[:, None] * tokens.size
    table.index_add_(0, (tokens.ids + offset).flatten(), dy.flatten(0, 1))
    table = table.view(n, tokens.size, width)
    flat = (table if transposed else table.mT).flatten(1)
    return flat if single is None else matrices.sketch(flat, single)


def _sketch_tokens(side: Side, tokens: TokenIds, transposed: bool, dy: Tensor) -> Tensor:
    n, t, width = dy.shape
    out = dy.new_zeros(n, side.k)
    channel = torch.arange(width, device=dy.device)
    step = max(1, _TOKEN_ENTRIES // max(1, n * width))
    for begin in range(0, t, step):
        ids = tokens.ids[:, begin : begin + step, None]
        feature = ids * width + channel if transposed else channel * tokens.size + ids
        index, sign = philox.sjlt_at(side.words, side.k, feature)
        out.scatter_add_(1, index.flatten(1), (dy[:, begin : begin + step] * sign).flatten(1))
    return out
