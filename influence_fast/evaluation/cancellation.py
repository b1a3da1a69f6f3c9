"""How far the gradients of a layer cancel over the training set."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from influence_fast.attribution.gradient_source import Gradients, GradientSource, chosen_layers


def cancellation(gradients: Gradients, layers: Sequence[str] | None = None) -> dict[str, float]:
    """``sum_i |g_i|_1 / |sum_i g_i|_1`` of each layer over all samples, summed in float64; infinity where the sum is 0.

    ``gradients`` is a store or ``{layer: (n, dim)}``.
    """
    source = GradientSource("gradients", gradients)
    out = {}
    for name in chosen_layers(source.layers, layers):
        total, absolute = torch.zeros(source.dim(name), dtype=torch.float64), 0.0
        for block in source.blocks(name):
            values = source.read(name, block).double()
            total += values.sum(0)
            absolute += float(values.abs().sum())
        norm = float(total.abs().sum())
        out[name] = absolute / norm if norm else math.inf
    return out
