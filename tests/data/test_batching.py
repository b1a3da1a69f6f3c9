"""Rows are checked before the first forward, and cut into batches that waste little."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from torch import nn

import influence_fast as inf
from influence_fast.data import batching as rows_room

IDENTITY = inf.Projection("identity")


def make_store(path: Path, model: nn.Module, dataset, **kwargs) -> inf.GradientStore:
    return inf.build_store(path, model, dataset, progress=False, **{"projection": IDENTITY, **kwargs})


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_batches_fill_the_budget_and_lose_no_row() -> None:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (200,), generator=random).tolist()
    rows = rows_room.Rows([{"input_ids": [1] * n, "labels": 0} for n in lengths], None)
    list(rows.scan())
    batches = rows_room.batches(rows, range(10, 190), 100)
    assert sorted(i for batch in batches for i in batch) == list(range(10, 190))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 100 for b in batches)
    assert len(batches) < 1.3 * sum(lengths[10:190]) / 100 + 2


def test_padding_that_comes_with_the_data_is_cut_off(tmp_path: Path) -> None:
    model, samples = models.make("qwen2", "causal"), models.rows("causal")
    padded = []
    for i, sample in enumerate(samples):
        gap, n = [0] * 3, len(sample["input_ids"])
        padded.append(
            {
                "input_ids": torch.tensor(gap + sample["input_ids"] if i % 2 else sample["input_ids"] + gap),
                "attention_mask": gap + [1] * n if i % 2 else [1] * n + gap,
                "labels": [-100] * 3 + sample["labels"] if i % 2 else sample["labels"] + [-100] * 3,
            }
        )
    plain = make_store(tmp_path / "a", model, samples, layers="attention[0]")
    with_pads = make_store(tmp_path / "b", model, padded, layers="attention[0]")
    for layer in plain.layers:
        torch.testing.assert_close(with_pads.read(layer), plain.read(layer), rtol=1e-4, atol=1e-6)


def test_token_types_reach_the_model(tmp_path: Path) -> None:
    model, samples = models.make("bert"), models.rows()
    typed = [{**s, "token_type_ids": [0, 0] + [1] * (len(s["input_ids"]) - 2)} for s in samples]
    a, b = (
        make_store(tmp_path / "a", model, samples, layers="head"),
        make_store(tmp_path / "b", model, typed, layers="head"),
    )
    assert not torch.allclose(a.read("classifier"), b.read("classifier"))


def test_automatic_budget_follows_from_memory_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = models.make("bert"), models.rows(count=9)
    free = [1 << 40]
    monkeypatch.setattr(rows_room, "free_memory", lambda device: free[0])
    plenty = make_store(tmp_path / "a", model, samples, layers="head")
    assert plenty.meta["settings"]["batch_tokens"] == rows_room._CPU_TOKENS
    free[0] = 1 << 20
    scarce = make_store(tmp_path / "b", model, samples, layers="head").meta["settings"]["batch_tokens"]
    assert 16 <= scarce < rows_room._CPU_TOKENS
    before = files(tmp_path / "a")
    make_store(tmp_path / "a", model, samples, layers="head")
    assert files(tmp_path / "a") == before


def test_batches_waste_little_on_padding() -> None:
    random = torch.Generator().manual_seed(0)
    lengths = (torch.randn(3000, generator=random) * 0.65 + 2.2).exp().add(2).clamp(3, 60).long().tolist()
    rows = rows_room.Rows([{"input_ids": [1] * n, "labels": 0} for n in lengths], None)
    list(rows.scan())
    batches = rows_room.batches(rows, range(3000), 1000)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.03 * sum(lengths)
    assert len(batches) < 1.5 * sum(lengths) / 1000


LONG = {"input_ids": [5] * 41, "labels": 0}


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "at least one row"),
        ([{"labels": 1, "text": "x"}], r"'input_ids' is missing; there are 'labels', 'text'"),
        ([{"input_ids": [1]}], "'labels' is missing"),
        ([*models.rows(), {"input_ids": [], "labels": 0}], "row 5 has no tokens"),
        ([*models.rows(), {"input_ids": [3, 37], "labels": 0}], "row 5 has token id 37, the vocabulary ends at 36"),
        ([*models.rows(), {"input_ids": [-1], "labels": 0}], "row 5 has token id -1"),
        ([*models.rows(), {"input_ids": [3], "labels": 3}], "row 5 has label 3, expected an int from 0 to 2"),
        ([*models.rows(), {"input_ids": [3], "labels": 0.5}], r"row 5 has label 0\.5"),
        ([*models.rows(), LONG], "row 5 has 41 tokens, the model takes 40; truncate"),
        ([{"input_ids": [3, 4], "labels": [1, 0]}], "'auto' cannot tell the loss of a BertForSequenceClassification"),
        ([{"input_ids": torch.ones(2, 6).long(), "labels": 0}], "'input_ids' of row 0 is a list of lists"),
        ([{"input_ids": [3], "labels": 0, "attention_mask": [1, 1]}], "'attention_mask' of row 0 should be a list"),
        ([{**models.rows()[0], "token_type_ids": [0] * 4}, models.rows()[1]], "'token_type_ids' of row 0 should be"),
        (
            [{**LONG, "input_ids": [5] * 4, "token_type_ids": [0] * 4}, models.rows()[1]],
            "row 1 has no 'token_type_ids'",
        ),
        (
            [models.rows()[1], {"input_ids": [5] * 4, "token_type_ids": [0] * 4, "labels": 0}],
            "row 0 has no 'token_type",
        ),
    ],
)
def test_bad_rows_are_named_before_anything_is_written(tmp_path: Path, dataset: list[dict], message: str) -> None:
    with pytest.raises(inf.InputError, match=message):
        make_store(tmp_path / "s", models.make("bert"), dataset)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1], "'labels' of row 0 should be a list as long"),
        ([5, -100], "row 0 has no target token"),
        ([5, 99], "row 0 has a label outside"),
        (3, "'labels' of row 0 should be a list as long"),
    ],
)
def test_bad_targets_are_named(tmp_path: Path, labels, message: str) -> None:
    with pytest.raises(inf.InputError, match=message):
        make_store(tmp_path / "s", models.make("gpt2", "causal"), [{"input_ids": [3, 4], "labels": labels}])


def test_truncation_only_when_told(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", models.make("bert"), [*models.rows(), LONG], layers="head", truncate=True)
    assert len(store) == 6


def test_roberta_counts_positions_from_behind_the_pad(tmp_path: Path) -> None:
    with pytest.raises(inf.InputError, match="has 39 tokens, the model takes 38"):
        make_store(tmp_path / "s", models.make("roberta"), [{"input_ids": [5] * 39, "labels": 0}])


def test_a_model_without_one_table_of_words(tmp_path: Path) -> None:
    """transformers' models of characters have a method for their table that says there is none."""
    model = models.make("bert")

    def none() -> nn.Module:
        raise NotImplementedError("not auto-handled")

    model.get_input_embeddings = none
    store = make_store(tmp_path / "s", model, models.rows(), layers="head")
    assert len(store) == len(models.rows())
