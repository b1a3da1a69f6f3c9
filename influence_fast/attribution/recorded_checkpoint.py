"""A checkpoint of a recorded training, as the methods that go over them take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from influence_fast.ops import AdamState


@dataclass(frozen=True)
class RecordedCheckpoint:
    """One checkpoint of a recorded training.

    Attributes:
        step: optimizer steps before it.
        learning_rate: the mean over the steps since the checkpoint before.
        load: gives its model.
        moments: gives Adam's moments of the audited layers of that model.
    """

    step: int
    learning_rate: float
    load: Callable[[], nn.Module]
    moments: Callable[[nn.Module], Mapping[str, AdamState]]
