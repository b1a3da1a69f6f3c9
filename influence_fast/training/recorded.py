"""Losses and margins of each training sample by epoch, as one small file an epoch, and scores from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from influence_fast._files import atomic_write, make_folder
from influence_fast.errors import InputError, StoreError

_NAMES = ("losses", "margins")


@dataclass(frozen=True)
class RecordedTraining:
    """Losses and margins, each float32 (epochs, samples); NaN where a sample was not seen in an epoch."""

    losses: Tensor
    margins: Tensor

    def aum(self) -> Tensor:
        """Area under the margin, float64 (samples,), lowest = most harmful (Pleiss et al. 2020, arXiv 2001.10528).

        The mean over the epochs in which the sample was seen; NaN where it never was.
        """
        return torch.nanmean(self.margins.double(), 0)

    def mean_loss(self) -> Tensor:
        """Minus the mean loss over the epochs in which a sample was seen, float64 (samples,), lowest = most harmful."""
        return -torch.nanmean(self.losses.double(), 0)


def write_epoch(folder: Path, epoch: int, losses: Tensor, margins: Tensor) -> None:
    """Write one epoch, whole or not at all; one that is there is replaced.

    Raises:
        InputError: losses and margins that are not two vectors of one length.
        InfluenceError: nothing can be written there.
    """
    if losses.ndim != 1 or losses.shape != margins.shape:
        raise InputError(
            f"margins: expected a vector as long as losses, got {tuple(margins.shape)} for {tuple(losses.shape)}"
        )
    make_folder(folder)
    values = {name: value.float().contiguous() for name, value in zip(_NAMES, (losses, margins), strict=True)}
    atomic_write(folder / f"epoch-{epoch:05d}.safetensors", save(values))


def read_epochs(folder: Path) -> RecordedTraining:
    """All epochs of a folder in their order.

    Raises:
        InputError: the folder holds no epoch.
        StoreError: a file that is damaged, or epochs of different numbers of samples.
    """
    files = sorted(folder.glob("epoch-*.safetensors"))
    if not files:
        raise InputError(f"training: {folder} holds no recorded epoch")
    epochs: list[dict[str, Tensor]] = []
    for file in files:
        try:
            values = load_file(file)
        except SafetensorError as error:
            raise StoreError(f"{file}: is damaged ({error})") from None
        expected = epochs[0]["losses"].shape if epochs else values.get("losses", torch.empty(0)).shape
        if set(values) != set(_NAMES) or any(v.ndim != 1 or v.shape != expected for v in values.values()):
            raise StoreError(f"{file}: expected losses and margins of as many samples as {files[0].name} has")
        epochs.append(values)
    losses, margins = (torch.stack([values[name] for values in epochs]) for name in _NAMES)
    return RecordedTraining(losses, margins)
