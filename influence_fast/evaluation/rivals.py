"""What one would use without influence, to be shown beside it: cleanlab's label quality and the neighbours' agreement.

Scores are lowest for the sample that is most likely mislabelled, as everywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.evaluation.comparison import RIVALS

PROBE, FOLDS, NEIGHBOURS = RIVALS[:3]


def label_quality(labels: Sequence[int] | Tensor, log_probabilities: Tensor) -> Tensor:
    """cleanlab's label quality (Northcutt et al. 2021, its default, self-confidence): float64 ``(n,)``.

    ``log_probabilities`` ``(n, classes)`` come from models that were fitted without the sample.

    Raises:
        InputError: cleanlab is not installed; labels and probabilities that do not fit.
    """
    if not has_cleanlab():
        raise InputError("rivals: cleanlab is not installed; pip install cleanlab")
    from cleanlab.rank import get_label_quality_scores

    given = torch.as_tensor(labels).long()
    if log_probabilities.dim() != 2 or len(log_probabilities) != len(given):
        raise InputError(f"log_probabilities: expected ({len(given)}, classes), got {tuple(log_probabilities.shape)}")
    probabilities = log_probabilities.double().softmax(1).numpy()
    return torch.from_numpy(np.asarray(get_label_quality_scores(given.numpy(), probabilities), dtype=np.float64))


def has_cleanlab() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("cleanlab") is not None


def label_rivals(labels: Sequence[int] | Tensor, agreement: Tensor, probe: Tensor) -> dict[str, Tensor]:
    """The rivals by name: cleanlab's label quality, where it is installed, and the neighbours' agreement.

    Args:
        labels: classes from 0, int ``(n,)``.
        agreement: ``(n,)`` of :func:`~influence_fast.neighbours`.
        probe: log-probabilities ``(n, classes)`` of :func:`~influence_fast.probe_estimate`, out of fold.
    """
    quality = {PROBE: label_quality(labels, probe)} if has_cleanlab() else {}
    return {**quality, NEIGHBOURS: agreement.double()}


def out_of_fold(
    predict: Callable[[Tensor, Tensor], Any], labels: Sequence[int] | Tensor, folds: int = 5, seed: int = 0
) -> Tensor:
    """Log-probabilities of each sample by a model that was trained without it: float64 ``(n, classes)``.

    ``predict(learned, left)`` trains on some row numbers and gives log-probabilities ``(len(left), classes)`` of the others.

    Raises:
        InputError: a class with fewer samples than folds, or predictions of another shape.
    """
    from sklearn.model_selection import StratifiedKFold

    given = torch.as_tensor(labels).long().numpy()
    fewest = int(np.bincount(given)[np.unique(given)].min())
    if not 2 <= folds <= fewest:
        raise InputError(f"folds: expected 2 to {fewest}, the samples of the rarest class, got {folds!r}")
    parts: list[tuple[Tensor, Tensor]] = []
    for learned, left in StratifiedKFold(folds, shuffle=True, random_state=seed).split(given, given):
        part = torch.as_tensor(predict(torch.from_numpy(learned), torch.from_numpy(left))).double()
        classes = parts[0][1].shape[1] if parts else part.shape[-1]
        if part.shape != (len(left), classes):
            raise InputError(f"predict: expected ({len(left)}, {classes}), got {tuple(part.shape)}")
        parts.append((torch.from_numpy(left), part))
    rows, found = (torch.cat(some) for some in zip(*parts, strict=True))
    return found[rows.argsort()]
