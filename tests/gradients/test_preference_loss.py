"""DPO's loss and its gradient, one a pair, against the formula taken literally."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.data.batching import checked_rows
from influence_fast.gradients.losses import PreferenceLoss

ROWS = [
    {"input_ids": [[3, 4, 5, 6], [3, 4, 7]], "labels": [[-100, -100, 5, 6], [-100, -100, 7]]},
    {"input_ids": [[8, 9], [8, 10, 11, 12, 13]], "labels": [[-100, 9], [-100, 10, 11, 12, 13]]},
    {"input_ids": [[3, 14, 15], [3, 16, 17]], "labels": [[-100, 14, 15], [-100, 16, 17]]},
    {"input_ids": [[5, 6, 20], [5, 21]], "labels": [[-100, -100, 20], [-100, 21]]},
]


def log_probability(model: nn.Module, ids: list[int], labels: list[int]) -> Tensor:
    each = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(each[place - 1, label] for place, label in enumerate(labels) if label != -100)


def literal(model: nn.Module, reference: nn.Module, row: dict, beta: float) -> Tensor:
    ours, theirs = ([log_probability(m, *pair) for pair in zip(*row.values(), strict=True)] for m in (model, reference))
    return -nn.functional.logsigmoid(beta * ((ours[0] - theirs[0].detach()) - (ours[1] - theirs[1].detach())))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_one_gradient_a_pair(tmp_path: Path, name: str, beta: float) -> None:
    """The reference is the model with its adapter switched off."""
    model = models.make(name, "causal", lora=True)
    base = models.make(name, "causal")
    loss = PreferenceLoss(beta)
    layers = inf.select_layers(model, "lora")
    store = inf.build_store(tmp_path / "s", model, ROWS, layers, "identity", loss, progress=False)
    assert store.meta["loss"] == ("preference" if beta == 0.1 else "preference beta=0.7")
    assert "one_row" not in store.meta["settings"]
    model, base = model.double(), base.double()
    weights = {layer: model.get_submodule(layer).weight.requires_grad_() for layer in layers}
    for i, row in enumerate(ROWS):
        value = literal(model, base, row, beta)
        assert float(store.column("loss")[i]) == pytest.approx(float(value), rel=1e-5)
        found = torch.autograd.grad(value, list(weights.values()))
        for layer, grad in zip(layers, found, strict=True):
            torch.testing.assert_close(store.read(layer)[i], grad.flatten().float(), rtol=1e-4, atol=1e-7)


def test_a_reference_beside_a_model_that_was_trained_as_a_whole(tmp_path: Path) -> None:
    model, reference = models.make("llama", "causal"), models.make("llama", "causal", seed=1)
    loss = PreferenceLoss(0.5, reference)
    store = inf.build_store(tmp_path / "s", model, ROWS, "mlp", "identity", loss, progress=False)
    want = [float(literal(model.double(), reference.double(), row, 0.5)) for row in ROWS]
    assert store.column("loss").tolist() == pytest.approx(want, rel=1e-5)
    assert store.meta["loss"].startswith("preference beta=0.5 reference=")
    other = PreferenceLoss(0.5, models.make("llama", "causal", seed=2))
    assert other.__qualname__ != loss.__qualname__


def test_the_model_is_left_as_it_was() -> None:
    model = models.make("llama", "causal", lora=True)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    rows, kind = checked_rows(model, ROWS)
    assert kind == "preference"
    PreferenceLoss()(model, rows.batch([0, 1], model)).sum().backward()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    for beta in (0, -1, math.inf, True, "x"):
        with pytest.raises(inf.InputError, match="beta: expected a positive number"):
            PreferenceLoss(beta)
    model = models.make("llama", "causal")
    wrong = {"input_ids": [[3, 4], [3, 5]], "labels": [[-100, 4], [-100, -100]]}
    three = {"input_ids": [[3, 4]] * 3, "labels": [[-100, 4]] * 3}
    for rows, message in (
        (ROWS, r"LlamaForCausalLM has no adapter to switch off.*--reference DIR"),
        ([ROWS[0], wrong], "row 1 has no target token"),
        ([three], "should be two lists, of the chosen and the rejected answer"),
    ):
        with pytest.raises(inf.InputError, match=message):
            inf.build_store(tmp_path / "s", model, rows, "mlp", loss=PreferenceLoss(), progress=False)
