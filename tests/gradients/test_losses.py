"""The chunked causal loss: the same numbers and gradients as whole logits, whatever the chunks."""

from __future__ import annotations

import models
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.gradients import losses


def whole(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return models.losses(model, batch)


@pytest.mark.parametrize("entries", [1 << 25, 37 * 14, 37 * 3, 1])
@pytest.mark.parametrize("layers", ["head", "attention[2:],head", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_chunks_change_nothing(name: str, layers: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ENTRIES", entries)
    model, samples = models.make(name, "causal").requires_grad_(False), models.rows("causal")
    batch = models.collate(samples)
    truth = models.oracle(model, samples, inf.select_layers(model, layers))
    with inf.GradientCapture(model, layers) as capture:
        loss = losses.TokenLoss(part=capture.part)
        each = loss(model, batch)
        if each.requires_grad:
            each.sum().backward()
        got = capture.pop()
        assert loss._chunked
    torch.testing.assert_close(each.detach(), whole(model, batch))
    for layer, expected in truth.items():
        assert (got[layer].double() - expected.flatten(1)).norm() <= 1e-5 * expected.norm(), layer


def test_only_labelled_positions_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ENTRIES", 37 * 2)
    model = models.make("llama", "causal")
    samples = [{"input_ids": list(range(3, 15)), "labels": [-100] * 9 + [12, 13, 14]} for _ in range(3)]
    shapes: list[tuple[int, ...]] = []
    loss = losses.TokenLoss()
    loss(model, models.collate(samples))
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    loss(model, models.collate(samples))
    assert sum(shape[0] * shape[1] for shape in shapes) == 9
    assert max(shape[0] * shape[1] for shape in shapes) <= 2


def test_a_model_that_caps_its_logits_gets_whole_ones() -> None:
    config = hf.Gemma2Config(
        vocab_size=models.VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        head_dim=8,
        final_logit_softcapping=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = hf.Gemma2ForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.weight)
    batch, loss = models.collate(models.rows("causal")), losses.TokenLoss()
    torch.testing.assert_close(loss(model, batch), whole(model, batch))
    assert not loss._chunked


def test_the_sum_and_the_mean() -> None:
    model, samples = models.make("mistral", "causal"), models.rows("causal")
    batch = models.collate(samples)
    targets = torch.tensor([len(s["input_ids"]) - 2 for s in samples])
    torch.testing.assert_close(losses.TokenLoss(mean=False)(model, batch), whole(model, batch) * targets)
