"""How probable the classes are by what no wrong label of a row has touched: estimates to calibrate on trusted rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.attribution.probe import CrossFitted, cross_fitted, log_shares
from influence_fast.attribution.registry import PROBE_FOLDS
from influence_fast.auditing.findings.words import word_features
from influence_fast.gradients.model_state import is_trained_inside

Rows = Sequence[Mapping[str, Any]]
Estimate = tuple[Tensor, Tensor]
_PENALTIES = (1.0,)


def untouched_estimates(
    model: nn.Module,
    train: Rows,
    trusted: Rows,
    probe: CrossFitted | None = None,
    votes: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Estimate]:
    """By name, log-probabilities of the classes: of the training rows ``(n, classes)`` and of the trusted ``(m, classes)``.

    Words are there wherever rows have token ids. A probe of hidden states and the votes of neighbours count where the
    states come from before the training: of an adapter's base, or of a model of which the head alone was trained. Nothing
    is there where a class has fewer rows than the folds that estimates are fitted in.
    """
    labels, own = (torch.tensor([row["labels"] for row in part]) for part in (train, trusted))
    classes = 1 + int(max(labels.max(), own.max()))
    if int(torch.bincount(labels)[labels.unique()].min()) < PROBE_FOLDS:
        return {}
    out: dict[str, Estimate] = {}
    words = word_estimate(train, trusted, labels, classes)
    if words is not None:
        out["words"] = words
    if probe is not None and votes is not None and not is_trained_inside(model):
        out["probe"] = probe.train, probe.by_fold
        out["neighbours"] = log_shares(votes[0]), log_shares(votes[1])
    width = max((part.shape[1] for both in out.values() for part in both), default=classes)
    return {name: (_widened(both[0], width), _widened(both[1], width)) for name, both in out.items()}


def word_estimate(train: Rows, queries: Rows, labels: Tensor, classes: int) -> Estimate | None:
    """By a logistic regression on words and pairs of words, fitted in five folds; None where rows have no token ids."""
    features = word_features(train, queries)
    if features is None:
        return None
    found = cross_fitted(features[0], labels, features[1], classes, penalties=_PENALTIES)
    return found.train, found.by_fold


def _widened(found: Tensor, width: int) -> Tensor:
    return nn.functional.pad(found.double(), (0, width - found.shape[1]), value=-torch.inf)
