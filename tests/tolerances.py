"""How far a float may be from what it should be, and what follows for ranks.

For a kernel against the float64 reference there is one table for all backends, dtypes and shapes. A float32 sum of L
rounded terms is off by about ``sqrt(L) * 2^-24`` times the sum of their absolute values, which is the same operation on
absolute values. Inputs are exact: the reference sees the same float16 or bfloat16 numbers. What does not grow with L:
scales rounded to float32, and entries of Gaussian matrices, each within two units in the last place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = {
    "outer": 2.0,
    "project_outer": 2.0,
    "sketch_outer": 2.0,
    "score_outer": 2.0,
    "ghost_dot": 2.0,
    "ghost_norm": 2.0,
    "sketch": 2.0,
}


def assert_close(op: str, actual: Tensor, expected: Tensor, absolute: Tensor, length: int) -> None:
    """``absolute``: the float64 operation on absolute values; ``length``: terms in the longest chain of sums."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    room = (8 + FACTOR[op] * math.sqrt(length)) * 2.0**-24 * absolute + 1e-30
    error = (actual.cpu().double() - expected).abs()
    # Not "any > room": NaN must fail.
    assert bool((error <= room).all()), f"{op}: error is {float((error / room).max()):.2f} times what is allowed"


def rank_range(values: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest rank that entries ``(..., n)`` can have within their rows, when each is off by ``room``
    at most: ranks jump where values are as near to each other as that."""
    gap, off = values[..., :, None] - values[..., None, :], room[..., :, None] + room[..., None, :]
    return (gap > off).sum(-1), (gap >= -off).sum(-1) - 1
