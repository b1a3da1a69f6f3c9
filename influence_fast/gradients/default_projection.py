"""What to project with where nobody said: whole gradients of what is small, a small projection of what is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from influence_fast.gradients.capture import GradientCapture
from influence_fast.gradients.layers import is_partly_trained
from influence_fast.ops.projections import Projection

SMALL = Projection("sjlt", 256)
"""Of the projections that ``python -m benchmarks.default_projection`` measures, the smallest store with rankings next to
those of whole gradients."""
# Whole gradients up to this many times the size of projected ones are kept whole.
_WORTH = 4


def default_projection(model: nn.Module, layers: Iterable[str]) -> Projection:
    """Whole gradients of adapters and other trained parts of a model, and of small layers; else a small projection."""
    whole, small = (sum(numbers(model, layers, how).values()) for how in (Projection("identity"), SMALL))
    return Projection("identity") if is_partly_trained(model) or whole <= _WORTH * small else SMALL


def numbers(model: nn.Module, layers: Iterable[str], projection: Projection) -> Mapping[str, int]:
    """Numbers that a store keeps of each sample, by layer."""
    return GradientCapture(model, list(layers), projection).dims
