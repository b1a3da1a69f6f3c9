"""What a training told of each of its rows, and where its checkpoints lie: the files, and scores from them.

A folder holds one file an epoch, with losses, margins and learning rates as tensors and a hash of them, and
``training.json``, which lists the checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from influence_fast._files import atomic_write, make_folder
from influence_fast._json import check_types, read_object
from influence_fast.errors import InputError, StoreError

ABOUT = "training.json"
_FILES = "epoch-*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a recorded training.

    Attributes:
        path: its folder, which may have been removed since.
        step: optimizer steps before it.
        learning_rate: the mean over the steps since the checkpoint before.
        optimizer: where its ``optimizer.pt`` lies; None where none was saved.
        trained: names of the parameters in it, in its order; None where they were not recorded.
    """

    path: Path
    step: int
    learning_rate: float
    optimizer: Path | None = None
    trained: tuple[str, ...] | None = None


@dataclass
class Epoch:
    """One epoch as it is recorded: tensors by training row, NaN (-1) where a row was not seen.

    Attributes:
        losses, margins: float32 ``(n,)``.
        labels: int64 ``(n,)``, the classes that rows were trained on; -1 for tasks that have no class a row.
        steps: int64 ``(n,)``, optimizer steps before the row was last seen.
        rates: float64 ``(taken,)``, the learning rate of each optimizer step of the epoch.
        rate_steps: int64 ``(taken,)``, optimizer steps before each of them.
    """

    losses: Tensor
    margins: Tensor
    labels: Tensor
    steps: Tensor
    rates: Tensor
    rate_steps: Tensor

    @classmethod
    def empty(cls, count: int) -> Epoch:
        """Nothing seen of ``count`` rows."""
        missing = torch.full((count,), torch.nan)
        unseen = torch.full((count,), -1, dtype=torch.long)
        no_step = torch.empty(0, dtype=torch.long)
        return cls(missing, missing.clone(), unseen, unseen.clone(), no_step.double(), no_step)

    def before(self, step: int) -> Epoch:
        """What had been seen when ``step`` optimizer steps were done: a training goes on from there."""
        late, kept = self.steps >= step, self.rate_steps < step
        losses, margins = (values.masked_fill(late, torch.nan) for values in (self.losses, self.margins))
        labels, steps = (values.masked_fill(late, -1) for values in (self.labels, self.steps))
        return Epoch(losses, margins, labels, steps, self.rates[kept], self.rate_steps[kept])


_DTYPES = {name: value.dtype for name, value in vars(Epoch.empty(0)).items()}


@dataclass(frozen=True)
class RecordedTraining:
    """A training as :class:`~influence_fast.InfluenceCallback` recorded it.

    Attributes:
        losses, margins: float32 ``(epochs, n)``; NaN where a row was not seen in an epoch, such as one cut short.
        learning_rates: float64 ``(epochs,)``, the mean over an epoch's optimizer steps; NaN where it had none.
        checkpoints: in the order of their steps.
        labels: int64 ``(n,)``, the class that each row was trained on; None where the task has no class a row. -1 where a
            row was never seen.
    """

    losses: Tensor
    margins: Tensor
    learning_rates: Tensor
    checkpoints: list[Checkpoint] = field(default_factory=list)
    labels: Tensor | None = None

    def aum(self) -> Tensor:
        """Area under the margin, float64 ``(n,)``, lowest = most harmful (Pleiss et al. 2020, arXiv 2001.10528, eq. 2).

        The mean over the epochs in which the row was seen; NaN where it never was.
        """
        return torch.nanmean(self.margins.double(), 0)

    def mean_loss(self) -> Tensor:
        """Minus the mean loss over the epochs in which a row was seen, float64 ``(n,)``, lowest = most harmful."""
        return -torch.nanmean(self.losses.double(), 0)

    def scores(self) -> dict[str, Tensor]:
        """:meth:`aum` and :meth:`mean_loss` by name, as far as they were recorded.

        A row that was never seen gets the mean of those that were.
        """
        found = {"aum": self.aum(), "mean_loss": self.mean_loss()}
        return {
            name: torch.where(score.isnan(), score.nanmean(), score)
            for name, score in found.items()
            if not bool(score.isnan().all())
        }

    @property
    def trained(self) -> tuple[str, ...] | None:
        """Names of the parameters that were trained, of the last checkpoint; None where none was recorded."""
        return self.checkpoints[-1].trained if self.checkpoints else None

    def some(self, rows: list[int]) -> RecordedTraining:
        """These rows alone."""
        labels = None if self.labels is None else self.labels[rows]
        return RecordedTraining(
            self.losses[:, rows], self.margins[:, rows], self.learning_rates, self.checkpoints, labels
        )


