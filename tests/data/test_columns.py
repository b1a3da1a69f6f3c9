"""Columns of a data set reach the model that names them, masks as they are; the others are named and left out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.data.batching import Rows, checked_rows
from influence_fast.data.tasks import inputs_of
from influence_fast.gradients import losses
from influence_fast.gradients.model_state import as_evaluated
from influence_fast.gradients.row_checks import settle_batches

V = models.VOCAB
ENCODER = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.5,
    "num_labels": 3,
}


def assert_alone_and_together(model: nn.Module, dataset: list[dict[str, Any]]) -> None:
    """Losses of one padded batch are the model's own of every row as it stands in the data set."""
    model = model.double().eval()
    rows, kind = checked_rows(model, dataset)
    loss = losses.named(kind)
    settle_batches(model, rows, loss, 1000)
    assert rows.batching == "padded"
    with as_evaluated(model), torch.no_grad():
        each = loss(model, rows.batch(range(len(rows)), model))
        for row, found in zip(dataset, each, strict=True):
            batch = {name: torch.as_tensor(value)[None] for name, value in row.items()}
            batch = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
            torch.testing.assert_close(found, model(**batch).loss.double(), rtol=1e-6, atol=1e-9)


def rows(**columns: Any) -> list[dict[str, Any]]:
    return [{**row, **{name: make(len(row["input_ids"])) for name, make in columns.items()}} for row in models.rows()]


def test_columns_with_an_entry_a_token() -> None:
    torch.manual_seed(0)
    boxes = rows(bbox=lambda t: [[i % 5, 1, 5 + i % 7, 9] for i in range(t)])
    settings = {**ENCODER, "max_2d_position_embeddings": 32}
    model = hf.LayoutLMForSequenceClassification(hf.LayoutLMConfig(**settings))
    assert_alone_and_together(model, boxes)
    assert_alone_and_together(
        hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)),
        rows(position_ids=lambda t: list(range(3, 3 + t)), token_type_ids=lambda t: [0, *[1] * (t - 1)]),
    )


def test_columns_of_the_decoder() -> None:
    torch.manual_seed(0)
    config = hf.BartConfig(
        vocab_size=V,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=40,
        init_std=0.5,
    )
    dataset = [
        {
            "input_ids": row["input_ids"],
            "labels": [4 + i, 5, 6][: 1 + i % 3],
            "decoder_input_ids": [2, 9, 8][: 1 + i % 3],
        }
        for i, row in enumerate(models.rows())
    ]
    assert_alone_and_together(hf.BartForConditionalGeneration(config), dataset)


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(V, 12), nn.Linear(12, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        words = (self.words(input_ids) * attention_mask[..., None]).sum(1)
        return self.head(words * pixel_values.flatten(1))


def test_columns_with_one_entry_a_row() -> None:
    torch.manual_seed(0)
    model = Picture().double()
    dataset = [{**row, "pixel_values": torch.rand(3, 2, 2)} for row in models.rows()]
    checked, _ = checked_rows(model, dataset)
    batch = checked.batch(range(5), model)
    assert batch["pixel_values"].shape == (5, 3, 2, 2)
    assert batch["pixel_values"].dtype == torch.float64
    torch.testing.assert_close(batch["pixel_values"][4], dataset[4]["pixel_values"].double())


def test_what_the_model_does_not_take_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = [{**row, "weight": 0.5, "text": "x", "id": 3, "source": "y", "past": [1, 2]} for row in models.rows()]
    with caplog.at_level(logging.WARNING, "influence_fast"):
        store = inf.build_store(tmp_path / "s", models.make("bert"), dataset, "head", "identity", progress=False)
    assert "dataset: BertForSequenceClassification does not take 'weight', 'past'" in caplog.text
    plain = inf.build_store(tmp_path / "p", models.make("bert"), models.rows(), "head", "identity", progress=False)
    assert store.meta["settings"] == plain.meta["settings"], "the digest covers what is passed"


def test_the_digest_covers_every_column_that_is_passed(tmp_path: Path) -> None:
    model = Picture()
    datasets = [
        [{**row, "pixel_values": torch.full((3, 2, 2), value)} for row in models.rows()] for value in (0.5, 1.0)
    ]
    digests = {checked_rows(model, dataset)[0].digest() for dataset in [*datasets, datasets[0]]}
    assert len(digests) == 2


def test_names_of_inputs_come_through_wrappers() -> None:
    torch.manual_seed(0)
    plain = hf.LayoutLMForSequenceClassification(hf.LayoutLMConfig(**ENCODER))
    wanted = {"input_ids", "bbox", "attention_mask", "token_type_ids", "position_ids"}
    adapted = get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    for model in (plain, adapted, torch.compile(plain), nn.DataParallel(plain)):
        found = inputs_of(model)
        assert wanted <= found
        assert not {"labels", "self", "return_dict"} & found


def test_digests_of_rows_are_those_of_version_0_1() -> None:
    """A build that was begun goes on: what is fed to the usual models is named as it was."""
    checked, _ = checked_rows(models.make("bert"), models.rows())
    assert checked.digest() == "b4ea5d962d953357797daafea6530999570a65ade23653d7a54af0c68941620f"
    checked, _ = checked_rows(models.make("gpt2", "causal"), models.rows("causal"))
    assert checked.digest() == "d0f9dd5a40e4d19a88dad020f40e240409dd5050b43f80cca0089d3a24372bd8"


MASKS = {
    "a hole": lambda t: [1, 1, 0, *[1] * (t - 3)],
    "pads and a hole": lambda t: [0, 1, 0, *[1] * (t - 3)],
    "a hole before pads": lambda t: [1, 0, *[1] * (t - 3), 0],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
def test_masked_tokens_keep_their_place(name: str, mask: str) -> None:
    """The same losses and gradients as of a batch of one with its mask; pads at the ends alone are cut off."""
    torch.manual_seed(0)
    model = models.make(name).double()
    masked = rows(attention_mask=MASKS[mask])
    got, kind = checked_rows(model, masked)
    settle_batches(model, got, losses.classification, 1000)
    with as_evaluated(model), torch.no_grad():
        each = losses.named(kind)(model, got.batch(range(5), model))
        for row, found in zip(masked, each, strict=True):
            cut = slice(row["attention_mask"].index(1), len(row["input_ids"]) - row["attention_mask"][::-1].index(1))
            batch = {column: torch.tensor([row[column][cut]]) for column in ("input_ids", "attention_mask")}
            torch.testing.assert_close(found, model(**batch, labels=torch.tensor([row["labels"]])).loss)


def test_a_mask_without_holes_is_not_kept() -> None:
    dataset = [{"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0], "labels": 1}]
    assert Rows(dataset, None)[0] == {"input_ids": [5, 6], "labels": 1}
    answers = [{"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "start_positions": 1, "end_positions": 2}]
    assert Rows(answers, None)[0] == {"input_ids": [5, 6], "start_positions": 0, "end_positions": 1}
