"""Rows projected by random matrices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from influence_fast.ops import reference
from influence_fast.ops.arguments import Side
from influence_fast.ops.triton.launch import NARROW, STRIP, Taken, blocks, device_of, power, unit, widened
from influence_fast.ops.triton.tiles import load_tile, product, sign_tile

# Programs that a sum over features is cut into at most.
_PARTS = 64


@triton.jit
def _project(
    x, out, rows, features, k, stride, per_part, scale, key,
    WIDEN: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """``out[part] = x P^T`` over the part's features: ``x (rows, features)``, ``out (parts, rows, k)``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * K + tl.arange(0, K)
    part = tl.program_id(2)
    total = tl.zeros((ROWS, K), dtype=tl.float32)
    for step in range(per_part):
        feature = (part * per_part + step).to(tl.int64) * FEATURES
        values = load_tile(x, row, feature + tl.arange(0, FEATURES), (0, rows), features, stride, WIDEN)
        total += product(values, sign_tile(feature, output, key, FEATURES), True, WIDEN, NARROW)
    place = (part.to(tl.int64) * rows + row[:, None]) * k + output[None, :]
    tl.store(out + place, total * scale, mask=(row[:, None] < rows) & (output[None, :] < k))


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


def sketch(g: Tensor, side: Side | Tensor) -> Tensor:
    g = unit(g)
    n, d = g.shape
    if isinstance(side, Tensor) or side.kind == "gaussian" or (side.kind == "rademacher" and side.offset):
        k = side.shape[0] if isinstance(side, Tensor) else side.k
        out = torch.zeros(n, k, dtype=torch.float32, device=g.device)
        step = max(1, STRIP // k)
        for begin in range(0, d, step):
            end = min(begin + step, d)
            part = side[:, begin:end].float() if isinstance(side, Tensor) else matrix(side, begin, end, g.device)
            out += g[:, begin:end].float() @ part.T
        return out
    if not n:
        return torch.empty(0, side.k, dtype=torch.float32, device=g.device)
    if side.kind == "sjlt":
        found = launch_sjlt(g, side, 0, d, None, parts=min(_PARTS, blocks(d, side.k)), add=False)
        return found * side.scale if side.scale != 1 else found
    steps = blocks(d, 128)
    parts = min(_PARTS, steps)
    per_part = blocks(steps, parts)
    out = torch.empty(parts, n, side.k, dtype=torch.float32, device=g.device)
    rows, k = 16, power(side.k, 16, 64)
    chosen = Taken(side, g)
    with device_of(g):
        _project[(blocks(n, rows), blocks(side.k, k), parts)](
            g, out, n, d, side.k, g.stride(0), per_part, chosen.scale, chosen.key, widened(g), NARROW, rows, k, 128
        )
    return out.sum(0)


def matrix(side: Side, begin: int, end: int, device: torch.device) -> Tensor:
    return reference.random_matrix(side, (0, side.k), (begin, end), torch.float32, device)


def launch_sjlt(g: Tensor, side: Side, first: int, last: int, out: Tensor | None, parts: int, add: bool) -> Tensor:
    n, k = len(g), side.k
    first, last = side.offset + first, side.offset + last
    chunks = blocks(last, k) - first // k
    per_part = blocks(chunks, parts)
    found = torch.empty(parts, n, k, dtype=torch.float32, device=g.device) if out is None else out
    key = Taken(side, g).key
    rows, block = min(16, power(n, 1, 16)), power(k, 16, 128)
    with device_of(g):
        _sjlt[blocks(k, block), blocks(n, rows), parts](
            g, found, n, first, last, k, g.stride(0), key, per_part, add, rows, block
        )
    return found.sum(0) if out is None else found
