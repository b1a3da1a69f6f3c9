"""The last block on cached states is the whole model."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch

from benchmarks import last_block
from influence_fast.data.batching import collate


@pytest.fixture
def folder(tmp_path: Path) -> str:
    models.make("bert").bert.save_pretrained(tmp_path)
    return str(tmp_path)


def rows(count: int) -> list[dict]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (count,), generator=random).tolist()
    return [
        {"input_ids": torch.randint(2, models.VOCAB, (n,), generator=random).tolist(), "labels": n % 2} for n in lengths
    ]


def test_logits_are_those_of_the_whole_model_before_and_after_training(folder: str) -> None:
    given = rows(12)
    labels = [row["labels"] for row in given]
    states = last_block.below(last_block.last_block_encoder(folder, 0), given)
    for epochs in (0, 2):
        model = last_block.fine_tune(folder, 0, states, labels, epochs, 1e-2, 4)
        batch = collate(given, model)
        batch.pop("labels")
        with torch.no_grad():
            whole = model(**batch).logits
            torch.testing.assert_close(last_block.above(model, states), whole, rtol=1e-4, atol=1e-5)
        right = (whole.argmax(-1) == torch.tensor(labels)).double().mean()
        torch.testing.assert_close(last_block.logits(model, states, size=5), whole, rtol=1e-4, atol=1e-5)
        assert last_block.accuracy(model, states, labels) == pytest.approx(float(right))


def test_each_epoch_is_watched_in_evaluation_mode(folder: str) -> None:
    given = rows(8)
    states, seen = last_block.below(last_block.last_block_encoder(folder, 0), given), []

    def watch(model: torch.nn.Module) -> None:
        assert not model.training
        seen.append(last_block.logits(model, states))

    labels = [row["labels"] for row in given]
    model = last_block.fine_tune(folder, 0, states, labels, 3, 1e-2, 4, watch)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[2], last_block.logits(model, states))
    unwatched = last_block.fine_tune(folder, 0, states, labels, 3, 1e-2, 4)
    assert torch.equal(last_block.logits(unwatched, states), seen[2])


def test_one_seed_starts_from_the_same_weights_and_trains(folder: str) -> None:
    given = rows(8)
    labels = [row["labels"] for row in given]
    states = last_block.below(last_block.last_block_encoder(folder, 0), given)
    one, other, longer = (
        torch.cat(
            [p.detach().flatten() for p in last_block.fine_tune(folder, 0, states, labels, e, 1e-2, 4).parameters()]
        )
        for e in (1, 1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, longer)
