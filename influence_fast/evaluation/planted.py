"""AUC_NDR on wrong labels that nobody knows, from labels that were made wrong on purpose among them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.evaluation.metrics import checked_scores, interval, roc_auc

# Of a set of which more is wrong, planting says next to nothing.
_LEAST_APART = 0.1


def ndr_auc_from_planted(
    scores: Tensor,
    planted: Tensor,
    wrong: float,
    classes: int = 2,
    *,
    between: tuple[float, float] | None = None,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """AUC_NDR on the labels that were wrong before any were planted, and its interval.

    Rows that were not planted hold wrong labels too, and a planted change of a wrong label may have made it right (always
    with two classes), so AUC_NDR of the planted ones is too low: with shares ``f`` of the first and ``g = f / (classes -
    1)`` of the second, ``ROC-AUC - 1/2`` is ``1 - f - g`` times what it is for wrong labels against right ones (Menon et al.
    2015, Learning from corrupted binary labels). That is undone here. It holds where planted labels are like the others:
    drawn at random, and trained on as they were.

    Args:
        scores: of a ranking, lowest for the most doubtful, ``(n,)``.
        planted: boolean ``(n,)``, whose labels were changed to another class at random.
        wrong: share of labels that were wrong before, such as an audit estimates.
        classes: of the labels.
        between: the ends of the 95 % interval of that share; the share is taken as known without.
        resamples, level, seed: of the bootstrap that the interval comes from.

    Raises:
        InputError: a share of 0 or so large that planting says nothing, one class, and what ``roc_auc`` raises.
    """
    values, marked = checked_scores(scores, planted)
    ends = (wrong, wrong) if between is None else between
    if not 0 < wrong < 1 or not ends[0] <= wrong <= ends[1]:
        raise InputError(f"wrong, between: expected a share within its interval, got {wrong!r} and {between!r}")
    if classes < 2 or 1 - wrong - wrong / (classes - 1) < _LEAST_APART:
        raise InputError(f"wrong, classes: planting says nothing of {wrong!r} wrong labels in {classes} classes")
    n, m = len(values), max(1, round(wrong * len(values)))

    def figure(auc: float, others: float, righted: float) -> float:
        true = 0.5 + (auc - 0.5) / max(1 - others - righted, _LEAST_APART)
        # Mann and Whitney's U as the mean place of m wrong labels among n.
        return (n + 1 - (m + 1) / 2 - (1 - true) * (n - m)) / (n - m / 2)

    random, rows = np.random.default_rng(seed), [np.flatnonzero(marked), np.flatnonzero(~marked)]
    spread, found = (ends[1] - ends[0]) / 3.92, []
    for _ in range(resamples):
        chosen = np.concatenate([random.choice(part, len(part)) for part in rows])
        share = float(np.clip(wrong + spread * random.normal(), 0, 1))
        others, righted = (
            random.binomial(len(part), chance) / len(part)
            for part, chance in zip(rows[::-1], (share, share / (classes - 1)), strict=True)
        )
        auc = roc_auc(torch.from_numpy(values[chosen]), torch.from_numpy(marked[chosen]))
        found.append(figure(auc, others, righted))
    value = figure(roc_auc(scores, planted), wrong, wrong / (classes - 1))
    low, high = interval(value, np.asarray(found), None, min(map(len, rows)), level)
    worst, best = (figure(end, 0.0, 0.0) for end in (0.0, 1.0))
    value, low, high = (min(max(part, worst), best) for part in (value, low, high))
    return value, low, high
