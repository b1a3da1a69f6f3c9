"""A Trainer's model, rows and loss as this package takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from influence_fast.data.batching import Loss
from influence_fast.data.tasks import IGNORED, device_of
from influence_fast.errors import InputError
from influence_fast.gradients.losses import PreferenceLoss
from influence_fast.gradients.model_state import as_evaluated, is_adapted
from influence_fast.training.preferences import check_settings, is_a

# Rows that are collated twice, to see that it gives the same.
_TWICE = 4


@dataclass(frozen=True)
class TrainerInputs:
    """What :func:`~influence_fast.from_trainer` took from a Trainer.

    Attributes:
        model: the Trainer's, on its device.
        rows: the training rows as its collator makes them one by one, with ``input_ids`` and ``labels``; row i is
            ``train_dataset[i]``.
        loss: ``auto`` where the Trainer takes the model's own, else a callable ``(model, batch) -> (N,)``.
        tokenizer: its processing class, if it has one.
        one_row: whether the loss gives one number a batch, so that a batch may hold one row.
    """

    model: nn.Module
    rows: list[dict[str, Any]]
    loss: str | Loss
    tokenizer: Any = None
    one_row: bool = False

    @property
    def build_arguments(self) -> dict[str, Any]:
        """Arguments of :func:`~influence_fast.build_store` behind its path."""
        return {"model": self.model, "dataset": self.rows, **self._shared}

    @property
    def audit_arguments(self) -> dict[str, Any]:
        """Arguments of :func:`~influence_fast.audit` beside its queries."""
        return {"model": self.model, "train": self.rows, **self._shared}

    @property
    def _shared(self) -> dict[str, Any]:
        one_row = {"batch_tokens": 1} if self.one_row else {}
        return {"loss": self.loss, "tokenizer": self.tokenizer, **one_row}


class TrainerLoss:
    """A Trainer's own ``compute_loss``, ``(model, batch) -> (N,)``; of one row a batch where it gives one number a batch.

    Raises:
        InputError: when called, one number for several rows, or another number of values than there are rows.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        # What tells this loss from another in a store's manifest.
        self.__qualname__ = f"{type(trainer).__qualname__}.compute_loss"
        self.smoothing = float(trainer.args.label_smoothing_factor)
        self.function = getattr(trainer.compute_loss_func, "__qualname__", None)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        count = len(next(iter(batch.values())))
        # A copy: some losses take the labels out of their batch.
        found = self._trainer.compute_loss(model, dict(batch))
        if found.shape == (count,):
            return found
        if count == 1 and found.numel() == 1:
            return found.reshape(1)
        raise InputError(
            f"compute_loss: expected one value for each of {count} rows, got shape {tuple(found.shape)}; a loss that gives "
            "one number a batch takes one row a batch (batch_tokens=1)"
        )


def from_trainer(trainer: Trainer) -> TrainerInputs:
    """Model, training rows and loss of a transformers Trainer, or of TRL's SFTTrainer and DPOTrainer.

    Example::

        given = inf.from_trainer(trainer)
        inf.build_store("store", **given.build_arguments, layers="trained")
        inf.audit(queries=queries, **given.audit_arguments)

    Rows are what the Trainer's collator makes of each alone, so prompts it leaves out of the loss are left out here. A
    Trainer without a loss of its own takes the model's, and so do TRL's losses ``nll`` and ``sigmoid``. Any other, label
    smoothing among them, is called as it is (``compute_loss``); where it gives one number a batch, it is called with one row
    at a time, which is slower. A row's loss is that of the row alone: weights that a Trainer gives rows by how many tokens
    the others in a batch have are not part of it.

    Raises:
        InputError: no training rows, or a stream of them; packed rows; a collator that draws at random, as for masked
            words; a loss that fails on a row, or is no number; preference losses other than DPO's, and references that move.
    """
    args = trainer.args
    if getattr(args, "packing", False):
        raise InputError("trainer: its rows are packed, several texts in one; make it without packing")
    given = trainer.train_dataset
    if given is None or (hasattr(given, "__len__") and not len(given)):
        raise InputError("trainer: it has no training rows (train_dataset)")
    loader = trainer.get_train_dataloader()
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(f"trainer: its train_dataset is a stream ({type(dataset).__name__}); give one with a length")
    preference = is_a(trainer, "DPOTrainer")
    row_of = _pair if preference else _row
    rows = [row_of(collate([dataset[i]]), i) for i in range(len(dataset))]
    if any(row_of(collate([dataset[i]]), i) != rows[i] for i in range(min(_TWICE, len(rows)))):
        raise InputError("trainer: its data_collator draws at random, so a row has no loss of its own")
    model, tokenizer = trainer.model, getattr(trainer, "processing_class", None)
    if preference:
        return TrainerInputs(model, rows, _preference_loss(trainer), tokenizer)
    if _takes_the_models_own(trainer):
        return TrainerInputs(model, rows, "auto", tokenizer)
    loss = TrainerLoss(trainer)
    return TrainerInputs(model, rows, loss, tokenizer, _gives_one_number(loss, model, collate, dataset))


