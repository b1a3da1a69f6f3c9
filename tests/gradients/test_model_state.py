"""A model is left as it was found."""

from __future__ import annotations

from pathlib import Path

import models
from torch import nn

import influence_fast as inf

IDENTITY = inf.Projection("identity")


def make_store(path: Path, model: nn.Module, dataset, **kwargs) -> inf.GradientStore:
    return inf.build_store(path, model, dataset, progress=False, **{"projection": IDENTITY, **kwargs})


def test_the_model_is_put_back(tmp_path: Path) -> None:
    model = models.make("bert").train()
    model.bert.pooler.eval()
    model.classifier.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    make_store(tmp_path / "s", model, models.rows(), layers="head")
    assert flags == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    assert all(p.grad is None for p in model.parameters())
