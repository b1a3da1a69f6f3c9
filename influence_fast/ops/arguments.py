"""What the public operations and their backends share: the face of a projection side, dtypes, token spans, addresses.

Kernels read memory by address, so what reaches them is checked here and nowhere else: :func:`plain` on the way into an
operation, :func:`address` where memory is handed to a kernel, :func:`output` where a result is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from influence_fast.errors import InputError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64}


class Side(Protocol):
    """What a backend needs to know of an implicit random matrix (``influence_fast.ops.projections.Side`` is one)."""

    @property
    def kind(self) -> str: ...
    @property
    def k(self) -> int: ...
    @property
    def features(self) -> int: ...
    @property
    def words(self) -> tuple[int, int]: ...
    @property
    def scale(self) -> float: ...
    @property
    def offset(self) -> int: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class AdamState:
    """Adam's moments of one weight, by which LESS scales gradients: ``(b1 m + (1-b1) g) / sqrt(b2 v + (1-b2) g^2 + eps)``.

    Args:
        m: first moment ``(o, i)``, as the optimiser's ``exp_avg``; v: second moment, as its ``exp_avg_sq``.
        betas: ``(b1, b2)``, from 0 to 1; eps: added under the root, as LESS does (Xia et al. 2024).

    Raises:
        InputError: what is not two float matrices of one shape, or numbers out of range.
    """

    m: Tensor
    v: Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_float("m", self.m, 2)
        check_float("v", self.v, 2)
        if self.m.shape != self.v.shape or self.m.device != self.v.device:
            raise InputError(f"v: expected the shape and device of m, got {tuple(self.v.shape)} on {self.v.device}")
        if len(self.betas) != 2 or not all(0 <= b <= 1 for b in self.betas) or not self.eps >= 0:
            raise InputError(
                f"betas, eps: expected two numbers from 0 to 1 and one from 0, got {self.betas}, {self.eps}"
            )

    def update(self, g: Tensor, rows: slice = slice(None)) -> Tensor:
        """The update of each gradient of the weight's ``rows``: ``(N, rows, i) -> (N, rows, i)``."""
        b1, b2 = self.betas
        m, v = self.m[rows].to(g.dtype), self.v[rows].to(g.dtype)
        return (b1 * m + (1 - b1) * g) / (b2 * v + (1 - b2) * g**2 + self.eps).sqrt()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is accumulated, and returned, in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain(name: str, tensor: Tensor) -> Tensor:
    """A dense tensor without gradient whose memory holds its values; InputError for anything that cannot be made one."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name}: expected a torch tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise InputError(f"{name}: expected a dense tensor, got {tensor.layout}")
    kind = type(tensor)
    if kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        # DTensor, FakeTensor, MaskedTensor, ...: their values lie elsewhere, or nowhere.
        raise InputError(f"{name}: expected a plain tensor with values in memory, got a {kind.__name__}")
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not _is_there(tensor):
        raise InputError(f"{name}: expected a tensor with values in memory, got one whose storage was freed")
    # Memory of a negated view, such as the imaginary part of a conjugate, holds the opposite of its values.
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _is_there(tensor: Tensor) -> bool:
    """Whether the last element lies within the storage, which others may have resized: FSDP frees weights so."""
    try:
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
    except (RuntimeError, NotImplementedError):
        # Within torch.func there is none; the reference computes on such tensors, and kernels are given no address.
        return True
    begin, count = tensor.storage_offset(), tensor.numel()
    if begin + count <= held or not count:
        return True
    return begin + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) < held


def output(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where a result goes, whatever torch's default dtype and device are."""
    # Half the time of torch.empty, which asks about default devices first.
    return torch.empty_strided(shape, _contiguous(shape), dtype=dtype, device=device)


@lru_cache(maxsize=4096)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, math.prod(shape[place:])) for place in range(1, len(shape) + 1))


def address(name: str, tensor: Tensor) -> int:
    """Where the values of a plain tensor begin, 0 where there are none; InputError where it has no memory of its own."""
    try:
        found = tensor.data_ptr()
    except RuntimeError:
        found = 0
    if not found and tensor.numel():
        kind = type(tensor).__name__
        what = (
            f"a {kind}" if kind != "Tensor" else "one that torch.func or a fake mode wraps, or whose storage was freed"
        )
        raise InputError(f"{name}: expected a tensor with values in memory, got {what}")
    return found


