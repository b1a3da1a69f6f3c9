"""Hidden states before fine-tuning, seen while gradients are taken, are those that a pass of their own gives."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

import influence_fast as inf
from influence_fast.attribution import model_passes
from influence_fast.attribution.model_passes import ModelPasses
from influence_fast.attribution.seen_passes import SeenPasses, rerunnable
from influence_fast.data.batching import checked_rows
from influence_fast.gradients.build import build_from
from influence_fast.gradients.settings import BuildSettings

CASES = [(name, what) for name in models.CLASSIFIERS for what in ("plain", "all blocks", "last block")]


def make(name: str, what: str) -> nn.Module:
    if what != "last block":
        return models.make(name, lora=what == "all blocks")
    targets = models._LORA_TARGETS.get(name, ["q_proj", "v_proj"])
    config = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=targets, layers_to_transform=[3])
    return with_effect(get_peft_model(models.make(name), config))


def with_effect(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def settings_of(model: nn.Module) -> BuildSettings:
    # Several batches, so that each comes after an adapter was switched off and on.
    return BuildSettings(layers=inf.select_layers(model, "attention"), loss="classification", batch_tokens=30)


@pytest.mark.parametrize(("name", "what"), CASES)
def test_states_and_predictions_are_those_of_passes_of_their_own(name: str, what: str, tmp_path: Path) -> None:
    model, rows = make(name, what), models.rows(count=11)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    blocks = rerunnable(model, checked_rows(model, rows)[0])
    assert blocks is not None
    assert blocks.adapted == {"plain": 4, "all blocks": 0, "last block": 3}[what]
    seen = SeenPasses(len(rows), blocks)
    with seen.watched():
        watched = build_from(tmp_path / "a", model, rows, settings_of(model), progress=False, watch=seen)
    assert asked == [parameter.requires_grad for parameter in model.parameters()]
    # Within the pass no weight asked for a gradient.
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = build_from(tmp_path / "b", model, rows, settings_of(model), progress=False)
    for layer in plain.layers:
        torch.testing.assert_close(watched.read(layer), plain.read(layer))
    own = ModelPasses(model, lambda part: part, progress=False)
    assert not seen.base_states().requires_grad
    torch.testing.assert_close(seen.base_states(), own.all_states(rows, base=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.log_probabilities(), own.class_log_probabilities(rows), rtol=1e-4, atol=1e-5)
    if what != "plain":
        # The adapter does something, and is on again.
        assert not torch.allclose(own.all_states(rows)[:, -1], own.all_states(rows, base=True)[:, -1], atol=1e-2)
    # Nothing is watched any more: the passes since then left nothing.
    assert not blocks._calls


def test_a_checkpointed_model_runs_its_blocks_again_in_the_backward(tmp_path: Path) -> None:
    model, rows = make("bert", "last block"), models.rows(count=9)
    wanted = ModelPasses(model, lambda part: part, progress=False).all_states(rows, base=True)
    model.gradient_checkpointing_enable()
    seen = SeenPasses(len(rows), rerunnable(model, checked_rows(model, rows)[0]))
    with seen.watched():
        build_from(tmp_path / "a", model, rows, settings_of(model), progress=False, watch=seen)
    torch.testing.assert_close(seen.base_states(), wanted, rtol=1e-4, atol=1e-5)


def test_no_more_rows_are_tried_than_a_batch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make("bert", "last block"), models.rows(count=9)
    sizes, plain = [], model.base_model.model.bert.forward
    monkeypatch.setattr(
        model.base_model.model.bert, "forward", lambda ids, *a, **b: sizes.append(ids.numel()) or plain(ids, *a, **b)
    )
    assert rerunnable(model, checked_rows(model, rows)[0], batch_tokens=12) is not None
    assert max(sizes) <= 12


def test_rows_that_were_not_seen_leave_nothing_known(tmp_path: Path) -> None:
    model, rows = make("bert", "last block"), models.rows(count=9)
    blocks = rerunnable(model, checked_rows(model, rows)[0])
    for _ in range(2):
        seen = SeenPasses(len(rows), blocks)
        with seen.watched():
            build_from(tmp_path / "a", model, rows, settings_of(model), progress=False, watch=seen)
    # The second time all rows were there already.
    assert seen.base_states() is None
    assert seen.log_probabilities() is None


def adapted_word_embedding() -> nn.Module:
    config = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["word_embeddings", "query"])
    return with_effect(get_peft_model(models.make("bert"), config))


def shared_block() -> nn.Module:
    torch.manual_seed(0)
    config = {**models._ENCODER, "embedding_size": 8}
    return hf.AlbertForSequenceClassification(hf.AlbertConfig(**config)).eval()


def encoder_and_decoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": models.VOCAB, "num_labels": 3}
    blocks = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    return hf.BartForSequenceClassification(hf.BartConfig(**sizes, **blocks)).eval()


@pytest.mark.parametrize("build", [adapted_word_embedding, shared_block, encoder_and_decoder])
def test_other_models_are_left_to_a_pass_of_their_own(build: object) -> None:
    # Each ends in the token that BART's classifier reads.
    model, rows = build(), [{**row, "input_ids": [*row["input_ids"], 2]} for row in models.rows(count=9)]
    assert rerunnable(model, checked_rows(model, rows)[0]) is None


def test_states_beyond_memory_go_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make("bert", "last block"), models.rows(count=9)
    wanted = ModelPasses(model, lambda part: part, progress=False).all_states(rows, base=True)
    monkeypatch.setattr(model_passes, "_IN_MEMORY", 4 * wanted.numel() - 1)
    made = []
    plain = model_passes.tempfile.TemporaryFile
    monkeypatch.setattr(
        model_passes.tempfile, "TemporaryFile", lambda **given: made.append(given["dir"]) or plain(**given)
    )
    seen = SeenPasses(len(rows), rerunnable(model, checked_rows(model, rows)[0]), tmp_path)
    with seen.watched():
        build_from(tmp_path / "a", model, rows, settings_of(model), progress=False, watch=seen)
    torch.testing.assert_close(seen.base_states(), wanted, rtol=1e-4, atol=1e-5)
    assert made == [tmp_path]
