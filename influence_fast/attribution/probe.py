"""A probe of hidden states: how probable a label is by a logistic regression that was fitted without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.attribution.registry import PROBE_FOLDS
from influence_fast.errors import InputError

# A probe learns no better from more.
_PROBE_ROWS, _AT_ONCE = 20_000, 8192
_PENALTIES = (1e-4, 1e-3, 1e-2)
# Log-probability of what an estimate holds impossible.
LEAST = -30.0

# Log-probabilities of the classes, of the training samples and of the queries.
ClassEstimate = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CrossFitted:
    """Log-probabilities of the classes by a probe, float64 ``(rows, classes)``.

    Attributes:
        train: of each training sample, by one of five probes that was fitted without it.
        by_fold: of query j by fold ``j % 5`` of those five, so that it is as good as those of the training samples.
        queries: by a probe that was fitted to all training samples; ``by_fold`` where queries were learned from.
    """

    train: Tensor
    by_fold: Tensor
    queries: Tensor


def probe_estimate(
    states: Tensor,
    labels: Sequence[int] | Tensor,
    queries: Tensor,
    classes: int | None = None,
    seed: int = 0,
    query_labels: Sequence[int] | Tensor | None = None,
) -> ClassEstimate:
    """Logistic regression on states (standardised, L2): of a training sample by one fitted without it, in five folds.

    The penalty is the one of three with the lowest loss out of fold, or the first behind which it rises. At most 20,000
    samples are learned from, and queries whose labels are given, each again left out of the fold that judges it.

    Raises:
        InputError: labels of another length, or a class with fewer samples than folds.
    """
    given = (states.float().numpy(), labels, queries.float().numpy())
    found = cross_fitted(*given, classes, seed, query_labels=query_labels)
    return found.train, found.queries


def cross_fitted(
    x: Any,
    labels: Sequence[int] | Tensor,
    queries: Any,
    classes: int | None = None,
    seed: int = 0,
    penalties: Sequence[float] = _PENALTIES,
    query_labels: Sequence[int] | Tensor | None = None,
) -> CrossFitted:
    """The probes of :func:`probe_estimate`, of any features: arrays, or sparse matrices, which are not centred.

    Queries are learned from where features are arrays alone.

    Raises:
        InputError: as of :func:`probe_estimate`.
    """
    from scipy.sparse import issparse
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y = torch.as_tensor(labels).numpy()
    if y.shape != (x.shape[0],) or np.bincount(y)[np.unique(y)].min() < PROBE_FOLDS:
        raise InputError(f"labels: expected ({x.shape[0]},), each class {PROBE_FOLDS} times or more, got {y.shape}")
    own = None if query_labels is None else torch.as_tensor(query_labels).numpy()
    if own is not None and own.shape != (queries.shape[0],):
        raise InputError(f"query_labels: expected ({queries.shape[0]},), got {own.shape}")
    random, width = (
        np.random.default_rng(seed),
        classes or 1 + max(int(part.max()) for part in (y, own) if part is not None),
    )

    def fitted(rows: np.ndarray, penalty: float, fold: int | None = None) -> Any:
        chosen = random.permutation(rows)[:_PROBE_ROWS]
        learned, known = x[chosen], y[chosen]
        if own is not None and fold is not None:
            others = np.arange(len(own)) % PROBE_FOLDS != fold
            learned, known = np.concatenate([learned, queries[others]]), np.concatenate([known, own[others]])
        steps = [LogisticRegression(C=penalty, max_iter=500)]
        return make_pipeline(*([] if issparse(x) else [StandardScaler()]), *steps).fit(learned, known)

    def predicted(model: Any, given: Any, rows: np.ndarray) -> np.ndarray:
        out = np.full((len(rows), width), -np.inf)
        # Not all at once: standardised copies of many rows' states take as much memory again.
        for begin in range(0, len(rows), _AT_ONCE):
            part = slice(begin, begin + _AT_ONCE)
            out[part, model.classes_] = model.predict_log_proba(given[rows[part]])
        return out

    folds = list(StratifiedKFold(PROBE_FOLDS, shuffle=True, random_state=seed).split(np.zeros(len(y)), y))
    best, chosen = np.inf, penalties[0]
    estimate = by_fold = np.empty((0, width))
    for penalty in penalties:
        found, asked = np.empty((len(y), width)), np.empty((queries.shape[0], width))
        for number, (learned, left) in enumerate(folds):
            model = fitted(learned, penalty, number)
            found[left] = predicted(model, x, left)
            judged = np.arange(number, queries.shape[0], len(folds))
            asked[judged] = predicted(model, queries, judged)
        # A rare class may be missing from what was learned.
        loss = -np.maximum(found[np.arange(len(y)), y], LEAST).mean()
        if not loss < best:
            # The loss has one valley, and the weakest penalties' fits take the longest.
            break
        best, chosen, estimate, by_fold = loss, penalty, found, asked
    every = np.arange(queries.shape[0])
    whole = by_fold if own is not None else predicted(fitted(np.arange(len(y)), chosen), queries, every)
    return CrossFitted(*(torch.from_numpy(part) for part in (estimate, by_fold, whole)))


def log_shares(votes: Tensor) -> Tensor:
    """Log of the classes' shares of votes, a hundredth of a vote more for each class, so that none is impossible."""
    return ((votes + 0.01) / (votes.sum(1, keepdim=True) + 0.01 * votes.shape[1])).log()
