"""What a training tells of its own rows: record it, rank by it, then TracIn and LESS over its checkpoints.

    python examples/inside_training.py

Offline, in half a minute: 300 made-up sentences of which a fifth have a flipped label, and a small BERT that learns them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

import influence_fast as inf

SAMPLES, QUERIES, LENGTH, VOCABULARY, EPOCHS = 300, 40, 8, 40, 3


def sentences(count: int, flipped: float, seed: int) -> tuple[list[dict], Tensor]:
    """Rows whose class says which half of the vocabulary most words are of, and which of them have the wrong class."""
    random = torch.Generator().manual_seed(seed)
    rows, noise = [], torch.rand(count, generator=random) < flipped
    for number in range(count):
        label = number % 2
        words = torch.randint(4, VOCABULARY // 2, (LENGTH,), generator=random)
        high = torch.rand(LENGTH, generator=random) < (0.9 if label else 0.1)
        words = words + high * (VOCABULARY // 2 - 2)
        rows.append({"input_ids": words.tolist(), "labels": label ^ int(noise[number])})
    return rows, noise


def main(folder: Path) -> None:
    torch.manual_seed(0)
    rows, noise = sentences(SAMPLES, 0.2, 0)
    queries, _ = sentences(QUERIES, 0, 1)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=16,
        learning_rate=4e-3,
        save_strategy="epoch",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=arguments,
        train_dataset=rows,
        data_collator=lambda some: {name: torch.tensor([row[name] for row in some]) for name in some[0]},
        callbacks=[inf.InfluenceCallback(folder / "recorded")],
    )
    trainer.train()

    recorded = inf.read_training(folder / "recorded")
    scores = {("loss of the last epoch", "", ""): -recorded.losses[-1].double()}
    scores |= {(name, "", ""): found for name, found in recorded.scores().items()}

    # At each checkpoint a store of the queries and two of the training rows, with Adam and without.
    given = inf.from_trainer(trainer)
    stores: dict[str, list[inf.GradientStore]] = {"plain": [], "adam": [], "queries": []}
    for one in recorded.checkpoints:
        model = AutoModelForSequenceClassification.from_pretrained(one.path)
        layers = inf.select_layers(model, "attention")
        moments = inf.read_adam(one.path, model, layers)
        for name, part, adam in (
            ("plain", given.rows, None),
            ("adam", given.rows, moments),
            ("queries", queries, None),
        ):
            path = folder / f"{name}-{one.step}"
            store = inf.build_store(path, model, part, layers, "rademacher:16x16", adam=adam, progress=False)
            stores[name].append(store)
    rates = [one.learning_rate for one in recorded.checkpoints]
    for name, matrix in (
        ("tracin", inf.tracin(stores["plain"], stores["queries"], rates)),
        ("less", inf.less(stores["adam"], stores["queries"], rates)),
    ):
        scores[name, "all", "mean"] = inf.aggregate(matrix, "mean")
    for row in inf.compare(scores, noise).rows:
        print(f"{row['method']:24} AUC_NDR {row['auc_ndr']:.3f}")


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
