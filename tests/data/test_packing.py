"""Texts packed into blocks, each as if it stood alone."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import influence_fast as inf
from influence_fast.data.batching import checked_rows
from influence_fast.data.packing import check_boundaries, pack
from influence_fast.data.tasks import is_packed
from influence_fast.gradients.losses import named

TEXTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13, 14]]


def test_blocks_keep_boundaries_and_begin_positions_anew() -> None:
    blocks, members = pack(TEXTS, 6)
    assert [block["input_ids"] for block in blocks] == [[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    assert [block["position_ids"] for block in blocks] == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert blocks[0]["labels"] == [-100, 4, 5, -100, 7, -100]
    assert members == [[0, 1, 2], [2]]
    assert [is_packed(block) for block in blocks] == [True, False]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mistral"])
def test_a_blocks_gradient_is_that_of_its_texts(name: str) -> None:
    """The literal loop over the texts alone: their token losses, weighed by the block's number of targets."""
    model = models.make(name, "causal").double()
    blocks, _ = pack(TEXTS, 6)
    check_boundaries(model, blocks)
    each = []
    for part in (TEXTS[0], TEXTS[1]):
        logits = model(torch.tensor([part])).logits[0, :-1].detach()
        each.append(nn.functional.cross_entropy(logits, torch.tensor(part[1:]), reduction="sum"))
    (layer,) = inf.select_layers(model, "mlp")[-1:]
    report = inf.verify_capture(model, blocks, layers=[layer])
    assert report.ok
    assert not report.one_row
    rows, kind = checked_rows(model, blocks)
    batch = rows.batch([0, 1], model)
    assert "attention_mask" not in batch
    model.config.use_cache = False
    found = named(kind, chunked=False)(model, batch)
    torch.testing.assert_close(found[0].detach(), (each[0] + each[1]) / 3)


def test_models_that_look_across_are_refused() -> None:
    blocks, _ = pack(TEXTS, 6)
    model = models.make("llama", "causal")
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **how: forward(*args, **how)
    with pytest.raises(inf.InputError, match="LlamaForCausalLM looks across their boundaries"):
        check_boundaries(model, blocks)

    class NoPositions(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(inf.InputError, match="NoPositions takes no position_ids"):
        check_boundaries(NoPositions(), blocks)
