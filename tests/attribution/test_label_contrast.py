"""Label contrast against gradients with each label."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch

import influence_fast as inf

NAMES = ["bert", "gpt2", "llama"]


def rows(task: str = "classification", count: int = 7, seed: int = 1) -> list[dict]:
    return models.rows(task, count, seed)


def relabelled(samples: list[dict], label: int) -> list[dict]:
    return [{**sample, "labels": label} for sample in samples]


@pytest.mark.parametrize("name", NAMES)
def test_label_contrast_is_the_given_label_minus_the_mean_of_the_others(tmp_path: Path, name: str) -> None:
    model, samples = models.make(name), rows()
    store = inf.build_store(
        tmp_path / "s", model, samples, "attention,head", "identity", inf.label_contrast, progress=False
    )
    by_label = [models.oracle(model, relabelled(samples, label), store.layers) for label in range(3)]
    for layer in store.layers:
        given = torch.tensor([sample["labels"] for sample in samples])
        stack = torch.stack([gradients[layer].flatten(1) for gradients in by_label])
        own = stack[given, torch.arange(len(samples))]
        expected = own - (stack.sum(0) - own) / 2
        torch.testing.assert_close(store.read(layer).double(), expected, rtol=1e-3, atol=1e-5)
