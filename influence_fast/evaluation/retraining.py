"""Filter and retrain: what a ranking is worth once its lowest share is dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.evaluation.metrics import first_rows


@dataclass(frozen=True)
class Retrained:
    """One arm of :func:`filter_and_retrain`: its training set and what it reached.

    Attributes:
        rows: numbers of the rows kept, int64 ascending.
        epoch: the one chosen, from 0, by its accuracy on the selection split.
        selection, reported: accuracy of that epoch on the selection split and on the reported one.
    """

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

    Raises:
        InputError: no ranking, or a share out of range.
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
    cut = first_rows(drop, n)
    kept = {name: values.argsort(stable=True)[cut:].sort().values for name, values in arms.items()}
    out = {}
    for name, rows in {"all": torch.arange(n), **kept}.items():
        epochs = list(train(rows))
        best = max(range(len(epochs)), key=lambda epoch: epochs[epoch][0])
        out[name] = Retrained(rows, best, *epochs[best])
    return out
