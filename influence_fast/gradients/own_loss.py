"""Which loss a user means: by name, by the place of a function, or by settings of one that has some."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from torch import nn

from influence_fast.data.batching import Loss
from influence_fast.data.tasks import LOSSES
from influence_fast.errors import InputError
from influence_fast.gradients.losses import PreferenceLoss


def find_loss(
    loss: str | Loss, task: str = "auto", beta: float | None = None, reference: nn.Module | None = None
) -> str | Loss:
    """A loss to build with.

    Args:
        loss: one of ``LOSSES``, ``package.module:function``, or a callable ``(model, batch) -> (N,)``.
        task: what ``auto`` becomes.
        beta, reference: of the loss of preferences.

    Raises:
        InputError: no such name, module or function; ``beta`` or ``reference`` with another loss.
    """
    if isinstance(loss, str):
        loss = task if loss == "auto" else loss
        if ":" in loss:
            loss = _imported(loss)
        elif loss not in LOSSES:
            raise InputError(f"loss: expected package.module:function, or one of {', '.join(LOSSES)}, got {loss!r}")
    if loss == "preference" and (beta is not None or reference is not None):
        return PreferenceLoss(0.1 if beta is None else beta, reference)
    if beta is not None or reference is not None:
        name = "beta" if beta is not None else "reference"
        raise InputError(f"{name}: it is a setting of the loss of preferences, and the loss here is {described(loss)}")
    return loss


def described(loss: str | Loss) -> str:
    """A loss as text that finds it again."""
    if isinstance(loss, str):
        return loss
    name = getattr(loss, "__qualname__", type(loss).__name__)
    return name if getattr(loss, "kind", None) == "preference" else f"{getattr(loss, '__module__', '')}:{name}"


def _imported(place: str) -> Loss:
    module, _, name = place.partition(":")
    # As for ``python -m``: a module beside which the command runs is found.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"loss: cannot import {module!r} ({error})") from None
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InputError(f"loss: {module!r} has no function {name!r}")
    return found
