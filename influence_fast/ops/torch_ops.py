"""The operations as torch's own: ``torch.ops.influence_fast.*``, with shapes for tracing, derivatives and batching.

A plain call on plain tensors never comes here: it goes straight to its backend, as fast as before. What comes here is a call
that torch must see: while a graph is traced (``torch.compile``, ``torch.export``, ``make_fx``), on tensors without values
(``FakeTensor``, meta), within ``torch.func`` transforms, in forward-mode differentiation, or on tensors that require a
gradient. Random matrices travel as text (:attr:`~influence_fast.ops.Side.text`), since a graph holds tensors and constants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from influence_fast.errors import InputError
from influence_fast.ops.arguments import accumulator

# Public name -> what calls it, whoever looks: derivatives and batching are written with these.
CALLS: dict[str, Callable[..., Any]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def registered(
    schema: str,
    shape: Callable[..., Any],
    folded: Sequence[int] = (),
    derivatives: type[Derivatives] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of positional arguments with torch; returns what is to be called in its place.

    Args:
        schema: as torch writes it; the operation's name is the function's, less a leading underscore.
        shape: of the same arguments, an empty result on their device.
        folded: which arguments have the samples first, so that a batch of calls is one call on more samples; where
            another argument is batched, calls are made one by one.
        derivatives: of a function that is linear in each tensor; without, differentiation raises InputError.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.lstrip("_")
        rules = derivatives or _NotLinear

        def real(*args: Any) -> Any:
            found = function(*args)
            # As the shapes above are laid out.
            return tuple(t.contiguous() for t in found) if isinstance(found, tuple) else found.contiguous()

        def batched(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
            return _batched(call, folded, info.batch_size, in_dims, args)

        traced = torch.library.custom_op(f"influence_fast::{name}", real, mutates_args=(), schema=schema)
        traced.register_fake(shape)
        traced.register_vmap(batched)
        traced.register_autograd(rules.backward, setup_context=rules.setup_context)

        forward = staticmethod(lambda *args: call(*args))
        members = {"forward": forward, "vmap": staticmethod(batched), "__module__": __name__}
        differentiated: Any = type(f"_{name}_function", (rules, torch.autograd.Function), members)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return traced(*args)
            way = _way(args)
            if way is None:
                return function(*args)
            return differentiated.apply(*args) if way == "differentiate" else traced(*args)

        CALLS[name] = call
        return call

    return register


def _way(args: Sequence[Any]) -> str | None:
    """None for a plain call; else ``differentiate``, by an autograd function, or ``trace``, as an operation of torch's."""
    transform = peek_interpreter_stack()
    if transform is not None:
        return "trace" if transform.key() == TransformType.Functionalize else "differentiate"
    if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
        return "differentiate"
    if _len_torch_dispatch_stack():
        return "trace"
    graded = torch.is_grad_enabled()
    unreal = real = differentiated = False
    for value in args:
        if value is None or value.__class__ is str or not isinstance(value, Tensor):
            continue
        if value.is_meta or (value.__class__ not in _PLAIN and isinstance(value, (FakeTensor, FunctionalTensor))):
            unreal = True
        else:
            real = True
            differentiated = differentiated or (graded and value.requires_grad)
    if unreal and real:
        raise InputError("expected tensors that all have values, or shapes alone (meta, fake); got both")
    return "trace" if unreal else "differentiate" if differentiated else None


def is_plain(*args: Any) -> bool:
    """Whether a call on these goes straight to its backend."""
    return not torch.compiler.is_compiling() and _way(args) is None


