"""The extension influence_fast_cuda, and torch tensors as its kernels take them: addresses, sizes, strides, a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from influence_fast.ops.arguments import Side, address, output

try:
    import influence_fast_cuda as library
except ImportError as error:
    library = None
    _missing = f"the extension influence_fast_cuda is not built ({error})"


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it works on tensors on an NVIDIA GPU, not on {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, not {dtype}"
    if library is None:
        return _missing
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need compute capability 8.0 (Ampere) or later"
    return None


def side(side: Side) -> Any:
    key0, key1 = side.words
    return library.Side(kind=side.kind, key0=key0, key1=key1, k=side.k, features=side.features, scale=side.scale)


def tokens(x: Tensor) -> Any:
    return library.Tokens(address("x, dy", x), dtype_name(x), x.shape, x.stride())


def matrix(x: Tensor) -> Any:
    return library.Matrix(address("g, influence", x), dtype_name(x), x.shape, x.stride())


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def empty(like: Tensor, *shape: int) -> Tensor:
    return output(shape, torch.float32, like.device)


def optional_address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else address("lengths, scale", tensor)


def where(tensor: Tensor) -> dict[str, Any]:
    """Device and stream of a launch; 0 and 0 in main memory, where tests run a host build of the kernels."""
    if not tensor.is_cuda:
        return {"device": 0, "stream": 0}
    stream = torch.cuda.current_stream(tensor.device)
    return {"device": tensor.device.index, "stream": stream.cuda_stream}