def aligned(name: str, tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor, or a copy of one that begins between two elements' places, and its :func:`address`."""
    found = address(name, tensor)
    if found & 7 and found % tensor.element_size():
        # A packed batch, N views of the same tokens: copied once.
        packed = tensor.dim() == 3 and tensor.stride(0) == 0
        tensor = tensor[:1].clone().expand(tensor.shape) if packed else tensor.clone()
        found = address(name, tensor)
    return tensor, found


def check_float(name: str, tensor: Tensor, dims: int | tuple[int, ...]) -> None:
    dims = dims if isinstance(dims, tuple) else (dims,)
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name}: expected a torch tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise InputError(f"{name}: expected a dense tensor, got a nested one")
    if type(tensor) is not Tensor and torch.nn.parameter.is_lazy(tensor):
        raise InputError(f"{name}: expected a tensor with values, got a {type(tensor).__name__}")
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
    x, dy = plain(names[0], x), plain(names[1], dy)
    if x.dim() == 2:
        return _packed(x, dy, lengths, names)
    if lengths is None:
        return x, dy, None
    n, t = x.shape[:2]
    given = _counts(names[2], lengths, x.device)
    if given.shape == (n, t) and given.dtype == torch.bool:
        return _masked(x, dy, given)
    if given.shape != (n,) or given.dtype not in _INTEGERS:
        raise InputError(
            f"{names[2]}: expected integers of shape ({n},) or a boolean mask of shape ({n}, {t}), "
            f"got {given.dtype} of shape {tuple(given.shape)}"
        )
    end = given.long()
    if x.device.type == "cpu":
        _check_counts(names[2], end, t)
    end = end.clamp(0, t)
    return x, dy, torch.stack([torch.zeros_like(end), end], 1)


def _counts(name: str, lengths: Tensor, device: torch.device) -> Tensor:
    """What was given for lengths as a plain tensor on the device."""
    try:
        given = torch.as_tensor(lengths, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name}: expected a tensor of integers, got {type(lengths).__name__} ({error})") from None
    return plain(name, given)


def _check_counts(name: str, lengths: Tensor, most: int) -> None:
    """Each by itself, before anything is summed: a sum of numbers near 2^63 may be anything."""
    if not lengths.numel():
        return
    try:
        low, high = int(lengths.min()), int(lengths.max())
    except RuntimeError:
        raise InputError(f"{name}: expected a tensor with values in memory, got {type(lengths).__name__}") from None
    if low < 0 or high > most:
        raise InputError(f"{name}: expected values from 0 to {most}, got {low} to {high}")


def _packed(
    x: Tensor, dy: Tensor, lengths: Tensor | None, names: tuple[str, str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    given = None if lengths is None else _counts(names[2], lengths, x.device)
    if given is None or given.dim() != 1 or given.dtype not in _INTEGERS:
        raise InputError(
            f"{names[2]}: packed {names[0]} of shape {tuple(x.shape)} needs the integer length of every sample, "
            f"got {'None' if given is None else (given.dtype, tuple(given.shape))}"
        )
    length = given.long()
    _check_counts(names[2], length, x.shape[0])
    # Where the exact sum could pass 2^63 a rounded one is far above the number of tokens too.
    wide = len(length) * x.shape[0] >= 1 << 63
    total = int(length.sum(dtype=torch.float64 if wide else torch.int64))
    if total != x.shape[0]:
        raise InputError(f"{names[2]}: expected lengths that add up to {x.shape[0]} packed tokens, got {total}")
    end = length.cumsum(0)
    spans = torch.stack([end - length, end], 1)
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
    if not x.numel():
        # To torch anything without elements is contiguous, whatever its strides.
        return output(tuple(x.shape), x.dtype, x.device)
    if x.dim() == 3 and x.stride(0) == 0:
        # A packed batch, N views of the same tokens: copied once.
        return x[:1].contiguous().expand(x.shape)
    return x.contiguous()


def not_finite(row: int) -> InputError:
    """The error of rank and vote; backends find the row, this words it."""
    return InputError(f"influence: expected finite values, row {row} has NaN or infinity")