def _takes_the_models_own(trainer: Any) -> bool:
    """Whether the loss is what the model itself returns for its labels."""
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        return False
    compute = type(trainer).compute_loss
    if compute is Trainer.compute_loss:
        return True
    of_trl = compute.__module__.startswith("trl.trainer.sft_trainer")
    plain = getattr(trainer.args, "loss_type", "nll") in (None, "nll", "chunked_nll")
    return of_trl and plain and not getattr(trainer, "aux_loss_enabled", False)


def _gives_one_number(loss: TrainerLoss, model: nn.Module, collate: Any, dataset: Any) -> bool:
    """Whether a batch has one loss; InputError where that of a single row is none."""

    def batch(count: int) -> dict[str, Tensor]:
        made = collate([dataset[i] for i in range(count)])
        return {name: value.to(device_of(model)) for name, value in made.items() if isinstance(value, Tensor)}

    with torch.no_grad(), as_evaluated(model):
        loss(model, batch(1))
        try:
            loss(model, batch(min(2, len(dataset))))
        except InputError:
            return True
    return len(dataset) < 2


def _row(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A batch of one row as a row."""
    if "input_ids" not in batch or "labels" not in batch:
        missing = "labels" if "input_ids" in batch else "input_ids"
        raise InputError(f"trainer: its data_collator gives row {number} no {missing!r}")
    row = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            continue
        if value.dim() == 0 or len(value) != 1:
            raise InputError(
                f"trainer: its data_collator makes {name!r} of shape {tuple(value.shape)} of row {number} alone, expected 1 "
                "row"
            )
        row[name] = value[0].tolist()
    mask = row.get("attention_mask")
    if mask is not None and all(value == 1 for value in mask):
        del row["attention_mask"]
    return row


def _pair(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A batch of one preference pair, chosen and rejected one below the other, as a row."""
    if not {"input_ids", "attention_mask", "completion_mask"} <= set(batch) or len(batch["input_ids"]) != 2:
        raise InputError(
            f"trainer: its data_collator gives pair {number} as {', '.join(batch)}; expected TRL's input_ids, "
            "attention_mask and completion_mask of two rows (TRL 0.24 or later)"
        )
    row: dict[str, Any] = {"input_ids": [], "labels": []}
    for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        row["input_ids"].append(ids[mask == 1].tolist())
        row["labels"].append(ids.masked_fill(answer == 0, IGNORED)[mask == 1].tolist())
    return row


def _preference_loss(trainer: Any) -> PreferenceLoss:
    """DPO's loss as this package has it; InputError for settings that make it another."""
    args = trainer.args
    check_settings("trainer", args)
    if getattr(args, "sync_ref_model", False):
        raise InputError("trainer: DPO with sync_ref_model=True has a reference that moves; expected False")
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise InputError("trainer: DPO with a compute_loss_func has another loss than DPO's own")
    reference = getattr(trainer, "ref_model", None)
    adapters = getattr(trainer.model, "peft_config", {})
    if "ref" in adapters:
        raise InputError(
            "trainer: its reference is an adapter named 'ref', and this package switches adapters off instead"
        )
    if reference is None and not is_adapted(trainer.model):
        raise InputError("trainer: keeps no reference model (its log-probabilities were computed beforehand)")
    return PreferenceLoss(float(args.beta), reference)
