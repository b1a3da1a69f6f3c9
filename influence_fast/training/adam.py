"""Adam's moments of a model's layers, from the file that a Trainer saves beside a checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.captured_layer import captured_layer
from influence_fast.gradients.layers import layers_by_name, select_layers, uncompiled, weight_of
from influence_fast.ops import AdamState, Matrices
from influence_fast.ops.projections import Projection

_FILE = "optimizer.pt"


def read_adam(
    checkpoint: str | Path,
    model: nn.Module,
    layers: str | Iterable[str] | None = None,
    trained: Sequence[str] | None = None,
) -> dict[str, AdamState]:
    """Adam's moments by layer ``{layer: AdamState}``, for :func:`~influence_fast.build_store` (``adam=``).

    Args:
        checkpoint: a Trainer's checkpoint folder, or its ``optimizer.pt``; read by ``torch.load(weights_only=True)``, so it
            runs no code.
        model: the model of that checkpoint, of the same parameters in the same order. The file has numbers, no names: they
            are those of the trained parameters, first the ones with weight decay, as a Trainer gives them to the optimizer.
            Trained are those that require a gradient, or of an adapter that was loaded for inference its own. Where all
            require one and the file has fewer, they are told by their shapes, if these fit in one way alone.
        layers: as of :func:`~influence_fast.select_layers`; by default all whose weight was trained.
        trained: names of the trained parameters in the optimizer's order, as a recorded training has them
            (``Checkpoint.trained``), instead of what ``model`` says.

    Returns:
        moments ``(out, in)`` in float32, as gradients of the layers are, with the ``betas`` and ``eps`` of the optimizer.

    Raises:
        InputError: no such file; an optimizer that keeps other things than Adam does; parameters of other shapes or in
            another number; a layer that was not trained.
        StoreError: a file that is damaged.
    """
    path = Path(checkpoint)
    path = path / _FILE if path.is_dir() else path
    groups, states = _read(path)
    by_parameter = _by_parameter(path, model, groups, states, trained)
    known = layers_by_name(model)
    wanted = list(known) if layers is None else select_layers(model, layers)
    found, matrices = {}, Matrices()
    for name in wanted:
        state = by_parameter.get(id(weight_of(known[name])))
        if state is None:
            if layers is not None:
                raise InputError(
                    f"layers: {path} has no moments of {name!r}, which the optimizer did not train; leave it out (freeze in "
                    "the model what was frozen in training, and layers are by default what was trained)"
                )
            continue
        layer = captured_layer(name, known[name], Projection("identity"))
        m, v = (layer.as_kept([moment.float()[None]], matrices).reshape(layer.shape).clone() for moment in state[:2])
        found[name] = AdamState(m, v, state[2], state[3])
    if not found:
        raise InputError(f"layers: {path} has no moments of any layer of this {type(model).__name__}")
    return found


_Moments = tuple[Tensor, Tensor, tuple[float, float], float]


def _read(path: Path) -> tuple[list[dict[str, Any]], Mapping[int, Any]]:
    """Groups of parameters and states of an optimizer's file."""
    if not path.is_file():
        raise InputError(f"checkpoint: there is no {path}; a Trainer writes it unless save_only_model is set")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise StoreError(f"{path}: is damaged, or holds more than numbers ({str(error).splitlines()[0]})") from None
    if not isinstance(document, dict) or not {"state", "param_groups"} <= document.keys():
        raise InputError(f"checkpoint: {path} is no state of an optimizer")
    groups, states = document["param_groups"], document["state"]
    if any("betas" not in group or "eps" not in group for group in groups):
        raise InputError(f"checkpoint: {path} is of an optimizer that is not Adam (its groups have no betas and eps)")
    for number, state in states.items():
        moments = [state.get(name) for name in ("exp_avg", "exp_avg_sq")]
        if any(not isinstance(moment, Tensor) or not moment.is_floating_point() for moment in moments):
            raise InputError(
                f"checkpoint: {path} has no exp_avg and exp_avg_sq of parameter {number} in floating point; expected the "
                "state of Adam or AdamW as torch keeps it"
            )
    return groups, states


def _by_parameter(
    path: Path,
    model: nn.Module,
    groups: list[dict[str, Any]],
    states: Mapping[int, Any],
    trained: Sequence[str] | None,
) -> dict[int, _Moments]:
    """Moments by the id of the parameter that they are of; those that never had a gradient are left out."""
    numbers = [number for group in groups for number in group["params"]]
    ordered = _in_order(model) if trained is None else _named(model, trained)
    if len(numbers) < len(ordered) and trained is None and all(p.requires_grad for p in model.parameters()):
        shapes = [states[number]["exp_avg"].shape if number in states else None for number in numbers]
        ordered = _the_only_fit(ordered, shapes) or ordered
    if len(numbers) != len(ordered):
        raise InputError(
            f"model: {path} has {len(numbers)} trained parameters, and this {type(model).__name__} {len(ordered)}; expected "
            "the model of that checkpoint, with what was frozen frozen (requires_grad_(False)), or their names (trained=)"
        )
    found: dict[int, _Moments] = {}
    of_group = {number: group for group in groups for number in group["params"]}
    for number, (name, parameter) in zip(numbers, ordered, strict=True):
        if number not in states:
            continue
        m, v = states[number]["exp_avg"], states[number]["exp_avg_sq"]
        if m.shape != parameter.shape or v.shape != parameter.shape:
            raise InputError(
                f"model: {path} has moments of shape {tuple(m.shape)} where {name} has {tuple(parameter.shape)}; expected "
                "the model of that checkpoint"
            )
        group = of_group[number]
        found[id(parameter)] = m, v, tuple(map(float, group["betas"])), float(group["eps"])  # type: ignore[assignment]
    return found


def _in_order(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trained parameters as a Trainer hands them to its optimizer: with weight decay, then without."""
    named = list(model.named_parameters())
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trained and (adapters := getattr(model, "peft_config", None)):
        # Loaded for inference, an adapter is frozen.
        trained = [(name, parameter) for name, parameter in named if set(name.split(".")) & set(adapters)]
    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    return [pair for pair in trained if pair[0] in decayed] + [pair for pair in trained if pair[0] not in decayed]


def _named(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    known = {uncompiled(name): parameter for name, parameter in model.named_parameters()}
    lacking = [name for name in names if name not in known]
    if lacking:
        raise InputError(f"trained: this {type(model).__name__} has no parameter {lacking[0]!r}")
    return [(name, known[name]) for name in names]


def _the_only_fit(
    ordered: list[tuple[str, nn.Parameter]], shapes: list[torch.Size | None]
) -> list[tuple[str, nn.Parameter]] | None:
    """The parameters that have these shapes, some unknown, in this order; None where there are several choices, or none."""

    def earliest(parameters: list[nn.Parameter], wanted: list[torch.Size | None]) -> list[int]:
        """As early as can be, so that a choice that is not the only one differs from the latest."""
        places, at = [], 0
        for shape in wanted:
            at = (
                next((i for i in range(at, len(parameters)) if shape in (None, parameters[i].shape)), len(parameters))
                + 1
            )
            places.append(at - 1)
        return places

    count, parameters = len(ordered), [parameter for _, parameter in ordered]
    first = earliest(parameters, shapes)
    last = [count - 1 - place for place in reversed(earliest(parameters[::-1], shapes[::-1]))]
    return [ordered[place] for place in first] if first and first == last and max(first) < count else None