def read_training(folder: str | Path) -> RecordedTraining:
    """What :class:`~influence_fast.InfluenceCallback` recorded in a folder, all epochs in their order.

    Raises:
        InputError: the folder holds no recorded epoch.
        StoreError: a file that is damaged, or epochs of different numbers of rows.
    """
    place = Path(folder)
    files = sorted(place.glob(_FILES))
    if not files:
        raise InputError(f"training: {place} holds no recorded epoch")
    epochs = [read_epoch(file) for file in files]
    for file, epoch in zip(files, epochs, strict=True):
        if len(epoch.losses) != len(epochs[0].losses):
            raise StoreError(
                f"{file}: expected {len(epochs[0].losses)} rows, as {files[0].name} has, got {len(epoch.losses)}"
            )
    labels = torch.stack([epoch.labels for epoch in epochs]).amax(0)
    return RecordedTraining(
        torch.stack([epoch.losses for epoch in epochs]),
        torch.stack([epoch.margins for epoch in epochs]),
        torch.stack([epoch.rates.mean() for epoch in epochs]),
        read_checkpoints(place),
        labels if bool((labels >= 0).any()) else None,
    )


def epoch_file(folder: Path, number: int) -> Path:
    """Where an epoch is kept."""
    return folder / f"epoch-{number:05d}.safetensors"


def recorded_epochs(folder: Path) -> dict[int, Path]:
    """The files of a folder by number of their epoch."""
    return {int(file.stem.partition("-")[2]): file for file in sorted(folder.glob(_FILES))}


def write_epoch(folder: Path, number: int, epoch: Epoch) -> None:
    """Write one epoch, whole or not at all; one that is there is replaced.

    Raises:
        InputError: losses and margins that are not two vectors of one length.
        InfluenceError: nothing can be written there.
    """
    if epoch.losses.ndim != 1 or epoch.losses.shape != epoch.margins.shape:
        raise InputError(
            f"margins: expected a vector as long as losses, got {tuple(epoch.margins.shape)} for "
            f"{tuple(epoch.losses.shape)}"
        )
    make_folder(folder)
    values = {name: value.to(_DTYPES[name]).contiguous() for name, value in vars(epoch).items()}
    atomic_write(epoch_file(folder, number), save(values, {"sha256": _digest(values)}))


def read_epoch(file: Path) -> Epoch:
    """One epoch.

    Raises:
        StoreError: the file is damaged, or none of this kind.
    """
    try:
        with safe_open(file, "pt") as found:
            values = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 (no mapping)
            digest = (found.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{file}: is damaged ({error})") from None
    if {name: value.dtype for name, value in values.items()} != _DTYPES:
        raise StoreError(f"{file}: expected {', '.join(_DTYPES)}, got {', '.join(sorted(values)) or 'nothing'}")
    if digest != _digest(values):
        raise StoreError(f"{file}: is damaged (its contents have another hash than when it was written)")
    return Epoch(**values)


def write_checkpoints(folder: Path, checkpoints: list[Checkpoint]) -> None:
    """Write which checkpoints there are, whole or not at all.

    Raises:
        InfluenceError: nothing can be written there.
    """
    make_folder(folder)
    entries = [
        {
            "path": str(one.path),
            "step": one.step,
            "learning_rate": one.learning_rate,
            "optimizer": None if one.optimizer is None else str(one.optimizer),
            "trained": one.trained,
        }
        for one in checkpoints
    ]
    atomic_write(folder / ABOUT, json.dumps({"version": 1, "checkpoints": entries}, indent=1) + "\n")


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a folder; none where the training left none.

    Raises:
        StoreError: the file that lists them is damaged.
    """
    file = folder / ABOUT
    if not file.exists():
        return []
    document = read_object(file, "training", StoreError)
    if document.get("version") != 1:
        raise StoreError(f"training: cannot read {file} (expected version 1, got {document.get('version')!r})")
    try:
        check_types(document, {"checkpoints": list[dict[str, Any]]})
        return [_checkpoint(entry) for entry in document["checkpoints"]]
    except (InputError, KeyError) as error:
        raise StoreError(f"training: cannot read {file} ({error})") from None


def _checkpoint(entry: Mapping[str, Any]) -> Checkpoint:
    check_types(entry, {"path": str, "step": int, "learning_rate": float, "optimizer": str | None})
    # Earlier versions did not write it.
    trained = entry.get("trained")
    check_types({"trained": trained}, {"trained": list[str] | None})
    optimizer = None if entry["optimizer"] is None else Path(entry["optimizer"])
    return Checkpoint(
        Path(entry["path"]),
        entry["step"],
        entry["learning_rate"],
        optimizer,
        None if trained is None else tuple(trained),
    )


def _digest(values: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(values):
        found.update(f"{name} {tuple(values[name].shape)}\n".encode())
        found.update(values[name].contiguous().numpy().tobytes())
    return found.hexdigest()
