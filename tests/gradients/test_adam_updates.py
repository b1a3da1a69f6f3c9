"""Stores of Adam's updates against the literal formula on float64 gradients of one row at a time."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import influence_fast as inf
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.layers import named_layers
from influence_fast.ops import AdamState


def moments(shapes, seed=0):
    """Moments of plausible sizes, large where gradients are and near zero elsewhere."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: AdamState(
            torch.randn(shape, generator=random) * 0.05,
            torch.rand(shape, generator=random).square() * 0.02,
            (0.8, 0.9),
            1e-6,
        )
        for name, shape in shapes.items()
    }


def literal(gradients, states):
    """The formula entry by entry, in float64."""
    out = {}
    for name, g in gradients.items():
        state = states[name]
        m, v, (b1, b2) = state.m.double(), state.v.double(), state.betas
        out[name] = (b1 * m + (1 - b1) * g) / torch.sqrt(b2 * v + (1 - b2) * g * g + state.eps)
    return out


def built(path, model, rows, layers, states, projection="identity", **options):
    return inf.build_store(path, model, rows, layers, projection, adam=states, progress=False, shard_rows=3, **options)


@pytest.mark.parametrize(
    ("family", "task", "lora"),
    [("bert", "classification", True), ("gpt2", "causal", False), ("llama", "causal", False)],
)
def test_updates_are_those_of_whole_gradients(tmp_path, family, task, lora):
    """Embeddings, tied heads, Conv1D, LoRA, heads in chunks: a sample's gradient is whole before the formula."""
    model, rows = models.make(family, task, lora), models.rows(task)
    layers = [n for n in inf.select_layers(model, "trained" if lora else "all") if n in named_layers(model)][-9:]
    if task == "causal":
        layers = sorted({*layers, *inf.select_layers(model, "embedding")})
    gradients = models.oracle(model, rows, layers)
    states = moments({name: g.shape[1:] for name, g in gradients.items()})
    expected = literal(gradients, states)
    for projection in ("identity", "rademacher:4x4", "sjlt:64"):
        store = built(tmp_path / projection.replace(":", "-"), model, rows, layers, states, projection)
        plain = inf.Projection.parse(projection)
        for name in layers:
            whole = expected[name].float()
            if plain.kind == "rademacher":
                left = plain.side(name, "left", whole.shape[1]).matrix(torch.float32, "cpu")
                right = plain.side(name, "right", whole.shape[2]).matrix(torch.float32, "cpu")
                whole = left @ whole @ right.T
            elif plain.kind == "sjlt":
                whole = inf.ops.sketch(whole.flatten(1), plain.side(name, "single", whole[0].numel()))
            torch.testing.assert_close(
                store.read(name), whole.flatten(1), atol=2e-4, rtol=2e-4, msg=f"{projection} {name}"
            )


def test_norms_and_biases_that_are_layers_are_exact(tmp_path):
    model, rows = models.make("bert"), models.rows()
    layers = ["bert.encoder.layer.1.output.LayerNorm.weight", "classifier.bias"]
    parameters = dict(model.named_parameters())
    plain = inf.build_store(tmp_path / "plain", model, rows, layers, "identity", progress=False)
    states = moments({name: (parameters[name].numel(), 1) for name in layers})
    store = built(tmp_path / "adam", model, rows, layers, states)
    for name in layers:
        expected = literal({name: plain.read(name).double()[..., None]}, states)[name]
        torch.testing.assert_close(store.read(name), expected[..., 0].float(), atol=1e-5, rtol=1e-4)


class Unused(nn.Module):
    """A classifier whose second layer some rows do not reach, and whose first is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.twice = nn.Embedding(models.VOCAB, 6), nn.Linear(6, 6)
        self.head, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.twice(torch.tanh(self.twice(self.table(input_ids))))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.head((hidden * mask[..., None]).sum(1))


@pytest.mark.parametrize("projection", ["identity", "sjlt:16"])
def test_a_layer_used_twice_and_one_not_at_all(tmp_path, projection):
    model, rows = Unused(), models.rows()
    layers = ["twice", "idle", "head"]
    states = moments({"twice": (6, 6), "idle": (3, 6), "head": (3, 6)})
    store = built(tmp_path / "store", model, rows, layers, states, projection, loss="classification")
    weights = [model.twice.weight, model.head.weight]
    for i, row in enumerate(rows):
        loss = nn.functional.cross_entropy(model(torch.tensor([row["input_ids"]])), torch.tensor([row["labels"]]))
        twice, head = torch.autograd.grad(loss, weights)
        expected = literal({"twice": twice.double(), "head": head.double(), "idle": torch.zeros(3, 6).double()}, states)
        for name in layers:
            flat = expected[name].float().flatten()[None]
            if projection != "identity":
                flat = inf.ops.sketch(flat, inf.Projection.parse(projection).side(name, "single", flat.shape[1]))
            torch.testing.assert_close(store.read(name)[i], flat[0], atol=1e-4, rtol=1e-4)


def test_a_store_knows_its_moments(tmp_path):
    model, rows = models.make("bert"), models.rows()
    states = moments({"classifier": (3, 16)})
    built(tmp_path / "store", model, rows, ["classifier"], states)
    built(tmp_path / "store", model, rows, ["classifier"], states)
    for other in (moments({"classifier": (3, 16)}, 1), None):
        with pytest.raises(StoreError, match="Adam's moments"):
            built(tmp_path / "store", model, rows, ["classifier"], other)
    with pytest.raises(StoreError, match="Adam's updates"):
        inf.append_store(tmp_path / "store", model, rows)
    for states, words, options in (
        ({}, "no moments of layer 'classifier'", {}),
        (moments({"classifier": (3, 15)}), r"shape \(3, 16\)", {}),
        (moments({"classifier": (3, 16)}), "bias=False", {"bias": True}),
    ):
        with pytest.raises(InputError, match=words):
            built(tmp_path / "other", model, rows, ["classifier"], states, **options)
