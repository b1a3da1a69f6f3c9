"""Where the kernels can run, and what every launch needs."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

from influence_fast.ops.arguments import Side

try:
    import triton as _triton
except ImportError as error:
    MISSING: str | None = f"triton is not installed ({error})"
else:
    MISSING = None if _triton else ""

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter multiplies bfloat16 wrongly: parts of float32 stay what they are there.
NARROW = not _INTERPRETED
# Entries of a strip of G: 16 MiB of float32, which stays in the L2 cache between being made and being sketched.
STRIP = 1 << 22


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if MISSING is not None:
        return MISSING
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, not {dtype}"
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRETED):
        return f"it works on tensors on a GPU, not on {device.type} (or anywhere under TRITON_INTERPRET=1)"
    return None


class Taken:
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


def unit(x: Tensor) -> Tensor:
    """``x`` with a last stride of one; a packed batch stays views of the same tokens."""
    if x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    if x.dim() == 3 and x.stride(0) == 0:
        return x[:1].contiguous().expand(x.shape)
    return x.contiguous()


def given(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is needed even where it is not read."""
    return other if tensor is None else tensor


def widened(x: Tensor) -> bool:
    # The interpreter multiplies bfloat16 wrongly.
    return x.dtype == torch.float32 or _INTERPRETED


def power(value: int, least: int, most: int) -> int:
    return max(least, min(most, 1 << (value - 1).bit_length()))


def blocks(value: int, block: int) -> int:
    return -(-value // block)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
