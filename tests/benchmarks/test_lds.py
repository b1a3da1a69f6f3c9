"""Our scores of the LDS benchmark: layers that were trained, and a damping that the last checkpoint chooses for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf
from benchmarks import lds

SETTINGS = {"samples": 24, "query_samples": 6, "epochs": 3}


def test_frozen_layers_are_left_out() -> None:
    task, model = lds.TASKS["digits"](SETTINGS), lds.Digits()
    assert lds.layers_of(task, model) == ["hidden", "head"]
    model.hidden.requires_grad_(False)
    assert lds.layers_of(task, model) == ["head"]


def test_the_last_checkpoint_chooses_the_damping_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = lds.TASKS["digits"](SETTINGS)
    epochs = lds.fit(task, torch.arange(24))[1]
    asked = []

    def choose(model: Any, rows: Any, store: Any, **options: Any) -> dict[str, float]:
        asked.append(model.head.weight.detach().clone())
        return {"hidden": 0.3, "head": 0.02}

    monkeypatch.setattr(inf, "held_out_damping", choose)
    found = lds.held_out(task, 0, epochs)
    assert len(asked) == 1
    assert torch.equal(asked[0], epochs[-1]["head.weight"])
    for place, (weights, scores) in enumerate(zip(epochs, found, strict=True)):
        model = lds.model_at(task, 0, weights)
        stores = lds.stores_of(task, model, task.layers, tmp_path / str(place))
        factors = inf.kronecker_factors(model, task.rows, task.layers, progress=False)
        layers = [
            inf.influence(*stores, "ekfac", damping=damping, factors=factors).layer(name)
            for name, damping in (("hidden", 0.3), ("head", 0.02))
        ]
        torch.testing.assert_close(scores[lds.HELD_OUT], sum(layers))
        equal = sum(layer / layer.square().mean().sqrt() for layer in layers)
        torch.testing.assert_close(scores[lds.EQUAL], equal, rtol=1e-4, atol=1e-4)
