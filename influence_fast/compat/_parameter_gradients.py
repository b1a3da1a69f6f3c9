"""Per-sample gradients of chosen parameters of any model, as inner products need them: whole, or the two factors of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from influence_fast import ops
from influence_fast.errors import InputError
from influence_fast.gradients.capture import GradientCapture
from influence_fast.gradients.captured_layer import CapturedLayer, GradientRecords, Receiver
from influence_fast.gradients.differences import TOLERANCE
from influence_fast.gradients.exact_layers import ExactLayers, gradients
from influence_fast.gradients.layers import Expert, layers_by_name, weight_of
from influence_fast.gradients.sample_rows import Factors, Operand, SampleRows, TokenIds, UnseenUse, promoted

# Gradients ``(N, numbers)`` of a parameter, or ``(x (N, T, in), dy (N, T, out))`` whose product over T they are.
Part = Tensor | Factors
# Of the model's output for a batch, and the rest of the batch: losses (N,), or their sum.
Losses = Callable[[Any, Any], Tensor]


class _Records(GradientRecords):
    """Factors of a matrix stay apart where they have fewer numbers than it."""

    def record(
        self, module: nn.Module | None, layer: CapturedLayer, transposed: bool, seen: Operand, samples: SampleRows
    ) -> Receiver:
        if layer.vector or transposed or isinstance(seen, TokenIds):
            return super().record(module, layer, transposed, seen, samples)
        x = samples.unfold(seen.detach(), seen.shape[-1], layer.name)
        version = x._version

        def receive(dy: Tensor) -> Tensor | Factors:
            if x._version != version:
                raise InputError(f"layer {layer.name!r}: its input was changed in place after the layer saw it")
            factors = promoted(x, dy)
            fewer = x.shape[1] * sum(layer.shape) < math.prod(layer.shape)
            return factors if fewer else ops.outer(*factors).flatten(1)

        return receive


class _Capture(GradientCapture):
    _kept_in = _Records

    def pop_parts(self) -> dict[str, Part]:
        """What arrived of each layer; forgets it. Layers that the loss does not depend on are left out."""
        self._raise_unseen()
        found: dict[str, Part] = {**self._records.gradients, **self._records.factors}
        self.clear()
        return found


class ParameterGradients:
    """Gradients of each sample's loss by ``parameters``, in their order, from hooks where those give what autograd does.

    The first batch is held against autograd: a parameter whose gradients differ, or that no hook can see, is left to
    ``torch.func``, or to one row after the other. The model is left as it was found, in the mode that it is in.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.model, self.parameters = model, list(parameters)
        known = layers_by_name(model)
        names = {id(weight_of(thing)): name for name, thing in known.items() if not isinstance(thing, Expert)}
        self._names = [names.get(id(parameter), "") for parameter in self.parameters]
        """The name of what capture takes by hooks; empty where autograd does."""
        modules = {name for name, thing in known.items() if isinstance(thing, nn.Module)}
        linear = {name for name in modules if isinstance(known[name], nn.Linear)}
        self._turned = [name in modules - linear for name in self._names]
        self._checked = False
        self._exact: tuple[list[int], ExactLayers] | None = None

    def of_batch(self, inputs: Sequence[Any], labels: Any, losses: Losses) -> list[Part]:
        """Of every sample of a batch; ``model(*inputs)`` is called, and ``losses(output, labels)``."""
        if not self._checked:
            self._check(inputs, labels, losses)
        return self._of_batch(inputs, labels, losses)

    def flat(self, part: Part, index: int) -> Tensor:
        """One of the parts, as rows ``(N, numbers)`` in the order of the parameter's numbers."""
        rows = formed(part)
        if not self._turned[index]:
            return rows
        out, in_ = reversed(self.parameters[index].shape)
        return rows.view(-1, out, in_).mT.flatten(1)

    def _of_batch(self, inputs: Sequence[Any], labels: Any, losses: Losses) -> list[Part]:
        while True:
            hooked = [name for name in self._names if name]
            try:
                found = self._by_hooks(hooked, inputs, labels, losses) if hooked else {}
                break
            except UnseenUse as error:
                self._leave_to_autograd(set(error.remedies))
        count = _count(inputs)
        exact = [index for index, name in enumerate(self._names) if not name]
        rest = self._by_autograd(exact, inputs, labels, losses) if exact else {}
        parts: list[Part] = []
        for index, (name, parameter) in enumerate(zip(self._names, self.parameters, strict=True)):
            part = found.get(name) if name else rest.get(index)
            parts.append(parameter.new_zeros(count, parameter.numel()) if part is None else part)
        return parts

    def _by_hooks(self, names: list[str], inputs: Sequence[Any], labels: Any, losses: Losses) -> dict[str, Part]:
        capture = _Capture(self.model, names)
        with torch.enable_grad(), _frozen(self.model), capture:
            total = losses(self.model(*inputs), labels).sum()
            if total.requires_grad:
                total.backward()
            return capture.pop_parts()

    def _by_autograd(self, chosen: list[int], inputs: Sequence[Any], labels: Any, losses: Losses) -> dict[int, Tensor]:
        if self._exact is None or self._exact[0] != chosen:
            owned = {str(i): (self._as_part(i), [self.parameters[i]]) for i in chosen}
            self._exact = chosen, ExactLayers(self.model, owned)
        tensors = {str(i): x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
        if isinstance(labels, Tensor):
            tensors["labels"] = labels

        def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            row = [batch.get(str(i), x) for i, x in enumerate(inputs)]
            return losses(model(*row), batch.get("labels", labels))

        with torch.enable_grad():
            found = self._exact[1].of_batch(loss, tensors)
        return {int(name): rows for name, rows in found.items()}

    def _as_part(self, index: int) -> Callable[[list[Tensor]], Tensor]:
        turned = self._turned[index]
        return lambda found: (found[0].mT if turned else found[0]).flatten(1)

    def _leave_to_autograd(self, names: set[str]) -> None:
        self._names = ["" if name in names else name for name in self._names]

    def _check(self, inputs: Sequence[Any], labels: Any, losses: Losses) -> None:
        """The sum over the batch, and the first sample alone, by autograd."""
        device = next((p.device for p in self.parameters), torch.device("cpu"))
        devices = [device] if device.type == "cuda" else []

        def literal(first: bool) -> list[Tensor]:
            values = losses(self.model(*inputs), labels)
            return gradients(lambda: values.flatten()[0] if first else values.sum(), self.parameters)

        # Dropout is to drop the same in each of the passes.
        with torch.random.fork_rng(devices), torch.enable_grad(), _trained(self.parameters):
            state = torch.get_rng_state()
            parts = self._of_batch(inputs, labels, losses)
            torch.set_rng_state(state)
            expected = [literal(first=False)]
            values = losses(self.model(*inputs), labels)
            if values.dim() > 0:
                torch.set_rng_state(state)
                expected.append(literal(first=True))
            elif not self.model.training and _count(inputs) > 1:
                alone = [x[:1] if isinstance(x, Tensor) else x for x in inputs]
                label = labels[:1] if isinstance(labels, Tensor) else labels
                expected.append(gradients(lambda: losses(self.model(*alone), label).sum(), self.parameters))
        wrong = set()
        for index, name in enumerate(self._names):
            if name:
                rows = self.flat(parts[index], index)
                tolerance = TOLERANCE.get(self.parameters[index].dtype, 8e-2)
                for grads, own in zip(expected, (rows.sum(0), rows[0]), strict=False):
                    grad = grads[index].flatten().to(own.dtype)
                    if not float((own - grad).norm()) <= tolerance * float(grad.norm()) + 1e-12:
                        wrong.add(name)
        self._leave_to_autograd(wrong)
        self._checked = True


def formed(part: Part) -> Tensor:
    """A part as rows ``(N, numbers)``."""
    return part if isinstance(part, Tensor) else ops.outer(*part).flatten(1)


def summed(part: Part) -> Tensor:
    """The sum of a part's rows, ``(1, numbers)``."""
    if isinstance(part, Tensor):
        return part.sum(0, keepdim=True)
    x, dy = part
    return (dy.flatten(0, 1).mT @ x.flatten(0, 1)).flatten()[None]


def for_queries(part: Part) -> Part:
    """A part that is met by many others: formed where its tokens cost more than its numbers."""
    if isinstance(part, Tensor):
        return part
    x, dy = part
    return part if x.shape[1] ** 2 * (x.shape[2] + dy.shape[2]) <= x.shape[2] * dy.shape[2] else formed(part)


def inner_products(a: Part, b: Part) -> Tensor:
    """``(Na, Nb)`` inner products of one parameter's gradients of two sets of samples."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a @ b.mT.to(a.dtype)
    if isinstance(a, Tensor):
        x, dy = cast(Factors, b)
        return ops.score_outer(x, dy, a.view(len(a), dy.shape[2], x.shape[2])).mT
    if isinstance(b, Tensor):
        return inner_products(b, a).mT
    (xa, dya), (xb, dyb) = a, b
    if xa.shape[1] == xb.shape[1] == 1:
        return (xa[:, 0] @ xb[:, 0].mT) * (dya[:, 0] @ dyb[:, 0].mT)
    return ops.ghost_dot(xa, dya, xb, dyb)


def squared_norms(part: Part) -> Tensor:
    """``(N,)`` squared lengths of one parameter's gradients."""
    if isinstance(part, Tensor):
        return part.square().sum(1)
    x, dy = part
    if x.shape[1] == 1:
        return x.square().sum((1, 2)) * dy.square().sum((1, 2))
    return ops.ghost_norm(x, dy).square()


def _count(inputs: Sequence[Any]) -> int:
    for x in inputs:
        if isinstance(x, Tensor) and x.dim() > 0:
            return len(x)
    raise InputError("inputs: expected a tensor whose first dimension is the samples")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight gradients within: the backward ends at the lowest hook."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
