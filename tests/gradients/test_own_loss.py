"""Losses by name, by place and as callables, and the check that a row's loss is its own."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.gradients.losses import PreferenceLoss
from influence_fast.gradients.own_loss import described, find_loss

ROWS = models.rows()


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def smoothed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = logits(model, batch)
    return nn.functional.cross_entropy(found, batch["labels"], reduction="none", label_smoothing=0.1)


def averaged(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return smoothed(model, batch) / len(batch["labels"])


def contrasted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = 10 * logits(model, batch)
    return (found - found.mean(0)).square().sum(1)


def test_losses_are_found() -> None:
    assert find_loss("auto", "regression") == "regression"
    assert find_loss(smoothed) is smoothed
    place = described(smoothed)
    assert find_loss(place) is smoothed
    found = find_loss("auto", "preference", 0.3)
    assert isinstance(found, PreferenceLoss)
    assert found.beta == 0.3


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("nope", "loss: expected package.module:function, or one of"),
        ("no.such.module:loss", "loss: cannot import 'no.such.module'"),
        ("math:nope", "loss: 'math' has no function 'nope'"),
        ("math:pi", "loss: 'math' has no function 'pi'"),
    ],
)
def test_what_is_none_is_said(loss: str, message: str) -> None:
    with pytest.raises(inf.InputError, match=message):
        find_loss(loss)
    with pytest.raises(inf.InputError, match="beta: it is a setting of the loss of preferences"):
        find_loss("auto", "causal-lm", 0.1)


def test_a_loss_of_rows_alone_is_taken(tmp_path: Path) -> None:
    model = models.make("bert")
    store = inf.build_store(tmp_path / "s", model, ROWS, "head", "identity", smoothed, progress=False)
    weight = model.classifier.weight.requires_grad_()
    for i, row in enumerate(ROWS):
        (grad,) = torch.autograd.grad(smoothed(model, models.collate([row])).sum(), [weight])
        torch.testing.assert_close(store.read("classifier")[i], grad.flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [averaged, contrasted])
def test_a_loss_over_the_batch_is_refused(tmp_path: Path, loss: object) -> None:
    with pytest.raises(inf.InputError, match=r"loss: that of row \d changes with the other rows of its batch"):
        inf.build_store(tmp_path / "s", models.make("bert"), ROWS, "head", loss=loss, progress=False)


def test_columns_that_a_loss_names_reach_it(tmp_path: Path) -> None:
    def weighted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return smoothed(model, batch) * batch["weight"]

    weighted.columns = ("weight",)  # type: ignore[attr-defined]
    rows = [{**row, "weight": float(i)} for i, row in enumerate(ROWS)]
    model = models.make("bert")
    stores = [
        inf.build_store(tmp_path / name, model, rows, "head", loss=loss, progress=False)
        for name, loss in (("s", smoothed), ("w", weighted))
    ]
    torch.testing.assert_close(stores[1].column("loss"), stores[0].column("loss") * torch.arange(len(rows)))
