"""Influence of tokens: it sums to the row's, by the one-sample loop in float64."""

from __future__ import annotations

import models
import pytest
import torch

import influence_fast as inf
from influence_fast.attribution.token_influence import token_influence, token_layer


@pytest.mark.parametrize(
    ("name", "task", "lora", "part"),
    [
        ("bert", "classification", False, "layer.1.attention.self.value"),
        ("bert", "classification", False, "word_embeddings"),
        ("gpt2", "classification", True, "c_attn.lora_B"),
        ("llama", "causal", False, "layers.2.mlp.down_proj"),
    ],
)
def test_tokens_sum_to_the_row(name: str, task: str, lora: bool, part: str) -> None:
    model = models.make(name, task, lora).double().eval()
    if lora:
        for weight, values in model.named_parameters():
            if "lora_B" in weight:
                torch.nn.init.normal_(values, std=0.1)
    train, queries = models.rows(task, 7, seed=1), models.rows(task, 4, seed=2)
    layer = next(layer for layer in inf.select_layers(model, "all") if part in layer)
    found = token_influence(model, train, queries, layer, batch_tokens=24)
    g, v = (models.oracle(model, rows, [layer])[layer].flatten(1) for rows in (train, queries))
    assert [len(one) for one in found] == [len(row["input_ids"]) for row in train]
    # With LoRA some of GPT-2's forward is in float32 also where all weights are float64.
    rtol = 1e-6 if lora else 1e-9
    torch.testing.assert_close(torch.stack([one.sum() for one in found]), g @ v.mean(0), rtol=rtol, atol=1e-14)
    # One token's share, by the definition: the gradient of an embedding's row belongs to the token alone.
    if part == "word_embeddings":
        ids = train[0]["input_ids"]
        for token in set(ids):
            share = sum(float(found[0][place]) for place, one in enumerate(ids) if one == token)
            column = (g[0] * v.mean(0)).view(models.oracle(model, train[:1], [layer])[layer].shape[1:])
            assert share == pytest.approx(float(column[:, token].sum() if column.shape[1] == models.VOCAB else
                                                column[token].sum()), rel=1e-8, abs=1e-14)  # fmt: skip


def test_a_layer_that_sees_tokens_is_chosen() -> None:
    model = models.make("bert")
    rows = models.rows(count=4)
    layers = inf.select_layers(model, "all")
    chosen = token_layer(model, rows, layers)
    assert chosen in layers
    assert "encoder" in chosen
    assert token_layer(model, rows, ["classifier"]) is None
    embedding = next(layer for layer in layers if "word_embeddings" in layer)
    assert token_layer(model, rows, ["classifier", embedding]) == embedding
    with pytest.raises(inf.InputError, match="does not see the tokens"):
        token_influence(model, rows, rows, "classifier")
