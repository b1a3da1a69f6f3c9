"""How good a ranking is: noise detection rate and its companions.

Everywhere ``scores (n,)`` are sorted ascending (lowest = most harmful first) and ``noise (n,)`` is true where a sample is
known to be bad. With ``c_j`` noisy samples among the first j, m noisy of n:

``NDR@q = c_{floor(q n)} / m`` and ``AUC_NDR = (1/m) sum_j c_j / (n - m/2)`` (arXiv 2511.04715). A random order has AUC_NDR
``(n + 1) / (2 n - m)`` on average, a perfect one just over 1. Tied scores count with the expectation over their orders.

All raise :class:`~influence_fast.InputError` for scores that are no finite vector, for noise that marks none or all of its
samples, and for shares and counts out of range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.errors import InputError


def order(scores: Tensor, tie: Tensor | None = None) -> Tensor:
    """Row numbers from most harmful to most helpful: int64 ``(n,)``, ties by ``tie`` (lowest first), then by row."""
    by_tie = torch.arange(len(scores)) if tie is None else tie.argsort(stable=True)
    return by_tie[scores[by_tie].argsort(stable=True)]


def ndr_curve(scores: Tensor, noise: Tensor) -> Tensor:
    """Share of the noisy samples found among the first j: float64 ``(n,)``, entry ``j - 1`` for j = 1 .. n."""
    values, bad = checked_scores(scores, noise)
    order = np.argsort(values, kind="stable")
    values, bad = values[order], bad[order].astype(np.float64)
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    sizes = np.diff(np.r_[first, len(values)])
    # Within a tie every sample is as likely to come first: each step finds the tie's mean share of noise.
    step = np.repeat(np.add.reduceat(bad, first) / sizes, sizes)
    return torch.from_numpy(np.cumsum(step) / bad.sum())


def ndr(scores: Tensor, noise: Tensor, at: float = 0.3) -> float:
    """Noise detection rate: share of the noisy samples among the lowest ``floor(at * n)``."""
    curve = ndr_curve(scores, noise)
    count = first_rows(at, len(curve))
    return float(curve[count - 1]) if count else 0.0


def ndr_auc(scores: Tensor, noise: Tensor) -> float:
    """``AUC_NDR = (1/m) sum_j c_j / (n - m/2)``."""
    curve = ndr_curve(scores, noise)
    bad = int(torch.as_tensor(noise).sum())
    return float(curve.sum()) / (len(curve) - bad / 2)


def roc_auc(scores: Tensor, noise: Tensor) -> float:
    """Probability that a noisy sample scores below a clean one, ties counting half."""
    from scipy.stats import rankdata

    values, bad = checked_scores(scores, noise)
    noisy, clean = int(bad.sum()), int((~bad).sum())
    # Mann and Whitney's U: pairs of a noisy and a clean sample, by how far the noisy ones stand above the lowest places.
    above = float(rankdata(values)[bad].sum()) - noisy * (noisy + 1) / 2
    return 1 - above / (noisy * clean)


def precision(scores: Tensor, noise: Tensor, at: float = 0.3) -> float:
    """Share of noisy samples among the lowest ``floor(at * n)``."""
    curve = ndr_curve(scores, noise)
    count = first_rows(at, len(curve))
    if count == 0:
        raise InputError(f"at: {at!r} of {len(curve)} samples is none")
    return float(curve[count - 1]) * int(torch.as_tensor(noise).sum()) / count


def bootstrap(
    metric: Callable[[Tensor, Tensor], float],
    scores: Tensor,
    noise: Tensor,
    *,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of ``metric(scores, noise)`` by a bootstrap that resamples noisy and clean samples apart.

    See :func:`interval`; the lowest and highest possible value are those of the worst and the best order of these samples.
    ``python -m benchmarks.coverage`` measures how often intervals hold the truth.
    """
    values, bad = checked_scores(scores, noise)
    if resamples < 1 or not 0 < level < 1:
        raise InputError(f"resamples, level: expected at least 1 and a share below 1, got {resamples!r} and {level!r}")
    random = np.random.default_rng(seed)
    strata = [np.flatnonzero(bad), np.flatnonzero(~bad)]
    found = []
    for _ in range(resamples):
        rows = np.concatenate([random.choice(stratum, len(stratum)) for stratum in strata])
        found.append(metric(torch.from_numpy(values[rows]), torch.from_numpy(bad[rows])))
    value, worst, best = (metric(torch.from_numpy(v), torch.from_numpy(bad)) for v in (values, 1.0 * bad, -1.0 * bad))
    return interval(value, np.asarray(found), (worst, best), smaller(bad), level)


