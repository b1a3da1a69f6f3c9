"""Names of version 0.1 that were replaced by the field's words. They warn, do the same, and go in version 2."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from influence_fast.attribution import label_quality, model_passes

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _renamed(new: str) -> Callable[[_Function], _Function]:
    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def warned(*args: Any, **kwargs: Any) -> Any:
            message = f"influence_fast.{function.__name__} is called influence_fast.{new} now"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return function(*args, **kwargs)

        return warned  # type: ignore[return-value]

    return decorate


@_renamed("class_log_probabilities")
def class_opinion(
    model: nn.Module, dataset: Sequence[Mapping[str, Any]], *, batch_tokens: int | str = "auto", progress: bool = True
) -> Tensor:
    """Renamed to :func:`~influence_fast.class_log_probabilities`."""
    return model_passes.class_log_probabilities(model, dataset, batch_tokens=batch_tokens, progress=progress)


@_renamed("neighbour_estimate")
def neighbour_opinion(
    states: Tensor, labels: Sequence[int] | Tensor, asked: Tensor, k: int = 50, classes: int | None = None
) -> label_quality.ClassEstimate:
    """Renamed to :func:`~influence_fast.neighbour_estimate`."""
    return label_quality.neighbour_estimate(states, labels, asked, k, classes)


@_renamed("probe_estimate")
def probe_opinion(
    states: Tensor, labels: Sequence[int] | Tensor, asked: Tensor, classes: int | None = None, seed: int = 0
) -> label_quality.ClassEstimate:
    """Renamed to :func:`~influence_fast.probe_estimate`."""
    return label_quality.probe_estimate(states, labels, asked, classes, seed)
