"""Random entries in plain torch, on any device: the twin of ``csrc/philox.h``, bit for bit.

Every entry is a pure function of (key, row, column), computed by Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011). The key is the first eight bytes of the MD5 digest of a matrix's identifier as
two little-endian 32-bit words. 32-bit words live in int64 tensors, because torch has little arithmetic on unsigned
ones; a product of two of them wraps to the right low 64 bits.

Counters, with ``lo`` and ``hi`` the low and high word of a 64-bit number:

==============  =============================  ==============================================================
entry           counter                        meaning of the output
==============  =============================  ==============================================================
Rademacher      ``(col // 128, row, 0, 0)``    bit ``col % 128``; 1 is +1, 0 is -1
Gaussian        ``(col // 4, row, 0, 0)``      Box-Muller entry ``col % 4`` of the pairs (x0, x1), (x2, x3)
SJLT sign       ``(lo w, hi w, 1, 0)``         ``w = col // 128``; bit ``col % 128``; 1 is +1, 0 is -1
SJLT rotation   ``(lo c', hi c', 2, 0)``       ``c' = c // 4``; word ``c % 4`` of chunk ``c = col // k``
==============  =============================  ==============================================================
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

Key = tuple[int, int]


def philox4x32(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: Key) -> tuple[Tensor, ...]:
    """Philox4x32-10. ``counter``: four words (int64 tensors or ints) that broadcast; returns four int64 tensors."""
    device = next((c.device for c in counter if isinstance(c, Tensor)), torch.device("cpu"))
    words = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64, device=device) for c in counter))
    x0, x1, x2, x3 = words
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = ((p1 >> 32) & _MASK) ^ x1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ x3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return x0, x1, x2, x3


def _span(begin: int, end: int, device: torch.device) -> Tensor:
    return torch.arange(begin, end, dtype=torch.int64, device=device)


def _signs(words: tuple[Tensor, ...], skip: int, count: int) -> Tensor:
    """Bits ``skip .. skip + count`` of consecutive 128-bit outputs (last dimension) as +-1 int8."""
    stacked = torch.stack(words, -1)
    bits = (stacked[..., None] >> torch.arange(32, device=stacked.device)) & 1
    return (bits.flatten(-3)[..., skip : skip + count] * 2 - 1).to(torch.int8)


def rademacher(key: Key, rows: tuple[int, int], cols: tuple[int, int], device: torch.device) -> Tensor:
    """Unscaled +-1 entries of rows ``[r0, r1)`` and columns ``[c0, c1)``, int8."""
    (r0, r1), (c0, c1) = rows, cols
    words = philox4x32((_span(c0 // 128, -(-c1 // 128), device), _span(r0, r1, device)[:, None], 0, 0), key)
    return _signs(words, c0 % 128, c1 - c0)


def gaussian(key: Key, rows: tuple[int, int], cols: tuple[int, int], device: torch.device) -> Tensor:
    """Unscaled standard normal entries of rows ``[r0, r1)`` and columns ``[c0, c1)``, float32 arithmetic throughout."""
    (r0, r1), (c0, c1) = rows, cols
    words = philox4x32((_span(c0 // 4, -(-c1 // 4), device), _span(r0, r1, device)[:, None], 0, 0), key)
    entries = []
    for a, b in (words[:2], words[2:]):
        u1 = (a.float() + 0.5) * 2.0**-32
        angle = (b.float() * 2.0**-32) * torch.tensor(2 * math.pi, dtype=torch.float32, device=device)
        radius = (-2.0 * u1.log()).sqrt()
        entries += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(entries, -1).flatten(-2)[..., c0 % 4 : c0 % 4 + c1 - c0]


def sjlt(key: Key, k: int, cols: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Output index (int64) and sign (int8) of features ``[c0, c1)`` in a block-balanced SJLT with ``k`` outputs.

    Chunk ``c`` of ``k`` consecutive features is rotated by ``r_c = (word * k) >> 32`` onto the ``k`` outputs: every
    feature has one non-zero, and every output gathers exactly one feature of every whole chunk. Two features of one
    chunk never meet and two of different chunks meet with probability 1/k, so the variance of an inner product is at
    most that of the ordinary SJLT with one non-zero.
    """
    c0, c1 = cols
    feature = _span(c0, c1, device)
    first, last = c0 // k, -(-c1 // k)
    quads = _span(first // 4, -(-last // 4), device)
    rotation = (torch.stack(philox4x32((quads & _MASK, quads >> 32, 2, 0), key), -1).flatten() * k) >> 32
    index = (feature % k + rotation[feature // k - first // 4 * 4]) % k
    w = _span(c0 // 128, -(-c1 // 128), device)
    return index, _signs(philox4x32((w & _MASK, w >> 32, 1, 0), key), c0 % 128, c1 - c0)


def sjlt_at(key: Key, k: int, features: Tensor) -> tuple[Tensor, Tensor]:
    """Output index (int64) and sign (int8) of any int64 ``features``, for gradients with few non-zeros."""
    chunk, w = features // k, features // 128
    words = torch.stack(philox4x32(((chunk // 4) & _MASK, (chunk // 4) >> 32, 2, 0), key), -1)
    rotation = (words.gather(-1, (chunk % 4)[..., None]).squeeze(-1) * k) >> 32
    words = torch.stack(philox4x32((w & _MASK, w >> 32, 1, 0), key), -1)
    bit = words.gather(-1, (features % 128 // 32)[..., None]).squeeze(-1) >> (features % 32)
    return (features % k + rotation) % k, ((bit & 1) * 2 - 1).to(torch.int8)
