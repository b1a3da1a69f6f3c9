"""Products of inputs and output gradients, summed over each sample's tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from influence_fast.ops.arguments import AdamState, Side, address
from influence_fast.ops.cpu import kept_matrices
from influence_fast.ops.cpu.native import address_of, dense, implicit_side, library, new, optional_address, tokens


def outer(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    return project_outer(x, dy, None, None, spans)


def project_outer(
    x: Tensor, dy: Tensor, p_in: Side | Tensor | None, p_out: Side | Tensor | None, spans: Tensor | None
) -> Tensor:
    right, _right, k_in = _side("p_in", p_in, x.shape[2])
    left, _left, k_out = _side("p_out", p_out, dy.shape[2])
    out = new(x.shape[0], k_out, k_in)
    if out.numel():
        tokens_x, _x = tokens("x", x)
        tokens_dy, _dy = tokens("dy", dy)
        lengths, threads = optional_address("lengths", spans), torch.get_num_threads()
        library.project_outer(tokens_x, tokens_dy, lengths, right, left, address_of(out), threads)
    return out


def sketch_outer(
    x: Tensor,
    dy: Tensor,
    side: Side | Tensor,
    spans: Tensor | None,
    scale: Tensor | None,
    adam: AdamState | None = None,
) -> Tensor:
    matrix, _matrix, k = _side("projection", side, x.shape[2] * dy.shape[2], keep=False)
    out = new(x.shape[0], k)
    if not x.shape[2] * dy.shape[2]:
        return out.zero_()
    if out.numel():
        weight = None if scale is None else dense("scale", scale)
        tokens_x, _x = tokens("x", x)
        tokens_dy, _dy = tokens("dy", dy)
        moments = (None, None) if adam is None else (dense("adam.m", adam.m), dense("adam.v", adam.v))
        entries = (
            optional_address("scale", weight),
            optional_address("adam.m", moments[0]),
            optional_address("adam.v", moments[1]),
        )
        numbers = (0.0, 0.0, 0.0) if adam is None else (*adam.betas, adam.eps)
        tail = (*entries, *numbers, address_of(out), torch.get_num_threads())
        library.sketch_outer(tokens_x, tokens_dy, optional_address("lengths", spans), matrix, *tail)
    return out


def score_outer(x: Tensor, dy: Tensor, q: Tensor, spans: Tensor | None) -> Tensor:
    # A sketch with the given matrices for rows.
    return sketch_outer(x, dy, q.flatten(1), spans, None)


def ghost_dot(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None
) -> Tensor:
    out = new(xa.shape[0], xb.shape[0])
    if out.numel():
        tokens_xa, _xa = tokens("xa", xa)
        tokens_dya, _dya = tokens("dya", dya)
        tokens_xb, _xb = tokens("xb", xb)
        tokens_dyb, _dyb = tokens("dyb", dyb)
        a = (tokens_xa, tokens_dya, optional_address("lengths_a", spans_a))
        b = (tokens_xb, tokens_dyb, optional_address("lengths_b", spans_b))
        library.ghost_dot(*a, *b, address_of(out), torch.get_num_threads())
    return out


def ghost_norm(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    out = new(x.shape[0])
    if out.numel():
        tokens_x, _x = tokens("x", x)
        tokens_dy, _dy = tokens("dy", dy)
        lengths = optional_address("lengths", spans)
        library.ghost_norm(tokens_x, tokens_dy, lengths, address_of(out), torch.get_num_threads())
    return out


def _side(name: str, side: Side | Tensor | None, features: int, keep: bool = True) -> tuple[Any, Tensor | None, int]:
    """What the kernels take for a side, the tensor that must outlive the call, and how many numbers it leaves."""
    if side is None:
        return None, None, features
    if not isinstance(side, Tensor):
        if not (keep and side.kind == "gaussian"):
            return implicit_side(side), None, side.k
        matrix, scale = kept_matrices.gaussian(side), side.scale
    else:
        matrix, scale = dense(name, side), 1.0
    at = address(name, matrix)
    given = library.dense_side(data=at, shape=matrix.shape, strides=matrix.stride(), scale=scale)
    return given, matrix, matrix.shape[0]
