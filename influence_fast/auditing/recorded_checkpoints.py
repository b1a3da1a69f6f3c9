"""The checkpoints of a recorded training, for the methods that go over them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from influence_fast.attribution.recorded_checkpoint import RecordedCheckpoint
from influence_fast.attribution.registry import get_method
from influence_fast.auditing.config import AuditConfig
from influence_fast.data.models import load_model
from influence_fast.errors import InputError
from influence_fast.gradients.layers import freeze_others, layers_by_name, uncompiled
from influence_fast.ops import AdamState
from influence_fast.training.adam import read_adam
from influence_fast.training.recorded import Checkpoint, RecordedTraining


def checkpoints_of(
    config: AuditConfig,
    training: RecordedTraining | None,
    network: nn.Module,
    layers: Sequence[str],
    methods: Sequence[str],
) -> list[RecordedCheckpoint]:
    """The checkpoints that ``methods`` need; none where they need none.

    Raises:
        InputError: a method needs checkpoints, and no training was given, or it has none, or one of them is gone, has no
            ``optimizer.pt`` or lacks a layer.
    """
    asking = [name for name in methods if "checkpoints" in get_method(name).needs]
    if not asking:
        return []
    if training is None:
        raise InputError(
            f"training: {asking[0]} goes over the checkpoints of a training; name the folder in which "
            "InfluenceCallback recorded it (--training)"
        )
    if not training.checkpoints:
        raise InputError(
            f"training: {config.training} has no checkpoint, and {asking[0]} needs some; train with save_strategy='epoch' "
            "or the like"
        )
    moments = [name for name in methods if "moments" in get_method(name).needs]
    for one in training.checkpoints:
        if not one.path.is_dir():
            raise InputError(
                f"training: the checkpoint {one.path} of {config.training} is gone, and {asking[0]} needs it; keep all "
                "(save_total_limit=None)"
            )
        if moments and (one.optimizer is None or not one.optimizer.exists()):
            raise InputError(f"training: the checkpoint {one.path} has no optimizer.pt, which {moments[0]} needs")
        model = _loaded(one, config, network)
        lacking = set(layers).difference(layers_by_name(model))
        if lacking:
            raise InputError(f"training: the checkpoint {one.path} lacks layer {min(lacking)!r} of the model")
        if moments:
            _moments(one, model, layers)
    return [_recorded(one, config, network, list(layers)) for one in training.checkpoints]


def _loaded(one: Checkpoint, config: AuditConfig, network: nn.Module) -> nn.Module:
    """The model of a checkpoint; of parameters that were not recorded as trained or not, ``network`` says it."""
    model = load_model(str(one.path), config.task, config.allow_new_weights)[0]
    own = [uncompiled(name) for name, parameter in network.named_parameters() if parameter.requires_grad]
    freeze_others(model, own if one.trained is None else one.trained)
    return model


def _moments(one: Checkpoint, model: nn.Module, layers: Sequence[str]) -> dict[str, AdamState]:
    # A model that was trained inside another has other names.
    known = set(one.trained or ()) <= {uncompiled(name) for name, _ in model.named_parameters()}
    return read_adam(one.path, model, layers, one.trained if known else None)


def _recorded(one: Checkpoint, config: AuditConfig, network: nn.Module, layers: list[str]) -> RecordedCheckpoint:
    def load() -> nn.Module:
        return _loaded(one, config, network)

    def moments(model: nn.Module) -> dict[str, AdamState]:
        return _moments(one, model, layers)

    return RecordedCheckpoint(one.step, one.learning_rate, load, moments)
