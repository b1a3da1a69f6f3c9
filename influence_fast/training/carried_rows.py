"""Row numbers that travel through a data loader to the model's forward, beside the batch that they belong to."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch

from influence_fast.errors import InputError

ROWS, LABELS, REFERENCE = "influence_fast_rows", "influence_fast_labels", "influence_fast_reference"
"""Entries of a batch: numbers of its rows, its labels, which some losses take out of it, and of pairs the log-probabilities
of a reference that were computed beforehand, the chosen ones, then the rejected ones."""
_PRECOMPUTED = ("ref_chosen_logps", "ref_rejected_logps")


class NumberedRows:
    """A data set whose rows come with their number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.dataset[number]

    def __getitems__(self, numbers: list[int]) -> list[tuple[int, Any]]:
        # Some data sets read several rows at once faster than one by one.
        several = getattr(self.dataset, "__getitems__", None)
        rows = several(numbers) if several is not None else [self.dataset[number] for number in numbers]
        return list(zip(numbers, rows, strict=True))


class NumberedBatch:
    """A collator of numbered rows: the batch of the collator inside, with numbers and labels beside."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, numbered: list[tuple[int, Any]]) -> Any:
        batch = self.collate([row for _, row in numbered])
        if not isinstance(batch, MutableMapping):
            raise InputError(f"data_collator: expected a batch that is a dict, got {type(batch).__name__}")
        if "labels" in batch:
            batch[LABELS] = batch["labels"]
        if all(name in batch for name in _PRECOMPUTED):
            batch[REFERENCE] = torch.cat([batch[name] for name in _PRECOMPUTED])
        batch[ROWS] = torch.tensor([number for number, _ in numbered])
        return batch


def carry_rows(loader: Any) -> int:
    """Make a data loader's batches carry the numbers of their rows; the number of rows of its data set.

    Raises:
        InputError: a data set that is read as a stream, so has no row numbers.
    """
    inner = getattr(loader, "base_dataloader", loader)
    dataset, collate = inner.dataset, inner.collate_fn
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(
            f"train_dataset: a {type(dataset).__name__} is a stream, whose rows have no number; give a data set with a "
            "length"
        )
    # The loader that accelerate wraps is the one that is iterated, the outer one that which is copied to skip batches.
    for one in {id(part): part for part in (inner, loader)}.values():
        # A torch loader refuses a new data set because its sampler would not know: this one has the same rows.
        one.__dict__["dataset"] = NumberedRows(dataset)
        one.__dict__["collate_fn"] = NumberedBatch(collate)
    return len(dataset)
