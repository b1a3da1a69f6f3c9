"""A model's state around a pass: eval mode and back, adapters off, low precision, what identifies its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from influence_fast.data.tasks import config_of, device_of, unwrapped
from influence_fast.errors import InputError
from influence_fast.gradients.layers import uncompiled

_WITHIN = {"use_cache": False, "return_dict": True}

# What DistributedDataParallel.no_sync switches off.
_SYNC = ("require_backward_grad_sync", "require_forward_param_sync")


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode, no weight gradients, no key-value cache, outputs by name; everything as it was afterwards."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = [config for config in (config_of(model), getattr(unwrapped(model), "config", None)) if config is not None]
    names = {*_WITHIN, "pad_token_id"}
    kept = [(config, name, getattr(config, name)) for config in configs for name in names if hasattr(config, name)]
    # DistributedDataParallel would wait for gradients of all its parameters, and average those of one row over processes.
    synchronised = [
        (module, name, getattr(module, name))
        for module in modules
        for name in _SYNC
        if name in module.__dict__ or hasattr(type(module), name)
    ]
    model.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    for module, name, _ in synchronised:
        setattr(module, name, False)
    for config, name, value in kept:
        setattr(config, name, _WITHIN.get(name, value))
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, value in synchronised:
            setattr(module, name, value)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for config, name, value in kept:
            setattr(config, name, value)


@contextmanager
def before_fine_tuning(model: nn.Module) -> Iterator[None]:
    """Within, a PEFT model is the one that its adapter was put on; any other model stays as it is."""
    with cast(Any, model).disable_adapter() if is_adapted(model) else nullcontext():
        yield


def is_adapted(model: nn.Module) -> bool:
    """Whether this is a PEFT model, whose adapter can be switched off."""
    return callable(getattr(model, "disable_adapter", None))


def is_trained_inside(model: nn.Module) -> bool:
    """Whether a training may have changed the weights below the head, so that hidden states know the labels.

    Not of an adapter's base, nor of a model of which the head alone is trained.
    """
    if is_adapted(model):
        return False
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return base is None or any(weight.requires_grad for weight in base.parameters())


def autocast(model: nn.Module, precision: str | None) -> AbstractContextManager[Any]:
    """Autocast of the model's device; no context for None."""
    if precision is None:
        return nullcontext()
    if precision not in ("bfloat16", "float16"):
        raise InputError(f"precision: expected None, 'bfloat16' or 'float16', got {precision!r}")
    return torch.autocast(device_of(model).type, getattr(torch, precision))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device or the host ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter and buffer that the model saves: name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if is_sharded(tensor):
            tensor = cast(Any, tensor).full_tensor()
        digest.update(f"{uncompiled(name)} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in _plain_parts(tensor.detach()):
            if part.numel():
                digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that a quantising library's own type is made of; any other one as it is."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = cast(Any, tensor).__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process has a part of the parameter alone (a DTensor, as FSDP2 makes them)."""
    return hasattr(parameter, "full_tensor")
