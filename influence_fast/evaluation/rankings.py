"""Baselines to judge rankings by, and groups of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from influence_fast.attribution.gradient_source import Gradients, GradientSource
from influence_fast.gradients.layers import block_of, kind_of

BASELINES = ("random", "loss", "self-influence")


def baselines(train: Gradients, seed: int = 0) -> dict[str, Tensor]:
    """``random``, ``loss`` (highest first; where the store has it) and ``self-influence`` (largest ``|g|^2`` first)."""
    source = GradientSource("train", train)
    generator = torch.Generator().manual_seed(seed)
    out = {"random": torch.rand(source.rows, generator=generator, dtype=torch.float64)}
    if source.store is not None and "loss" in source.store.columns:
        out["loss"] = -source.store.column("loss").double()
    exact = source.store.sqnorm if source.store is not None else source.sqnorm
    out["self-influence"] = -sum((exact(name) for name in source.layers), torch.zeros(source.rows, dtype=torch.float64))
    return out


def groups_by_name(layers: Sequence[str]) -> dict[str, list[str]]:
    """Groups told by names alone: embedding, attention, mlp, head, each block, and all."""
    groups: dict[str, list[str]] = {name: [] for name in ("embedding", "attention", "mlp", "head")}
    for layer in layers:
        groups[kind_of(layer, torch.nn.Identity())].append(layer)
    for layer in layers:
        if (block := block_of(layer)) is not None:
            groups.setdefault(f"block {block}", []).append(layer)
    return {name: members for name, members in groups.items() if members} | {"all": list(layers)}