def interval(
    value: float, resampled: np.ndarray, ends: tuple[float, float] | None, rows: int, level: float
) -> tuple[float, float]:
    """Interval of a figure from its spread over resamples, by Student's t with ``rows - 1`` degrees of freedom.

    A bootstrap understates the spread of few rows: ``rows``, the fewer of noisy and clean, are what limits it. Between
    ``ends``, the lowest and highest possible value, the interval is symmetric on the scale of log-odds, so that it stays
    inside and follows the skew near an end. Where a figure is at an end and no resample differs, the other bound is
    binomial, that of ``rows`` successes in as many trials. Percentiles of the resamples were tried first:
    ``python -m benchmarks.coverage`` shows how often they hold the truth, and how often these do.
    """
    from scipy.special import expit, stdtrit

    quantile = float(stdtrit(max(rows - 1, 1), (1 + level) / 2))
    half = quantile * float(np.std(resampled, ddof=1)) * _widening(rows) if len(resampled) > 1 else 0.0
    if ends is None or not ends[0] <= value <= ends[1] or ends[0] == ends[1]:
        return value - half, value + half
    low, high = ends
    share = (value - low) / (high - low)
    if half < 1e-12 * (high - low):
        slack = (high - low) * (1 - ((1 - level) / 2) ** (1 / rows))
        return value - slack * (share == 1), value + slack * (share == 0)
    # As if half a pair of a noisy and a clean sample were on the other side.
    share = min(max(share, 0.5 / rows**2), 1 - 0.5 / rows**2)
    odds, width = math.log(share / (1 - share)), half / (high - low) / (share * (1 - share))
    return low + (high - low) * float(expit(odds - width)), low + (high - low) * float(expit(odds + width))


def _widening(rows: int) -> float:
    """What the spread over resamples is multiplied by: the bootstrap's own shortfall, and 5 rows more, without which
    intervals of AUC_NDR near 1 held the truth in 0.92 to 0.94 of 2,000 draws.
    """
    return math.sqrt((rows + 5) / max(rows - 1, 1))


def smaller(bad: np.ndarray) -> int:
    """The fewer of noisy and clean samples."""
    return int(min(bad.sum(), len(bad) - bad.sum()))


def rank_correlation(values: Sequence[float], others: Sequence[float], tasks: Sequence[Any] | None = None) -> float:
    """Spearman's rho within each task, averaged over tasks: how well one figure predicts another, such as NDR the accuracy
    after filtering. Tasks in which either does not vary are left out; NaN where none is left.

    Raises:
        InputError: lengths that differ.
    """
    from scipy.stats import spearmanr

    x, y = (np.asarray(column, dtype=np.float64) for column in (values, others))
    task = np.zeros(len(x), dtype=int) if tasks is None else np.unique(np.asarray(tasks), return_inverse=True)[1]
    if x.ndim != 1 or x.shape != y.shape or x.shape != task.shape:
        raise InputError(f"values, others, tasks: expected one length, got {x.shape}, {y.shape} and {task.shape}")
    found = [
        float(spearmanr(x[task == t], y[task == t]).statistic)
        for t in np.unique(task)
        if np.ptp(x[task == t]) and np.ptp(y[task == t])
    ]
    return float(np.mean(found)) if found else math.nan


def wins(values: Any) -> Tensor:
    """``(repeats, cells)`` of a metric -> ``(cells, cells)``: share of repeats in which row beats column, ties half."""
    given = torch.as_tensor(values, dtype=torch.float64)
    if given.dim() != 2 or 0 in given.shape:
        raise InputError(f"values: expected (repeats, cells), got {tuple(given.shape)}")
    return torch.stack([((c[:, None] > given).double() + 0.5 * (c[:, None] == given)).mean(0) for c in given.T])


def first_rows(at: float, n: int) -> int:
    """How many rows a share is: ``floor(at * n)``, not one less because 0.29 * 100 is 28.999..."""
    if not 0 <= at <= 1:
        raise InputError(f"at: expected a share from 0 to 1, got {at!r}")
    return math.floor(at * n + 1e-9)


def checked_scores(scores: Any, noise: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores float64 ``(n,)`` and noise boolean ``(n,)``; InputError where they are no such things."""
    values = torch.as_tensor(scores).detach().cpu().double().numpy()
    given = torch.as_tensor(noise).detach().cpu().numpy()
    if values.ndim != 1 or values.shape != given.shape:
        raise InputError(f"scores, noise: expected two vectors of one length, got {values.shape} and {given.shape}")
    bad = given.astype(bool)
    if given.dtype != bool and not np.array_equal(bad.astype(given.dtype), given):
        raise InputError("noise: expected booleans, or 0 and 1")
    if bad.all() or not bad.any():
        raise InputError(f"noise: expected some samples marked and some not, got {int(bad.sum())} of {len(bad)} marked")
    if not np.isfinite(values).all():
        raise InputError(f"scores: row {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
    return values, bad
