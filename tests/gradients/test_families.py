"""Families that need more than plain hooks keep whole batches: scaled and shared embeddings, positions, other layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import peft
import pytest
import torch
import transformers as hf
from torch import nn

import influence_fast as inf

_BASE: dict[str, Any] = {
    "vocab_size": models.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SPECIAL = ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
_BART: dict[str, Any] = {
    **{name: _BASE[name] for name in _SPECIAL},
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 2,
    "scale_embedding": True,
}
_T5 = {
    "vocab_size": models.VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_XLNET = {"vocab_size": models.VOCAB, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "num_labels": 3}


def _prompt() -> nn.Module:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**_BASE, num_key_value_heads=2))
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def _dora() -> nn.Module:
    model = hf.BertForSequenceClassification(hf.BertConfig(**_BASE))
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"], init_lora_weights=False, use_dora=True)
    return peft.get_peft_model(model, config)


# Model, kind of rows, what autograd takes (a part of every such name), what may be elsewhere than in the first dimension.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, str | None, set[str]]] = {
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART)), "seq2seq", None, set()),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
        "seq2seq",
        "relative_attention_bias",
        set(),
    ),
    "gemma2": (
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_BASE, num_key_value_heads=1, head_dim=8)),
        "causal",
        None,
        set(),
    ),
    "opt": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**_BASE, ffn_dim=24, word_embed_proj_dim=16)),
        "causal",
        None,
        set(),
    ),
    "xlnet": (
        lambda: hf.XLNetForSequenceClassification(hf.XLNetConfig(**_XLNET)),
        "classification",
        "",
        {"second"},
    ),
    "longformer": (
        lambda: hf.LongformerForSequenceClassification(hf.LongformerConfig(**_BASE, attention_window=4)),
        "classification",
        None,
        {"second"},
    ),
    "choices": (lambda: hf.BertForMultipleChoice(hf.BertConfig(**_BASE)), "choices", None, {"grouped"}),
    "dora": (_dora, "classification", None, set()),
    "prompt": (_prompt, "causal", "prompt_encoder", set()),
}


def _rows(kind: str) -> list[dict]:
    made = models.rows("causal" if kind == "causal" else "classification", count=5)
    for number, row in enumerate(made):
        if kind == "choices":
            row |= {"input_ids": [row["input_ids"], row["input_ids"][::-1]], "labels": number % 2}
        elif kind == "seq2seq":
            row["labels"] = row["input_ids"][::-1][:4]
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_batches_are_kept(name: str) -> None:
    torch.manual_seed(0)
    make, kind, exact, layouts = FAMILIES[name]
    model, given = make().eval(), _rows(kind)
    for parameter in model.parameters():
        if parameter.requires_grad and float(parameter.detach().abs().sum()) == 0:
            nn.init.normal_(parameter, std=0.1)
    report = inf.verify_capture(model, given, "auto", "trained", "rademacher:3x2")
    assert report.ok
    assert not report.one_row
    assert all(exact is not None and exact in layer for layer in report.exact), report.exact
    assert bool(report.exact) == (exact is not None)
    assert set(report.layouts.values()) == layouts


def test_a_gradient_of_roundings_alone_takes_the_fast_way() -> None:
    """What is added to all choices alike changes no probability."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = hf.BertForMultipleChoice(hf.BertConfig(**_BASE)).eval()
        nn.init.normal_(model.classifier.weight)
        ids = torch.randint(3, models.VOCAB, (5, 7, 9))
        rows = [{"input_ids": row.tolist(), "labels": number} for number, row in enumerate(ids)]
        report = inf.verify_capture(model, rows, "auto", "trained")
        assert report.ok
        assert not report.exact
