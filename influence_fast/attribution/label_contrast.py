"""Influence of a sample as labelled minus as labelled otherwise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from influence_fast.attribution.influence_matrix import InfluenceMatrix, inner_products
from influence_fast.attribution.method_inputs import MethodInputs
from influence_fast.gradients import losses


def make_contrast(inputs: MethodInputs, method: str) -> InfluenceMatrix:
    """``contrast-METHOD``: the training gradients are those of :func:`label_contrast`."""
    return inner_products(inputs.build("contrast", inputs.samples, label_contrast), inputs.queries, method)


def label_contrast(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Loss with the given label minus the mean loss with each other label, as a ``loss`` of ``build_store``.

    Gradients are linear in the loss, so a store built with it holds each sample's gradient with its given label minus the
    mean of those with the others, and its influence is the sample's influence as labelled minus as labelled otherwise.
    Cross entropies differ by logits alone, ``mean_{c != y} z_c - z_y``: one forward, one backward, and how confident the
    model is in the sample has no part in it. With two classes a sample's two gradients are parallel, so contrast changes
    their lengths alone: cosines stay as they are.
    """
    logits = losses.logits(model, batch)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    given = logits.gather(1, batch["labels"][:, None])[:, 0]
    return (logits.sum(1) - given) / (logits.shape[1] - 1) - given
