"""What the public operations and their backends share: the face of a projection side, dtypes, token spans."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from influence_fast.errors import InputError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Side(Protocol):
    """What a backend needs to know of an implicit random matrix (``influence_fast.ops.projections.Side`` is one)."""

    @property
    def kind(self) -> str: ...
    @property
    def k(self) -> int: ...
    @property
    def features(self) -> int: ...
    @property
    def key(self) -> tuple[int, int]: ...
    @property
    def scale(self) -> float: ...
    def __hash__(self) -> int: ...


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is accumulated, and returned, in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float(name: str, tensor: Tensor, dims: int | tuple[int, ...]) -> None:
    dims = dims if isinstance(dims, tuple) else (dims,)
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name}: expected a torch tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise InputError(f"{name}: expected float32, float16, bfloat16 or float64, got {tensor.dtype}")
    if tensor.dim() not in dims:
        wanted = " or ".join(map(str, dims))
        raise InputError(f"{name}: expected {wanted} dimensions, got shape {tuple(tensor.shape)}")


def pair(
    x: Tensor, dy: Tensor, lengths: Tensor | None, names: tuple[str, str, str] = ("x", "dy", "lengths")
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check inputs and output gradients, and turn ``lengths`` into token spans.

    Returns ``x (N, T, i)``, ``dy (N, T, o)`` (detached) and ``spans``: None or int64 ``(N, 2)`` ``[begin, end)``. A
    packed pair ``(S, i)``, ``(S, o)`` comes back as N views of the same S tokens with a batch stride of zero.
    """
    check_float(names[0], x, (2, 3))
    check_float(names[1], dy, x.dim())
    if x.shape[:-1] != dy.shape[:-1] or x.device != dy.device or x.dtype != dy.dtype:
        raise InputError(
            f"{names[0]}, {names[1]}: expected the same leading shape, dtype and device, got "
            f"{tuple(x.shape)} {x.dtype} {x.device} and {tuple(dy.shape)} {dy.dtype} {dy.device}"
        )
    x, dy = x.detach(), dy.detach()
    if x.dim() == 2:
        return _packed(x, dy, lengths, names)
    if lengths is None:
        return x, dy, None
    n, t = x.shape[:2]
    lengths = torch.as_tensor(lengths, device=x.device)
    if lengths.shape == (n, t) and lengths.dtype == torch.bool:
        return _masked(x, dy, lengths)
    if lengths.shape != (n,) or lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise InputError(
            f"{names[2]}: expected integers of shape ({n},) or a boolean mask of shape ({n}, {t}), "
            f"got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if x.device.type == "cpu" and n and not (int(lengths.min()) >= 0 and int(lengths.max()) <= t):
        raise InputError(f"{names[2]}: expected values from 0 to {t}, got {int(lengths.min())} to {int(lengths.max())}")
    end = lengths.long().clamp(0, t)
    return x, dy, torch.stack([torch.zeros_like(end), end], 1)


def _packed(
    x: Tensor, dy: Tensor, lengths: Tensor | None, names: tuple[str, str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    if lengths is None or lengths.dim() != 1 or lengths.dtype.is_floating_point:
        raise InputError(
            f"{names[2]}: packed {names[0]} of shape {tuple(x.shape)} needs the integer length of every sample, "
            f"got {'None' if lengths is None else (lengths.dtype, tuple(lengths.shape))}"
        )
    end = lengths.to(x.device).long().cumsum(0)
    total = int(end[-1]) if len(end) else 0
    if total != x.shape[0] or bool((lengths < 0).any()):
        raise InputError(f"{names[2]}: expected lengths that add up to {x.shape[0]} packed tokens, got {total}")
    spans = torch.stack([end - lengths.to(end), end], 1)
    return x.expand(len(end), -1, -1), dy.expand(len(end), -1, -1), spans


def _masked(x: Tensor, dy: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    t = mask.shape[1]
    count = mask.sum(1)
    begin = mask.to(torch.uint8).argmax(1) if t else count
    spans = torch.stack([begin, begin + count], 1)
    token = torch.arange(t, device=mask.device)
    if torch.equal(mask, (token >= spans[:, :1]) & (token < spans[:, 1:])):
        return x, dy, spans
    # A mask with holes is no span: blank what it hides and let every token count.
    return torch.where(mask[..., None], x, 0), torch.where(mask[..., None], dy, 0), None


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with a last stride of one, as kernels read it; a copy only where it has another."""
    if x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    if x.dim() == 3 and x.stride(0) == 0:
        # A packed batch, N views of the same tokens: copied once.
        return x[:1].contiguous().expand(x.shape)
    return x.contiguous()


def not_finite(row: int) -> InputError:
    """The error of rank and vote; backends find the row, this words it."""
    return InputError(f"influence: expected finite values, row {row} has NaN or infinity")
