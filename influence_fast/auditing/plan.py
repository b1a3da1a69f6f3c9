"""An audit made concrete: everything is read, chosen and checked, nothing computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from influence_fast.auditing.config import AuditConfig, RankingPlan
from influence_fast.data.samples import Samples
from influence_fast.gradients.settings import BuildSettings


@dataclass(frozen=True)
class AuditPlan:
    """What an audit works on, all of it decided.

    Attributes:
        config: the settings, with what was left open decided.
        model: the network.
        samples, trusted: the training samples and the queries.
        task: what the model does.
        layers: names of the layers whose gradients are taken.
        ranking: which rankings are made.
        build: how gradients are taken.
        held_out: what stands for queries where none were given, in a sentence; empty otherwise.
    """

    config: AuditConfig
    model: nn.Module
    samples: Samples
    trusted: Samples
    task: str
    layers: list[str]
    ranking: RankingPlan
    build: BuildSettings
    held_out: str = ""
