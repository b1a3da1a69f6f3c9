"""A Trainer's rows and loss, held against its own ``compute_loss`` and a literal gradient of it, row by row."""

from __future__ import annotations

import models
import pytest
import torch
from audits import tokenizer
from torch import nn
from trainers import trainer
from transformers import DataCollatorForLanguageModeling, Trainer

import influence_fast as inf
from influence_fast.errors import InputError


class Weighted(Trainer):
    """A mean over the batch that weighs classes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        weights = torch.tensor([1.0, 2.0, 3.0])[inputs["labels"]]
        each = nn.functional.cross_entropy(logits, inputs["labels"], reduction="none") * weights
        return each.mean()


class EachRow(Weighted):
    """The same, one value a row."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        weights = torch.tensor([1.0, 2.0, 3.0])[inputs["labels"]]
        return nn.functional.cross_entropy(logits, inputs["labels"], reduction="none") * weights


def literal(made, layers):
    """Loss and gradients of each row by the Trainer's own compute_loss."""
    made.model.eval()
    named = dict(made.model.named_parameters())
    weights = [named[f"{name}.weight"] for name in layers]
    losses, gradients = [], []
    for row in made.train_dataset:
        batch = made.get_train_dataloader().collate_fn([row])
        loss = made.compute_loss(made.model, dict(batch)).sum()
        losses.append(loss.detach())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(losses), torch.stack(gradients)


@pytest.mark.parametrize(
    ("options", "own", "one_row"),
    [
        ({}, True, False),
        ({"task": "causal"}, True, False),
        ({"label_smoothing_factor": 0.2}, False, True),
        ({"task": "causal", "label_smoothing_factor": 0.2}, False, True),
        ({"kind": Weighted}, False, True),
        ({"kind": EachRow}, False, False),
    ],
    ids=["plain", "causal", "smoothed", "causal smoothed", "mean", "one a row"],
)
def test_a_store_has_the_gradients_of_the_trainers_loss(tmp_path, options, own, one_row):
    made = trainer(tmp_path, count=4, **options)
    given = inf.from_trainer(made)
    assert (given.loss == "auto", given.one_row) == (own, one_row)
    layers = [name for name in inf.select_layers(made.model, "attention") if "0" in name][:2]
    losses, gradients = literal(made, layers)
    store = inf.build_store(
        tmp_path / "store", **given.build_arguments, layers=layers, projection="identity", progress=False
    )
    torch.testing.assert_close(store.column("loss"), losses, atol=1e-5, rtol=1e-5)
    found = torch.cat([store.read(name) for name in layers], 1)
    torch.testing.assert_close(found, gradients, atol=1e-5, rtol=1e-4)


def test_an_audit_takes_a_trainer(tmp_path):
    given = inf.from_trainer(trainer(tmp_path, count=9, kind=Weighted))
    found = inf.audit(queries=models.rows(count=4, seed=5), methods=["dot"], progress=False, **given.audit_arguments)
    assert len(found.ranking) == 9


def test_what_cannot_be_honoured_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(models.rows())

    def refuse(words, **options):
        made = trainer(tmp_path, **options)
        with pytest.raises(InputError, match=words):
            inf.from_trainer(made)

    refuse("is a stream", train_dataset=Stream(), max_steps=1)
    refuse("no training rows", train_dataset=[])
    masked = tokenizer()
    masked.add_special_tokens({"mask_token": "[MASK]"})
    long = [{"input_ids": list(range(3, 30))} for _ in range(3)]
    refuse("draws at random", train_dataset=long, data_collator=DataCollatorForLanguageModeling(masked, mlm=True))
    refuse("no 'labels'", data_collator=lambda rows: {"input_ids": torch.ones(1, 2)})
    refuse("expected 1 row", data_collator=lambda rows: {"input_ids": torch.ones(2, 2), "labels": torch.ones(2)})
    made = trainer(tmp_path)
    made.args.packing = True
    with pytest.raises(InputError, match="without packing"):
        inf.from_trainer(made)


def of_trl(tmp_path, kind, rows, **options):
    """A Trainer of TRL's with a tiny causal model."""
    trl = pytest.importorskip("trl")
    model, words = models.make("llama", "causal"), tokenizer()
    words.eos_token = "w0"
    datasets = pytest.importorskip("datasets")
    given = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "gradient_checkpointing": False,
    }
    config = getattr(trl, f"{kind}Config")(**given, **options)
    data = datasets.Dataset.from_list(rows)
    reference = {} if kind == "SFT" else {"ref_model": models.make("llama", "causal", seed=3)}
    return getattr(trl, f"{kind}Trainer")(model, args=config, train_dataset=data, processing_class=words, **reference)


def test_trl_fine_tuning(tmp_path):
    rows = [{"prompt": "w1 w2", "completion": " w3 w4 w5"}, {"prompt": "w9", "completion": " w7 w6"}]
    made = of_trl(tmp_path, "SFT", rows, num_train_epochs=1, save_strategy="no", learning_rate=0.0)
    given = inf.from_trainer(made)
    assert given.loss == "auto"
    store = inf.build_store(tmp_path / "store", **given.build_arguments, layers="head", progress=False)
    made.model.eval()
    loader = made.get_train_dataloader()
    losses = [made.compute_loss(made.model, dict(loader.collate_fn([loader.dataset[i]]))) for i in range(2)]
    torch.testing.assert_close(store.column("loss"), torch.stack(losses).detach(), atol=1e-5, rtol=1e-5)
    # As training passes by there are no logits.
    made.add_callback(inf.InfluenceCallback(tmp_path / "recorded"))
    made.train()
    found = inf.read_training(tmp_path / "recorded")
    torch.testing.assert_close(found.losses[0], store.column("loss"), atol=1e-5, rtol=1e-5)
    assert list(found.scores()) == ["mean_loss"]


def test_trl_preferences(tmp_path):
    rows = [
        {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5 w6 w8"},
        {"prompt": "w9", "chosen": " w7", "rejected": " w6 w1"},
    ]
    made = of_trl(tmp_path, "DPO", rows, beta=0.3)
    given = inf.from_trainer(made)
    store = inf.build_store(tmp_path / "store", **given.build_arguments, layers="head", progress=False)
    made.model.eval()
    loader = made.get_train_dataloader()
    losses = [made.compute_loss(made.model, dict(loader.collate_fn([loader.dataset[i]]))) for i in range(2)]
    torch.testing.assert_close(store.column("loss"), torch.stack(losses).detach(), atol=1e-5, rtol=1e-5)
    # As training passes by, with the reference's own passes.
    made.add_callback(inf.InfluenceCallback(tmp_path / "recorded", reference=made.ref_model))
    made.args.learning_rate, made.args.num_train_epochs, made.args.save_strategy = 0.0, 1, "no"
    made.train()
    found = inf.read_training(tmp_path / "recorded")
    torch.testing.assert_close(found.losses[0], store.column("loss"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.losses[0], -torch.nn.functional.logsigmoid(found.margins[0]))
    made.args.loss_type = ["hinge"]
    with pytest.raises(InputError, match="'sigmoid'"):
        inf.from_trainer(made)
