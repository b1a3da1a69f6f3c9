"""What a Trainer's callback records, against a literal forward of each row."""

from __future__ import annotations

import math

import datasets
import models
import pytest
import torch
from trainers import trainer
from transformers import Trainer, TrainerCallback

import influence_fast as inf
from influence_fast.errors import InputError
from influence_fast.training.callback import by_row


def literal(model, rows):
    """Loss and margin of each row alone, in float64, target by target."""
    model = model.double().eval()
    found = []
    with torch.no_grad():
        for row in rows:
            batch = models.collate([row])
            labels = batch.pop("labels")
            logits = model(**batch).logits
            if labels.dim() == 1:
                pairs = [(logits[0], int(labels[0]))]
            else:
                pairs = [(logits[0, t - 1], int(labels[0, t])) for t in range(1, labels.shape[1]) if labels[0, t] >= 0]
            losses = [-math.log(math.exp(z[y]) / sum(math.exp(v) for v in z.tolist())) for z, y in pairs]
            margins = [float(z[y]) - max(v for k, v in enumerate(z.tolist()) if k != y) for z, y in pairs]
            found.append((sum(losses) / len(pairs), sum(margins) / len(pairs)))
    model.float()
    return torch.tensor(found).unbind(1)


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_recorded_is_a_literal_forward_of_each_row(tmp_path, task):
    """With learning rate 0 every epoch has the same numbers, whatever the order, batches and workers."""
    callback = inf.InfluenceCallback(tmp_path / "recorded")
    options = {
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "learning_rate": 0.0,
    }
    if task == "classification":
        # Read several at once, with columns that the model does not take.
        rows = [{**row, "text": "", "length": len(row["input_ids"])} for row in models.rows(task, 7)]
        options |= {"train_dataset": datasets.Dataset.from_list(rows)}
    made = trainer(
        tmp_path, task, callbacks=[callback], eval_strategy="epoch", eval_dataset=models.rows(task, 3), **options
    )
    losses, margins = literal(made.model, made.train_dataset)
    made.train()
    found = inf.read_training(tmp_path / "recorded")
    assert found.losses.shape == found.margins.shape == (2, 7)
    for epoch in range(2):
        torch.testing.assert_close(found.losses[epoch], losses, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.margins[epoch], margins, atol=1e-5, rtol=1e-5)
    assert found.learning_rates.tolist() == [0, 0]
    expected = [row["labels"] for row in models.rows(task, 7)] if task == "classification" else None
    assert (found.labels if expected is None else found.labels.tolist()) == expected


class Watch(TrainerCallback):
    """Losses by row before each step, by a literal forward, with the learning rates."""

    def __init__(self, rows):
        self.rows, self.losses, self.rates = rows, [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.losses.append(literal(model, self.rows)[0])
        model.train()
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_losses_are_those_before_the_step_of_each_row(tmp_path):
    rows = models.rows("classification", 6)
    watch = Watch(rows)
    made = trainer(tmp_path, count=6, lora=True, callbacks=[inf.InfluenceCallback(tmp_path / "recorded"), watch])
    made.train()
    found = inf.read_training(tmp_path / "recorded")
    for epoch in range(2):
        before = torch.stack(watch.losses[3 * epoch : 3 * epoch + 3])
        far = (before - found.losses[epoch]).abs()
        # Each row is seen in one of the epoch's three steps, two rows in each.
        assert float(far.amin(0).max()) < 1e-5
        assert far.argmin(0).bincount(minlength=3).tolist() == [2, 2, 2]
    expected = torch.tensor(watch.rates, dtype=torch.float64).view(2, 3).mean(1)
    torch.testing.assert_close(found.learning_rates, expected)


def test_a_training_that_was_stopped_goes_on_with_its_epoch(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "count": 6}
    whole = trainer(tmp_path / "whole", callbacks=[inf.InfluenceCallback(tmp_path / "a")], **options)
    whole.train()
    expected = inf.read_training(tmp_path / "a")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    made = trainer(tmp_path / "cut", callbacks=[inf.InfluenceCallback(tmp_path / "b"), Stop()], **options)
    made.train()
    cut = inf.read_training(tmp_path / "b")
    assert cut.losses.isnan().sum(1).tolist() == [0, 2]
    # Goes on from a step before the last that was recorded.
    again = trainer(tmp_path / "cut", callbacks=[inf.InfluenceCallback(tmp_path / "b")], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "out" / "checkpoint-4"))
    found = inf.read_training(tmp_path / "b")
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(found.margins, expected.margins)
    torch.testing.assert_close(found.learning_rates, expected.learning_rates)
    for one, other in zip(found.checkpoints, expected.checkpoints, strict=True):
        assert (one.step, one.path.name) == (other.step, other.path.name)
        assert one.learning_rate == pytest.approx(other.learning_rate)
        assert one.optimizer.is_file()
    with pytest.raises(InputError, match="holds a recorded training"):
        trainer(tmp_path / "new", callbacks=[inf.InfluenceCallback(tmp_path / "b")]).train()


def test_checkpoints_have_the_mean_rate_since_the_one_before(tmp_path):
    options = {"save_strategy": "epoch", "count": 4}
    watch = Watch(models.rows("classification", 4))
    trainer(tmp_path, callbacks=[inf.InfluenceCallback(tmp_path / "recorded"), watch], **options).train()
    found = inf.read_training(tmp_path / "recorded").checkpoints
    assert [one.step for one in found] == [2, 4]
    assert [one.learning_rate for one in found] == pytest.approx([sum(watch.rates[:2]) / 2, sum(watch.rates[2:]) / 2])
    assert found[0].path == (tmp_path / "out" / "checkpoint-2").absolute()


class OwnCall(Trainer):
    """A loss that hands the model only some of its batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss


def stream(rows):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    return Stream()


def test_what_cannot_be_recorded_is_refused(tmp_path):
    def train(words, **options):
        with pytest.raises(InputError, match=words):
            trainer(tmp_path, callbacks=[inf.InfluenceCallback(tmp_path / "recorded")], **options).train()

    rows = models.rows()
    train("is a stream", train_dataset=stream(rows), max_steps=2)
    train("numbers of its rows", kind=OwnCall)
    train("no labels", data_collator=lambda rows: {k: v for k, v in models.collate(rows).items() if k != "labels"})

    def packed(rows):
        flat = [token for row in rows for token in row["input_ids"]]
        return {"input_ids": torch.tensor([flat]), "labels": torch.tensor([flat])}

    train("packed together", task="causal", data_collator=packed)
    assert not (tmp_path / "recorded").exists()


def test_tasks_without_a_label_are_refused_and_others_are_known():
    with pytest.raises(InputError, match="one label a row"):
        by_row("classification", torch.ones(3, 1), torch.ones(3))
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [-100, -100, -100]])
    losses, margins, classes = by_row("token-classification", logits, labels)
    expected = torch.nn.functional.cross_entropy(logits[0, [0, 2]], torch.tensor([1, 2]))
    torch.testing.assert_close(losses[0], expected)
    assert losses[1].isnan()
    assert margins[1].isnan()
    assert classes is None


def test_label_smoothing_trains_and_the_plain_loss_is_recorded(tmp_path):
    made = trainer(
        tmp_path, callbacks=[inf.InfluenceCallback(tmp_path / "r")], label_smoothing_factor=0.3, learning_rate=0.0
    )
    expected = literal(made.model, made.train_dataset)[0]
    made.train()
    torch.testing.assert_close(inf.read_training(tmp_path / "r").losses[1], expected, atol=1e-5, rtol=1e-5)
