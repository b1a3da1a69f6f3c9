"""A model is left as it was found."""

from __future__ import annotations

from pathlib import Path

import models
from torch import nn

import influence_fast as inf
from influence_fast.gradients.model_state import as_evaluated

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


def test_nothing_is_synchronised_within() -> None:
    """DistributedDataParallel would average the gradients of different rows over processes."""

    class Synchronised(nn.Module):
        require_backward_grad_sync, require_forward_param_sync = True, True

    model = Synchronised()
    with as_evaluated(model):
        assert not model.require_backward_grad_sync
        assert not model.require_forward_param_sync
    assert model.require_backward_grad_sync
    assert model.require_forward_param_sync
