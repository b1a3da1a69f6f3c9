"""A probe of hidden states: how probable a label is by a logistic regression that was fitted without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.attribution.registry import PROBE_FOLDS
from influence_fast.errors import InputError

# A probe learns no better from more.
_PROBE_ROWS = 20_000
_PENALTIES = (1e-4, 1e-3, 1e-2)
# Log-probability of what an estimate holds impossible.
LEAST = -30.0

# Log-probabilities of the classes, of the training samples and of the queries.
ClassEstimate = tuple[Tensor, Tensor]


def probe_estimate(
    states: Tensor, labels: Sequence[int] | Tensor, queries: Tensor, classes: int | None = None, seed: int = 0
) -> ClassEstimate:
    """Logistic regression on states (standardised, L2): of a training sample by one fitted without it, in five folds.

    The penalty is the one of three with the lowest loss out of fold. At most 20,000 samples are learned from.

    Raises:
        InputError: labels of another length, or a class with fewer samples than folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = states.float().numpy(), torch.as_tensor(labels).numpy()
    if y.shape != (len(x),) or np.bincount(y)[np.unique(y)].min() < PROBE_FOLDS:
        raise InputError(f"labels: expected ({len(x)},), each class {PROBE_FOLDS} times or more, got {y.shape}")
    random, width = np.random.default_rng(seed), classes or int(y.max()) + 1

    def fitted(rows: np.ndarray, penalty: float) -> Any:
        chosen = random.permutation(rows)[:_PROBE_ROWS]
        return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=500)).fit(x[chosen], y[chosen])

    def predicted(model: Any, rows: np.ndarray) -> np.ndarray:
        out = np.full((len(rows), width), -np.inf)
        out[:, model.classes_] = model.predict_log_proba(rows)
        return out

    folds = list(StratifiedKFold(PROBE_FOLDS, shuffle=True, random_state=seed).split(x, y))
    best, chosen = np.inf, _PENALTIES[0]
    estimate = np.empty((0, width))
    for penalty in _PENALTIES:
        found = np.empty((len(x), width))
        for learned, left in folds:
            found[left] = predicted(fitted(learned, penalty), x[left])
        # A rare class may be missing from what was learned.
        loss = -np.maximum(found[np.arange(len(y)), y], LEAST).mean()
        if loss < best:
            best, chosen, estimate = loss, penalty, found
    whole = predicted(fitted(np.arange(len(x)), chosen), queries.float().numpy())
    return torch.from_numpy(estimate), torch.from_numpy(whole)
