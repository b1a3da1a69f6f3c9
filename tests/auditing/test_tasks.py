"""Audits of everything that models do, from rows of texts, and the noise that a self-check plants in each."""

from __future__ import annotations

from pathlib import Path

import models
import pandas as pd
import pytest
import torch
import transformers as hf
from audits import sentences, tokenizer
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.auditing.self_check import plant

ENCODER = {
    "vocab_size": models.VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 40,
}


def words(count: int = 24) -> list[str]:
    return [row["text"] for row in sentences(count, 3)]


def seq2seq() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=models.VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )


TASKS = {
    "token-classification": (
        lambda: hf.BertForTokenClassification(hf.BertConfig(**ENCODER, num_labels=3)),
        [{"tokens": text.split(), "tags": [len(w) % 3 for w in text.split()]} for text in words()],
    ),
    "regression": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=1)),
        [{"text": text, "label": len(text) / 7} for text in words()],
    ),
    "multi-label": (
        lambda: hf.BertForSequenceClassification(
            hf.BertConfig(**ENCODER, num_labels=3, problem_type="multi_label_classification")
        ),
        [{"text": text, "label": [len(text) % 3, 1]} for text in words()],
    ),
    "preference": (
        lambda: models.make("llama", "causal", lora=True),
        [{"prompt": text, "chosen": "w1 w2", "rejected": f"w3 w{i % 7 + 4}"} for i, text in enumerate(words())],
    ),
    "causal-lm": (
        lambda: models.make("llama", "causal"),
        [{"instruction": text, "output": f"w{i % 9}"} for i, text in enumerate(words())],
    ),
    "seq2seq": (seq2seq, [{"source": text, "target": text.split()[0]} for text in words()]),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task(task: str, tmp_path: Path) -> None:
    make, rows = TASKS[task]
    torch.manual_seed(0)
    result = inf.audit(
        make().eval(),
        rows[:20],
        rows[20:24],
        tokenizer=tokenizer(),
        truncate=True,
        layers="lora" if task == "preference" else "re:.*(query|q_proj|lm_head|classifier|SelfAttention.q)$",
        out=tmp_path / "a",
        methods=["dot"],
        progress=False,
    )
    assert result.facts["task"] == task
    assert len(result.ranking) == 20
    assert (tmp_path / "a" / "scores.csv").exists()


PLANTED = {
    "token-classification": [{"input_ids": [3, 4, 5], "labels": [-100, i % 3, 2]} for i in range(20)],
    "regression": [{"input_ids": [3, 4], "labels": float(i)} for i in range(20)],
    "multi-label": [{"input_ids": [3, 4], "labels": [0.0, 1.0, float(i % 2)]} for i in range(20)],
    "preference": [{"input_ids": [[3, i], [4]], "labels": [[-100, i], [-100]]} for i in range(20)],
    "seq2seq": [{"input_ids": [3], "labels": [i, i]} for i in range(20)],
    "classification": [{"input_ids": [3], "labels": i % 3} for i in range(20)],
    "causal-lm": [{"input_ids": [3, i, i + 1], "labels": [-100, i, i + 1]} for i in range(20)],
}


@pytest.mark.parametrize("task", PLANTED)
def test_planted_noise_is_another_target_of_the_same_kind(task: str) -> None:
    rows = PLANTED[task]
    planted, mask = plant(rows, 0.3, 0, task)
    assert int(mask.sum()) == 6
    for row, copy, bad in zip(rows, planted, mask.tolist(), strict=True):
        assert (row != copy) == bad
        given, wrong = row["labels"], copy["labels"]
        if task == "preference":
            assert copy["input_ids"] == (row["input_ids"][::-1] if bad else row["input_ids"])
        elif task == "token-classification":
            assert [label == -100 for label in given] == [label == -100 for label in wrong]
            assert all(label in (-100, 0, 1, 2) for label in wrong)
        elif task == "multi-label":
            assert sum(a != b for a, b in zip(given, wrong, strict=True)) == bad
        elif task in ("regression", "seq2seq"):
            assert any(other["labels"] == wrong for other in rows)


def test_frames_and_streams_are_the_same_as_rows() -> None:
    rows = sentences(20, 1)
    model = models.make("bert")
    how = {"tokenizer": tokenizer(), "layers": "head", "methods": ["dot"], "progress": False}
    found = [inf.audit(model, train, rows[:6], **how) for train in (rows, pd.DataFrame(rows), iter(rows))]
    for result in found[1:]:
        assert torch.equal(result.rankings[result.main], found[0].rankings[found[0].main])


def doubled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return 2 * nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def test_a_loss_of_ones_own() -> None:
    rows = sentences(20, 1)
    model = models.make("bert")
    how = {"tokenizer": tokenizer(), "layers": "head", "methods": ["dot"], "aggregations": ["mean"], "progress": False}
    plain, twice = (inf.audit(model, rows, rows[:6], **how, **loss) for loss in ({}, {"loss": doubled}))
    torch.testing.assert_close(twice.rankings[twice.main], 4 * plain.rankings[plain.main])
    assert twice.config["loss"].endswith(":doubled")
    with pytest.raises(inf.InputError, match="loss: expected package"):
        inf.audit(model, rows, rows[:6], **how, loss="nope")
