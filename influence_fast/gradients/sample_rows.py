"""Whose tokens a layer sees, in what it is given and in the gradient of what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.errors import InputError


class UnseenUse(InputError):
    """A gradient cannot be given in the way that was asked for; ``remedies`` names by layer the way that may give it.

    ``second``, ``grouped`` and ``parts``: as of :class:`SampleRows`; ``followed``: by the uses of the parameter itself;
    ``exact``: by autograd.
    """

    def __init__(self, remedies: Mapping[str, str], message: str) -> None:
        super().__init__(message)
        self.remedies = dict(remedies)


@dataclass(frozen=True)
class TokenIds:
    """One-hot rows of width ``size``, kept as their ids ``(N, T)``: the inputs of an embedding whose table has ``dtype``.

    The id ``padding`` has no gradient.
    """

    ids: Tensor
    size: int
    dtype: torch.dtype
    padding: int | None = None


@dataclass(frozen=True)
class SampleRows:
    """Whose tokens a layer sees: those of ``count`` samples, of one length, or as ``index (N, T)`` numbers ``tokens``.

    ``layout`` says where samples are. ``first``: in the first dimension, batch-major where tokens are flattened into it;
    ``grouped``: each has several rows of the first dimension, one behind the other; ``second``: in the second dimension;
    ``parts``: all in each of several parts of the first dimension, as token-major tokens and concatenated views are.
    """

    count: int
    tokens: int = 0
    index: Tensor | None = None
    layout: str = "first"

    def unfold(self, x: Tensor, features: int, name: str) -> Tensor:
        """``x`` as ``(N, T, features)``; tokens flattened into the batch are unfolded, packed ones padded with 0."""
        tokens = x.numel() // features
        if self.index is not None:
            if tokens != self.tokens:
                raise InputError(f"layer {name!r}: expected {self.tokens} packed tokens, got shape {tuple(x.shape)}")
            return nn.functional.pad(x.reshape(tokens, features), (0, 0, 0, 1))[self.index.to(x.device)]
        count = self.count
        if count != 1 and (x.shape[0] != count or self.layout not in ("first", "shared")):
            if not self._fits(x):
                raise self._misfit(x, name)
            if self.layout in ("second", "parts"):
                length = x.shape[0] if self.layout == "second" else x.shape[0] // count
                return x.reshape(length, count, -1, features).transpose(0, 1).flatten(1, 2)
        return x.reshape(count, tokens // count if count else 0, features)

    def _fits(self, x: Tensor) -> bool:
        if self.layout == "second":
            return x.dim() > 2 and x.shape[1] == self.count
        return x.shape[0] % max(self.count, 1) == 0 and (self.layout not in ("first", "shared") or x.dim() == 2)

    @classmethod
    def packed(cls, lengths: Iterable[int]) -> SampleRows:
        """Samples of these lengths, one behind the other."""
        sizes = [int(length) for length in lengths]
        if not sizes or min(sizes) < 1:
            raise InputError(f"lengths: expected positive numbers of tokens, got {sizes[:8]}")
        total, step = sum(sizes), torch.arange(max(sizes))
        ends = torch.tensor(sizes).cumsum(0)
        starts = ends - torch.tensor(sizes)
        # The row behind the last token is zero.
        index = torch.where(step < torch.tensor(sizes)[:, None], starts[:, None] + step, total)
        return cls(len(sizes), total, index)

    def owners(self, tokens: int, device: torch.device) -> Tensor:
        """The sample of each of ``tokens`` flattened tokens; of packed ones behind the last sample, ``count``."""
        if self.index is not None:
            flat = torch.full((self.tokens + 1,), self.count, device=device)
            flat[self.index.to(device)] = torch.arange(self.count, device=device)[:, None].expand(self.index.shape)
            return flat[:-1]
        token = torch.arange(tokens, device=device)
        return (
            token % self.count if self.layout in ("second", "parts") else token // max(1, tokens // max(1, self.count))
        )

    def _misfit(self, x: Tensor, name: str) -> UnseenUse:
        second = x.dim() > 2 and x.shape[1] == self.count
        grouped = x.shape[0] % max(self.count, 1) == 0
        remedy = "exact" if self.layout != "first" else "second" if second else "grouped" if grouped else "exact"
        message = f"layer {name!r}: expected {self.count} samples in the first dimension, got shape {tuple(x.shape)}"
        return UnseenUse({name: remedy}, message)


Operand = Tensor | TokenIds
# The projected factors (N, T, k_in) and (N, T, k_out) of a gradient that is not formed yet.
Factors = tuple[Tensor, Tensor]


class OutputHook(torch.autograd.Function):
    """Identity whose backward hands the output gradient to ``receive``; ``anchor`` makes it part of a graph."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.receive(grad.detach())
        return grad if ctx.needs_input_grad[0] else None, None, None


def exactly(like: Tensor) -> AbstractContextManager[Any]:
    """Our own arithmetic is not in the low precision that the model may run in. What it works on is detached."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def oriented(near: Tensor, far: Tensor, transposed: bool) -> Factors:
    """Inputs and output gradients of one use; a transposed one has their places changed."""
    return (far, near) if transposed else (near, far)


def promoted(x: Tensor, dy: Tensor) -> Factors:
    """Both in one dtype: autocast may hand a layer float32 and take bfloat16 gradients back."""
    dtype = torch.promote_types(x.dtype, dy.dtype)
    return x.to(dtype), dy.to(dtype)


def product(x: Tensor, dy: Tensor) -> Tensor:
    """``(N, k_out * k_in)`` from factors a few columns wide, which plain batched products are fastest at."""
    return torch.bmm(dy.mT, x).flatten(1)


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Samples of a call of a model, by its first tensor; None where it has none."""
    named = dict(kwargs)
    for value in args:
        if isinstance(value, Mapping):
            named.update(value)
    candidates = [named.get(key) for key in ("input_ids", "inputs_embeds", "pixel_values", "input_values")]
    candidates += [*args, *named.values()]
    for value in candidates:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None