def _batched(
    call: Callable[..., Any], folded: Sequence[int], size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> Any:
    dims = list(in_dims)
    if all(dim is None or place in folded for place, dim in enumerate(dims)):
        whole = list(args)
        for place in folded:
            value, dim = args[place], dims[place]
            if value is not None:
                value = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
                whole[place] = value.flatten(0, 1)
        found = call(*whole)
        return found.unflatten(0, (size, found.shape[0] // max(1, size))), 0
    calls = [
        call(*(value if dim is None else value.select(dim, i) for value, dim in zip(args, dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(calls[0], tuple):
        return tuple(torch.stack(part) for part in zip(*calls, strict=True)), (0,) * len(calls[0])
    return torch.stack(calls), 0


class Derivatives:
    """What all rules share: a function that is linear in each of its tensors needs its arguments, and nothing else."""

    # In the form that both torch.autograd.Function and torch.library take.
    backward: Callable[..., Any]
    jvp: Callable[..., Any]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.others = tuple(None if isinstance(value, Tensor) else value for value in inputs)
        ctx.places = tuple(place for place, value in enumerate(inputs) if isinstance(value, Tensor))

    @staticmethod
    def restored(ctx: Any) -> tuple[Any, ...]:
        inputs = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = tensor
        return tuple(inputs)


class _NotLinear(Derivatives):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise InputError(
            "an operation of influence_fast that has no derivative: call it on x.detach(), or under no_grad"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise InputError(
            "an operation of influence_fast that has no derivative: call it on x.detach(), or under no_grad"
        )


class SketchRules(Derivatives):
    """``sketch(g, matrix, side, backend)`` and, with the roles exchanged, its transpose."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        g, matrix, side, backend = Derivatives.restored(ctx)
        wanted = ctx.needs_input_grad
        of_g = to_like(apply_transposed(grad, matrix, side, backend), g) if wanted[0] else None
        of_matrix = to_like(grad.mT @ g.to(grad.dtype), matrix) if matrix is not None and wanted[1] else None
        return of_g, of_matrix, None, None

    @staticmethod
    def jvp(ctx: Any, g_t: Tensor | None, matrix_t: Tensor | None, *_: Any) -> Any:
        g, matrix, side, backend = Derivatives.restored(ctx)
        parts = []
        if g_t is not None:
            parts.append(CALLS["sketch"](g_t, matrix, side, backend))
        if matrix_t is not None:
            parts.append(CALLS["sketch"](g, matrix_t, side, backend))
        return sum_of(parts)


class TransposeRules(Derivatives):
    """``sketch_transposed(y, side, backend)``."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, side, backend = Derivatives.restored(ctx)
        return to_like(CALLS["sketch"](grad, None, side, backend), y), None, None

    @staticmethod
    def jvp(ctx: Any, y_t: Tensor, *_: Any) -> Any:
        _y, side, backend = Derivatives.restored(ctx)
        return CALLS["sketch_transposed"](y_t, side, backend)


class OuterRules(Derivatives):
    """``outer(x, dy, lengths, backend)``."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, dy, lengths, _ = Derivatives.restored(ctx)
        of_x, of_dy = _of_pair(x, dy, lengths, grad)
        return of_x, of_dy, None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, dy_t: Tensor | None, *_: Any) -> Any:
        x, dy, lengths, backend = Derivatives.restored(ctx)
        pairs = [(a, b) for a, b in ((x_t, dy), (x, dy_t)) if a is not None and b is not None]
        return sum_of([CALLS["outer"](a, b, lengths, backend) for a, b in pairs])


class ProjectOuterRules(Derivatives):
    """``project_outer(x, dy, p_in, p_out, side_in, side_out, lengths, backend)``."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, dy, p_in, p_out, side_in, side_out, lengths, backend = Derivatives.restored(ctx)
        right, left = apply(x, p_in, side_in, backend), apply(dy, p_out, side_out, backend)
        of_right, of_left = _of_pair(right, left, lengths, grad)
        wanted = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 8
        if wanted[0]:
            found[0] = to_like(apply_transposed(of_right, p_in, side_in, backend), x)
        if wanted[1]:
            found[1] = to_like(apply_transposed(of_left, p_out, side_out, backend), dy)
        if p_in is not None and wanted[2]:
            found[2] = to_like(of_right.flatten(0, -2).mT @ x.flatten(0, -2).to(grad.dtype), p_in)
        if p_out is not None and wanted[3]:
            found[3] = to_like(of_left.flatten(0, -2).mT @ dy.flatten(0, -2).to(grad.dtype), p_out)
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        inputs = Derivatives.restored(ctx)
        parts = []
        for place in range(4):
            if tangents[place] is not None:
                changed = [*inputs[:place], tangents[place], *inputs[place + 1 :]]
                parts.append(CALLS["project_outer"](*changed))
        return sum_of(parts)


def _of_pair(x: Tensor, dy: Tensor, lengths: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``dy`` where ``grad`` is that of ``sum over live tokens of dy[t] (outer) x[t]``."""
    a, b = x.to(grad.dtype), dy.to(grad.dtype)
    if x.dim() == 2:
        ends = lengths.to(x.device).long().cumsum(0)  # type: ignore[union-attr]
        own = grad[torch.bucketize(torch.arange(x.shape[0], device=x.device), ends, right=True)]
        of_x, of_dy = (b[:, None] @ own).squeeze(1), (own @ a[..., None]).squeeze(-1)
    else:
        of_x, of_dy = b @ grad, a @ grad.mT
        if lengths is not None:
            live = lengths.to(x.device)
            if live.dtype != torch.bool:
                live = torch.arange(x.shape[1], device=x.device) < live[:, None]
            of_x, of_dy = torch.where(live[..., None], of_x, 0), torch.where(live[..., None], of_dy, 0)
    return to_like(of_x, x), to_like(of_dy, dy)


def apply(x: Tensor, matrix: Tensor | None, side: str, backend: str) -> Tensor:
    """``x P^T`` along the last dimension, differentiable; empty ``side`` and no matrix: ``x``."""
    if matrix is not None:
        dtype = accumulator(x.dtype)
        return x.to(dtype) @ matrix.to(dtype).mT
    if not side:
        return x.to(accumulator(x.dtype))
    flat: Tensor = CALLS["sketch"](x.reshape(-1, x.shape[-1]), None, side, backend)
    return flat.reshape(*x.shape[:-1], flat.shape[-1])


def apply_transposed(y: Tensor, matrix: Tensor | None, side: str, backend: str) -> Tensor:
    """``y P`` along the last dimension, differentiable."""
    if matrix is not None:
        return y @ matrix.to(y.dtype)
    if not side:
        return y
    flat: Tensor = CALLS["sketch_transposed"](y.reshape(-1, y.shape[-1]), side, backend)
    return flat.reshape(*y.shape[:-1], flat.shape[-1])


def to_like(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient.to(like.dtype)


def sum_of(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def outputs(matrix: Tensor | None, side: str, features: Any) -> Any:
    """How many numbers a matrix or a side leaves of so many."""
    if matrix is not None:
        return matrix.shape[0]
    return int(side.split("|", 1)[0]) if side else features


def samples(x: Tensor, lengths: Tensor | None) -> Any:
    return x.shape[0] if x.dim() == 3 or lengths is None else lengths.shape[0]


def empty(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=accumulator(like.dtype))
