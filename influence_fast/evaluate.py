"""How good a ranking is: noise detection rate and its companions, cancellation, filter and retrain.

Everywhere ``scores (n,)`` are sorted ascending (lowest = most harmful first) and ``noise (n,)`` is true where a sample is
known to be bad. With ``c_j`` noisy samples among the first j, m noisy of n:

``NDR@q = c_{floor(q n)} / m`` and ``AUC_NDR = (1/m) sum_j c_j / (n - m/2)`` (arXiv 2511.04715). A random order has AUC_NDR
``(n + 1) / (2 n - m)`` on average, a perfect one just over 1. Tied scores count with the expectation over their orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.influence import Gradients, Source, chosen_layers


def ndr_curve(scores: Tensor, noise: Tensor) -> Tensor:
    """Share of the noisy samples found among the first j: float64 ``(n,)``, entry ``j - 1`` for j = 1 .. n."""
    values, bad = _checked(scores, noise)
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
    count = _first(at, len(curve))
    return float(curve[count - 1]) if count else 0.0


def ndr_auc(scores: Tensor, noise: Tensor) -> float:
    """``AUC_NDR = (1/m) sum_j c_j / (n - m/2)``."""
    curve = ndr_curve(scores, noise)
    bad = int(torch.as_tensor(noise).sum())
    return float(curve.sum()) / (len(curve) - bad / 2)


def roc_auc(scores: Tensor, noise: Tensor) -> float:
    """Probability that a noisy sample scores below a clean one, ties counting half."""
    from sklearn.metrics import roc_auc_score

    values, bad = _checked(scores, noise)
    return float(roc_auc_score(bad, -values))


def precision(scores: Tensor, noise: Tensor, at: float = 0.3) -> float:
    """Share of noisy samples among the lowest ``floor(at * n)``."""
    curve = ndr_curve(scores, noise)
    count = _first(at, len(curve))
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
    """Percentile interval of ``metric(scores, noise)`` under resampling of the samples, noisy and clean apart."""
    values, bad = _checked(scores, noise)
    if resamples < 1 or not 0 < level < 1:
        raise InputError(f"resamples, level: expected at least 1 and a share below 1, got {resamples!r} and {level!r}")
    random = np.random.default_rng(seed)
    strata = [np.flatnonzero(bad), np.flatnonzero(~bad)]
    found = []
    for _ in range(resamples):
        rows = np.concatenate([random.choice(stratum, len(stratum)) for stratum in strata])
        found.append(metric(torch.from_numpy(values[rows]), torch.from_numpy(bad[rows])))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def cancellation(gradients: Gradients, layers: Sequence[str] | None = None) -> dict[str, float]:
    """``sum_i |g_i|_1 / |sum_i g_i|_1`` of each layer over all samples, summed in float64; infinity where the sum is 0.

    ``gradients`` is a store or ``{layer: (n, dim)}``.
    """
    source = Source("gradients", gradients)
    out = {}
    for name in chosen_layers(source.layers, layers):
        total, absolute = torch.zeros(source.dim(name), dtype=torch.float64), 0.0
        for block in source.blocks(name):
            values = source.read(name, block).double()
            total += values.sum(0)
            absolute += float(values.abs().sum())
        norm = float(total.abs().sum())
        out[name] = absolute / norm if norm else math.inf
    return out


@dataclass(frozen=True)
class Retrained:
    """One arm of :func:`filter_and_retrain`: rows kept, the epoch chosen, its accuracy on the reported split."""

    rows: Tensor
    epoch: int
    selection: float
    reported: float


def filter_and_retrain(
    train: Callable[[Tensor], Sequence[tuple[float, float]]],
    scores: Mapping[str, Tensor],
    noise: Tensor | None = None,
    *,
    drop: float = 0.3,
    seed: int = 0,
) -> dict[str, Retrained]:
    """Drop the lowest-scoring share, retrain, and compare with dropping nothing, as many at random, and the truly noisy.

    Args:
        train: ``train(rows)`` trains from the same initial checkpoint on the given row numbers (int64, ascending) and
            returns ``(accuracy on the selection split, accuracy on the reported split)`` of each epoch.
        scores: ``{name: (n,)}``, one arm each, beside ``all``, ``random`` and, where ``noise`` is known, ``oracle``.
        drop: share that an arm drops; the oracle drops the noisy samples first and fills up at random.

    Returns:
        ``{arm: Retrained}``. The epoch is the best on the selection split, so the reported split has no part in choosing.
    """
    if not scores or not 0 < drop < 1:
        raise InputError(
            f"scores, drop: expected at least one ranking and a share below 1, got {list(scores)}, {drop!r}"
        )
    n = len(next(iter(scores.values())))
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.rand(n, generator=generator, dtype=torch.float64)
    arms = {**scores, "random": shuffled}
    if noise is not None:
        arms["oracle"] = shuffled - 2 * torch.as_tensor(noise).double()
    cut = _first(drop, n)
    kept = {name: values.argsort(stable=True)[cut:].sort().values for name, values in arms.items()}
    out = {}
    for name, rows in {"all": torch.arange(n), **kept}.items():
        epochs = list(train(rows))
        best = max(range(len(epochs)), key=lambda epoch: epochs[epoch][0])
        out[name] = Retrained(rows, best, *epochs[best])
    return out


def _first(at: float, n: int) -> int:
    """``floor(at * n)``, not one less because 0.29 * 100 is 28.999..."""
    if not 0 <= at <= 1:
        raise InputError(f"at: expected a share from 0 to 1, got {at!r}")
    return math.floor(at * n + 1e-9)


def _checked(scores: Any, noise: Any) -> tuple[np.ndarray, np.ndarray]:
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
