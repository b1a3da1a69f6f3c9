"""The extension influence_fast_cpu, and torch tensors as its kernels take them: addresses, sizes and strides.

The last dimension has unit stride (anything else is copied). A call of torch costs as much as a small kernel, so each thing
is asked once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.ops.arguments import Side, address, aligned, output, plain, unit_stride

try:
    import influence_fast_cpu as library
except ImportError as error:
    library = None
    _missing = f"the extension influence_fast_cpu is not built ({error})"

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_CPU = torch.device("cpu")
# Operations that sum in float64 where their arguments do.
_WIDE = ("random_matrix", "sketch")


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``op`` cannot run here, or None."""
    if device.type != "cpu":
        return f"it works on tensors in main memory, not on {device.type}"
    if library is None:
        return _missing
    if dtype not in _DTYPES and op not in _WIDE:
        return f"it sums in float32, {dtype} is the reference's"
    return None


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return output(shape, dtype, _CPU)


def tokens(name: str, x: Tensor) -> tuple[Any, Tensor]:
    """What the kernels take for ``(N, T, features)``, and the tensor that must outlive the call."""
    return _described(library.Tokens, name, x, unit=True)


def matrix(name: str, x: Tensor, contiguous_rows: bool = False) -> tuple[Any, Tensor]:
    """The same for ``(rows, columns)``, of any strides or with columns one after another."""
    return _described(library.Matrix, name, x, contiguous_rows)


def _described(make: Any, name: str, x: Tensor, unit: bool) -> tuple[Any, Tensor]:
    # A microsecond counts here: one call of torch for each thing to know.
    x, at = aligned(name, in_memory(name, x))
    strides = x.stride()
    if unit and strides[-1] != 1:
        x = unit_stride(x)
        x, at = aligned(name, x)
        strides = x.stride()
    try:
        return make(at, _DTYPES[x.dtype], x.shape, strides), x
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def dense(name: str, x: Tensor) -> Tensor:
    """Contiguous float32."""
    x = in_memory(name, x).to(torch.float32).contiguous()
    return aligned(name, x)[0]


def in_memory(name: str, x: Tensor) -> Tensor:
    if not x.is_cpu:
        raise InputError(f"{name}: expected a tensor in main memory, got one on {x.device}")
    return x if x.layout is torch.strided and not x.is_neg() else plain(name, x)


def address_of(out: Tensor) -> int:
    """Where a kernel writes."""
    return address("out", out)


def optional_address(name: str, tensor: Tensor | None) -> int:
    return 0 if tensor is None else address(name, tensor)


@lru_cache(maxsize=4096)
def implicit_side(side: Side) -> Any:
    key0, key1 = side.words
    try:
        numbers = {"k": side.k, "features": side.features, "scale": side.scale, "offset": side.offset}
        return library.Side(kind=side.kind, key0=key0, key1=key1, **numbers)
    except ValueError as error:
        raise InputError(f"projection: {error}") from None
