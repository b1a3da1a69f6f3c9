"""Gradients as Adam would step along them: the update of each sample's whole gradient, and then its projection.

No factor of a gradient has Adam's formula, so both factors wait until the batch's backward is done, and gradients that come
in parts are added up first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast import ops
from influence_fast.data.tasks import device_of
from influence_fast.errors import InputError
from influence_fast.gradients.captured_layer import CapturedLayer, GradientRecords, captured_layer
from influence_fast.gradients.layers import layers_by_name
from influence_fast.gradients.model_state import is_sharded
from influence_fast.gradients.sample_rows import Factors, Operand, TokenIds, oriented
from influence_fast.ops.arguments import accumulator
from influence_fast.ops.projections import Projection

# Entries of whole gradients, of several samples, that are held at once where their factors can wait.
_HELD_ENTRIES = 1 << 26
AdamStates = Mapping[str, ops.AdamState]


class _AdamRecords(GradientRecords):
    """Of factors the update, of whole gradients too, once all of a batch are there."""

    kept: Mapping[str, CapturedLayer]
    states: AdamStates
    arrived: frozenset[str] = frozenset()

    def form(self) -> None:
        self.arrived = frozenset([*self.gradients, *self.factors])
        for name, whole in self.gradients.items():
            self.gradients[name] = self.updated(name, whole)
        for name in list(self.factors):
            # Popped, so that beside a gradient there are the factors of the layers that follow alone.
            x, dy = self.factors.pop(name)
            layer = self.kept[name]
            if layer.single is not None:
                self.gradients[name] = ops.sketch_outer(x, dy, layer.single, adam=self.states[name])
                continue
            step = max(1, _HELD_ENTRIES // max(1, layer.shape[0] * layer.shape[1]))
            parts = zip(x.split(step), dy.split(step), strict=True)
            self.gradients[name] = torch.cat([self.updated(name, ops.outer(*part)) for part in parts])

    def updated(self, name: str, whole: Tensor) -> Tensor:
        """``(N, dim)`` of whole gradients ``(N, out * in)``, or of that shape folded."""
        layer = self.kept[name]
        return layer.projected(self.states[name].update(whole.reshape(len(whole), *layer.shape)), self.matrices)


# Of :class:`~influence_fast.GradientCapture`, which this module is below.
_Capture: Any = object


class AdamUpdates(_Capture):
    """What makes a :class:`~influence_fast.GradientCapture` give Adam's updates (Xia et al. 2024, eq. 3, as LESS has it).

    ``(b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)`` of each sample's whole gradient ``g``, then projected. A layer
    that a sample does not reach has ``g = 0``, whose update is not zero. A one-sided sketch of a layer that is used once
    forms no gradient; everything else holds whole gradients of a batch for a time.

    Raises:
        InputError: no state of a layer, or one of another shape; a bias column; a sharded model.
    """

    _kept_in = _AdamRecords

    def __init__(self, model: nn.Module, states: AdamStates, **settings: Any) -> None:
        if settings.pop("bias", False):
            raise InputError("adam: expected bias=False; a bias has moments of its own: select it as a layer")
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise InputError("adam: Adam's moments of a sharded model are not taken; load it whole")
        projection = Projection.parse(settings.pop("projection"))
        super().__init__(model, projection=Projection("identity"), **settings)
        known = layers_by_name(model)
        self._finished = [captured_layer(name, known[name], projection) for name in self.layers]
        for layer in self._finished:
            check_state(layer, states)
        device = device_of(model)
        self._records.kept = {layer.name: layer for layer in self._finished}
        self._records.states = {
            name: ops.AdamState(
                states[name].m.to(device), states[name].v.to(device), states[name].betas, states[name].eps
            )
            for name in self.layers
        }

    def _formed(
        self, layer: CapturedLayer, seen: Operand, dy: Tensor, transposed: bool = False, lengths: Tensor | None = None
    ) -> Any:
        if lengths is not None or isinstance(seen, TokenIds) or self._records.part is not None:
            return super()._formed(layer, seen, dy, transposed, lengths)
        factors: Factors = oriented(seen.to(accumulator(seen.dtype)), dy.to(accumulator(dy.dtype)), transposed)
        return factors

    def pop(self) -> dict[str, Tensor]:
        """Updates of the batch, as a capture's own ``pop`` gives gradients."""
        found: dict[str, Tensor] = super().pop()
        for name in set(found) - self._records.arrived:
            found[name] = self._records.updated(name, found[name])
        return found

    @property
    def dims(self) -> dict[str, int]:
        return {layer.name: layer.dim for layer in self._finished}

    @property
    def identifiers(self) -> dict[str, dict[str, str]]:
        return {layer.name: layer.identifiers for layer in self._finished}

    @property
    def captured_layers(self) -> list[CapturedLayer]:
        return list(self._finished)


def check_state(layer: CapturedLayer, states: AdamStates) -> None:
    """Raise InputError unless there is a state of a layer's shape."""
    state = states.get(layer.name)
    if state is None:
        raise InputError(
            f"adam: has no moments of layer {layer.name!r}, as of one that the optimizer did not train; there are those of "
            f"{', '.join(list(states)[:4])}{' and others' if len(states) > 4 else ''}"
        )
    if tuple(state.m.shape) != layer.shape:
        raise InputError(
            f"adam: expected moments of shape {layer.shape} for layer {layer.name!r}, got {tuple(state.m.shape)}"
        )


def digest_of(states: AdamStates, layers: list[str]) -> str:
    """SHA-256 of the states of some layers, in hexadecimal."""
    found = hashlib.sha256()
    for name in layers:
        state = states[name]
        found.update(f"{name} {tuple(state.m.shape)} {state.betas} {state.eps}\n".encode())
        for moment in (state.m, state.v):
            found.update(moment.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
