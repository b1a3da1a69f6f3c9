"""Layers that autograd itself differentiates, whatever their weight is used for.

One sample at a time the gradients are what a backward leaves on the parameters. Of several samples ``torch.func`` gives
them: ``vmap`` of ``grad``, over rows of equal lengths. A condition that a model computes from its inputs
(``if mask.all():``) is decided where all rows agree on it; where they do not, or an operation has no rule for batches,
rows go one at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from influence_fast.data.batching import Loss

_log = logging.getLogger("influence_fast")

# Bytes of whole gradients, of several samples, that are held at once.
_HELD_BYTES = 1 << 28
_SCALARS: dict[Any, Callable[[Any], Any]] = {
    torch.Tensor.__bool__: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.__index__: int,
    torch.Tensor.item: lambda value: value,
    torch.Tensor.is_nonzero: bool,
}
_attributes: Any = torch.Tensor
_SET_DATA = _attributes.data.__set__


class ExactLayers:
    """``owned`` has by layer what makes ``(N, dim)`` of its parameters' gradients ``(N, ...)``, and these parameters.

    They are the weight, and the bias where the layer has a column for it.
    """

    def __init__(
        self, model: nn.Module, owned: Mapping[str, tuple[Callable[[list[Tensor]], Tensor], list[nn.Parameter]]]
    ) -> None:
        self._model, self._owned = model, owned
        self._parameters = list({id(p): p for _, found in owned.values() for p in found}.values())
        self._flags: list[tuple[bool, Tensor | None]] = []
        self.one_by_one = False
        """Whether ``torch.func`` could not run the model, and why."""
        self.failure = ""
        self._has_mapped = False

    def __bool__(self) -> bool:
        return bool(self._owned)

    @property
    def names(self) -> list[str]:
        return list(self._owned)

    def begin(self) -> None:
        """From here a backward leaves its gradients on the parameters, until :meth:`end` puts things back."""
        for parameter in self._parameters:
            self._flags.append((parameter.requires_grad, parameter.grad))
            parameter.grad = None
            parameter.requires_grad_(True)

    def end(self) -> None:
        for parameter, (flag, grad) in zip(self._parameters, self._flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = grad
        self._flags = []

    def clear(self) -> None:
        """Forget what a backward left."""
        if self._flags:
            for parameter in self._parameters:
                parameter.grad = None

    def left_by_backward(self) -> dict[str, Tensor]:
        """``{layer: (1, dim)}`` of the one sample that there was; without layers that the loss does not depend on."""
        grads = {id(p): p.grad.to_dense()[None] for p in self._parameters if p.grad is not None}
        return self._kept(grads)

    def of_batch(self, loss: Loss, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{layer: (N, dim)}`` of every sample of a batch, by forward and backward passes of their own."""
        count = len(next(iter(batch.values())))
        out: dict[str, Tensor] = {}
        for chosen in self._groups(batch):
            part = {name: tensor[chosen] for name, tensor in batch.items()}
            for name, found in self._kept(self._gradients(loss, part)).items():
                if name not in out:
                    out[name] = found.new_zeros(count, found.shape[1])
                out[name][chosen] = found
        return out

    def _gradients(self, loss: Loss, batch: Mapping[str, Tensor]) -> dict[int, Tensor]:
        if not self.one_by_one:
            try:
                found = self._mapped(loss, batch)
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.one_by_one, self.failure = True, _first_line(error)
                if self._has_mapped:
                    _log.warning("torch.func cannot run a batch (%s): rows go one at a time now", self.failure)
            else:
                self._has_mapped = True
                return found
        count = len(next(iter(batch.values())))
        rows = [self._alone(loss, {n: t[i : i + 1] for n, t in batch.items()}) for i in range(count)]
        return {id(p): torch.stack(found) for p, found in zip(self._parameters, zip(*rows, strict=True), strict=True)}

    def _mapped(self, loss: Loss, batch: Mapping[str, Tensor]) -> dict[int, Tensor]:
        def of_row(values: tuple[Tensor, ...], row: dict[str, Tensor]) -> Tensor:
            with _replaced(self._model, dict(zip(map(id, self._parameters), values, strict=True))):
                return loss(self._model, {name: tensor[None] for name, tensor in row.items()}).sum()

        values = tuple(parameter.detach() for parameter in self._parameters)
        with _AgreedScalars():
            grads = torch.func.vmap(torch.func.grad(of_row), (None, 0), randomness="same")(values, dict(batch))
        return {id(p): grad.detach() for p, grad in zip(self._parameters, grads, strict=True)}

    def _alone(self, loss: Loss, batch: dict[str, Tensor]) -> list[Tensor]:
        flags = [parameter.requires_grad for parameter in self._parameters]
        try:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            return gradients(lambda: loss(self._model, batch).sum(), self._parameters)
        finally:
            for parameter, flag in zip(self._parameters, flags, strict=True):
                parameter.requires_grad_(flag)

    def _groups(self, batch: Mapping[str, Tensor]) -> Iterator[list[int]]:
        """Rows of equal lengths, as many as fit."""
        mask = batch.get("attention_mask")
        count = len(next(iter(batch.values())))
        size = sum(parameter.numel() * 4 for parameter in self._parameters)
        most = max(1, _HELD_BYTES // max(1, size))
        by_length: dict[Any, list[int]] = {}
        for row in range(count):
            key = None if mask is None else tuple(mask[row].flatten().tolist())
            by_length.setdefault(key, []).append(row)
        for rows in by_length.values():
            for begin in range(0, len(rows), most):
                yield rows[begin : begin + most]

    def _kept(self, grads: Mapping[int, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, (as_kept, owned) in self._owned.items():
            if not any(id(p) in grads for p in owned):
                continue
            count = len(next(grads[id(p)] for p in owned if id(p) in grads))
            found = [grads[id(p)] if id(p) in grads else p.detach().new_zeros(count, *p.shape) for p in owned]
            out[name] = as_kept(found)
        return out


def gradients(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of ``loss()`` by parameters; zeros where it does not depend on one."""
    value = loss()
    if not value.requires_grad:
        # Weights of a part that a row does not come through, such as the audio encoder of a model that reads text alone.
        return [torch.zeros_like(p) for p in parameters]
    try:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(value, parameters, allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        # Checkpoints that run a part of the model again (``use_reentrant``) take no autograd.grad.
        found = _left_by_backward(loss(), parameters)
    else:
        # Weights within such a checkpoint are not in the graph before a backward comes by: to autograd.grad, the loss
        # does not depend on them.
        if any(g is None for g in found) and _runs_again(value):
            found = _left_by_backward(loss(), parameters)
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]


def _runs_again(loss: Tensor) -> bool:
    """Whether a function written in Python stands in the graph, whose backward may run parts of the model."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        waiting += [follower for follower, _ in node.next_functions]
    return False


def _left_by_backward(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    earlier = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        return tuple(parameter.grad for parameter in parameters)
    finally:
        for parameter, grad in zip(parameters, earlier, strict=True):
            parameter.grad = grad


@contextmanager
def _replaced(model: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """The model with other tensors where it has the parameters of these ids, wherever it shares them."""
    places = [
        (module._parameters, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in values
    ]
    try:
        for owner, leaf, parameter in places:
            owner[leaf] = values[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for owner, leaf, parameter in places:
            owner[leaf] = parameter


class _AgreedScalars(TorchFunctionMode):
    """Within ``vmap``, a number that Python asks of a tensor is given where all rows have the same."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _SET_DATA:
            # A module that converts itself in its forward. torch does not survive the data of a tensor of functorch's.
            if _values(args[0]) is _values(args[1]):
                return None
            raise RuntimeError("the forward replaces a parameter's data")
        convert = _SCALARS.get(func)
        if convert is not None and torch._C._functorch.is_functorch_wrapped_tensor(args[0]):
            value = _values(args[0])
            first = value.flatten()[0]
            if not bool((value == first).all()):
                raise RuntimeError("a condition differs between rows of a batch")
            return convert(first.item())
        return func(*args, **(kwargs or {}))


def _values(tensor: Tensor) -> Tensor:
    """The plain tensor behind those that functorch wraps around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:120] if text else type(error).__name__
