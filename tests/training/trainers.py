"""Tiny Trainers to record, and to take a loss from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
_OF_TRAINER = ("callbacks", "train_dataset", "data_collator", "eval_dataset", "compute_loss_func")


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Quiet, on the CPU, two rows a batch."""
    given = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **options,
    }
    return TrainingArguments(**given)


def without_dropout(model: nn.Module) -> nn.Module:
    """The same in train mode as in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trainer(folder: Path, task: str = "classification", count: int = 7, kind: Any = Trainer, **options: Any) -> Trainer:
    """A Trainer of a two-block model without dropout."""
    given = {
        name: options.pop(name)
        for name in ("callbacks", "train_dataset", "data_collator", "eval_dataset", "compute_loss_func")
        if name in options
    }
    family = options.pop("family", "bert" if task == "classification" else "llama")
    model = without_dropout(models.make(family, task, lora=options.pop("lora", False)))
    return kind(
        model=model,
        args=arguments(folder, **options),
        **{"train_dataset": models.rows(task, count), "data_collator": models.collate, **given},
    )
