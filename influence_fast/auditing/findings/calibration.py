"""How probable it is that a label is wrong, calibrated on trusted rows, and how many labels are.

Trusted rows have right labels; the same rows with another label are errors that are known. Scores of both come from
estimators that were fitted without the row at hand, as those of the training rows do, so that they compare. A logistic
regression (Platt 1999) on the log-odds of the given label tells the two apart; the share of wrong labels among the training
rows is what makes its mean there lie between its means over right and over planted labels (adjusted counting, Forman 2008),
and shifts its probabilities to that share (Saerens et al. 2002).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Fewer trusted rows say nothing of how often a probability is right.
LEAST_TRUSTED = 50
_FOLDS, _BINS, _RESAMPLES, _SEEDS = 5, 10, 2000, 0
_FLOOR = -12.0
# Standard errors between the means of right labels and planted errors, below which nothing is calibrated.
_APART = 3.0


@dataclass(frozen=True)
class Calibrated:
    """What was found of all training rows.

    Attributes:
        wrong: probability that a label is wrong, float64 ``(n,)``.
        share, low, high: of the labels that are wrong, with the ends of a 95 % interval.
        reliability: bins of the trusted rows and their planted errors, ``predicted``, ``observed`` and ``count``; each row
            was left out of what its probability comes from.
        error: expected calibration error over these bins.
    """

    wrong: Tensor
    share: float
    low: float
    high: float
    reliability: list[dict[str, float]]
    error: float


def calibrate(
    train: Mapping[str, Tensor], labels: Tensor, trusted: Mapping[str, Tensor], own: Tensor, seed: int = _SEEDS
) -> Calibrated | None:
    """Probabilities of wrong labels from how probable the classes are by some estimators.

    Args:
        train: log-probabilities of the classes by each estimator, fitted without the row, ``(n, classes)``.
        labels: of the training rows, int ``(n,)``, of which some are wrong.
        trusted: the same of the trusted rows, ``(m, classes)``.
        own: their labels, int ``(m,)``, all right.

    Returns:
        None where the estimates do not tell right labels from planted errors: their means are less than three standard
        errors apart.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    classes, m = next(iter(train.values())).shape[1], len(own)
    given = _features(train, labels)
    right = _features(trusted, own)
    # Each other class is an error that could have been made.
    others = [(own + step) % classes for step in range(1, classes)]
    wrong = np.stack([_features(trusted, other) for other in others], 1)

    def fitted(rows: np.ndarray) -> Any:
        x = np.concatenate([right[rows], wrong[rows].reshape(-1, right.shape[1])])
        y = np.repeat([0, 1], [len(rows), len(rows) * (classes - 1)])
        weight = np.repeat([1.0, 1 / (classes - 1)], [len(rows), len(rows) * (classes - 1)])
        return LogisticRegression(C=1.0, max_iter=500).fit(x, y, sample_weight=weight)

    def odds(model: Any, x: np.ndarray) -> np.ndarray:
        """Of a label being wrong where half are."""
        return model.decision_function(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1])

    counts = torch.bincount(own)
    folds = min(_FOLDS, max(2, int(counts[counts > 0].min())))
    of_right, of_wrong = np.empty(m), np.empty((m, classes - 1))
    of_train = np.zeros(len(labels))
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(right, own.numpy()))
    for learned, left in splits:
        model = fitted(learned)
        of_right[left], of_wrong[left] = odds(model, right[left]), odds(model, wrong[left])
        of_train += _sigmoid(odds(model, given)) / folds
    means = _sigmoid(of_right), _sigmoid(of_wrong).mean(1)
    apart = means[1] - means[0]
    if apart.mean() <= _APART * apart.std() / m**0.5:
        return None
    share, low, high = _share(of_train, *means, seed)
    prior = _log_odds(share)
    said = np.concatenate([_sigmoid(of_right + prior), _sigmoid(of_wrong + prior).reshape(-1)])
    true = np.repeat([0.0, 1.0], [m, m * (classes - 1)])
    weight = np.repeat([1 - share, share / (classes - 1)], [m, m * (classes - 1)])
    bins, error = reliability(said, true, weight)
    wrong_now = _sigmoid(odds(fitted(np.arange(m)), given) + prior)
    return Calibrated(torch.from_numpy(wrong_now), share, low, high, bins, error)


def reliability(said: np.ndarray, true: np.ndarray, weight: np.ndarray) -> tuple[list[dict[str, float]], float]:
    """Ten bins of equal width, and the expected calibration error: mean distance of said and seen, by weight."""
    place = np.minimum((said * _BINS).astype(int), _BINS - 1)
    bins, error = [], 0.0
    for number in range(_BINS):
        inside = place == number
        total = weight[inside].sum()
        if total > 0:
            predicted, observed = (float((weight * part)[inside].sum() / total) for part in (said, true))
            bins.append({"predicted": predicted, "observed": observed, "count": int(inside.sum())})
            error += abs(predicted - observed) * float(total / weight.sum())
    return bins, error


def _features(estimates: Mapping[str, Tensor], labels: Tensor) -> np.ndarray:
    """Log-odds of the given label by each estimator."""
    out = []
    for found in estimates.values():
        odds = found.double().log_softmax(1).clamp_min(_FLOOR)
        own = odds.gather(1, labels.long()[:, None])
        rest = odds.scatter(1, labels.long()[:, None], -torch.inf).logsumexp(1, keepdim=True)
        out.append((own - rest)[:, 0].clamp(_FLOOR, -_FLOOR))
    return torch.stack(out, 1).numpy()


def _share(train: np.ndarray, right: np.ndarray, wrong: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Share of wrong labels by three means, and where it lies when all rows are drawn anew."""
    random = np.random.default_rng(seed)

    def solve(mean: float, low: float, high: float) -> float:
        # Means the wrong way round say nothing, so anything could be.
        return float(np.clip((mean - low) / (high - low), 0, 1)) if high > low else float(random.integers(2))

    share = solve(train.mean(), right.mean(), wrong.mean())
    # The mean of thousands of rows drawn anew is normal, and its spread known.
    spread = train.std() / len(train) ** 0.5
    draws = []
    for _ in range(_RESAMPLES):
        rows = random.integers(len(right), size=len(right))
        draws.append(solve(train.mean() + spread * random.normal(), right[rows].mean(), wrong[rows].mean()))
    low, high = np.quantile(draws, [0.025, 0.975])
    return share, float(min(low, share)), float(max(high, share))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _log_odds(share: float) -> float:
    bounded = min(max(share, 1e-4), 1 - 1e-4)
    return float(np.log(bounded / (1 - bounded)))
