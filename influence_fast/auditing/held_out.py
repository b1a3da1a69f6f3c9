"""Queries for an audit without a trusted set: training rows that are held out of the ranking."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from influence_fast.attribution.model_passes import ModelPasses
from influence_fast.attribution.probe import probe_estimate
from influence_fast.attribution.registry import PROBE_FOLDS
from influence_fast.data.samples import Samples
from influence_fast.errors import InputError

_SHARE, _MOST, _LEAST = 0.1, 500, 8


def hold_out(
    model: nn.Module, samples: Samples, task: str, seed: int = 0, batch_tokens: int | str = "auto"
) -> tuple[Samples, Samples, str]:
    """The samples to rank, those that stand for trusted queries, and a sentence that says what they are.

    A tenth of the samples, 500 at most, drawn by ``seed``: of a classifier's among those whose label a probe of the hidden
    states, fitted without them in five folds, holds most probable; of others among all.

    Raises:
        InputError: too few samples.
    """
    n = len(samples)
    count = min(_MOST, round(_SHARE * n))
    if count < _LEAST:
        raise InputError(
            f"queries: none are given, and a tenth of {n} training rows are too few to stand for them; give a trusted set "
            "(--queries)"
        )
    agreed = _agreed(model, samples, batch_tokens) if task == "classification" else None
    able = torch.ones(n, dtype=torch.bool) if agreed is None or int(agreed.sum()) < 2 * count else agreed
    numbers = able.nonzero()[:, 0]
    random = torch.Generator().manual_seed(seed)
    chosen = numbers[torch.randperm(len(numbers), generator=random)[:count]].sort().values.tolist()
    kept = sorted(set(range(n)) - set(chosen))
    how = (
        f"drawn from the {int(able.sum())} whose label a probe of the hidden states, fitted without them, holds most "
        "probable"
        if able is agreed
        else "drawn at random"
    )
    said = (
        f"No trusted set was given: {count} of the {n} training rows stand for one, {how}. They are not ranked; the model "
        "was trained on them, and some of their labels may be wrong, so trust this ranking less than one by a trusted set"
    )
    return samples.some(kept), samples.some(chosen), said


def _agreed(model: nn.Module, samples: Samples, batch_tokens: int | str) -> Tensor | None:
    """Which labels an out-of-fold probe holds most probable; None where a class is too rare to fit one."""
    labels = torch.tensor([row["labels"] for row in samples.rows])
    if min(Counter(labels.tolist()).values()) < PROBE_FOLDS or not hasattr(
        getattr(model, "config", None), "hidden_size"
    ):
        return None
    last = ModelPasses(model, lambda part: part.rows, (), batch_tokens, progress=False).last_states(samples)
    estimate, _ = probe_estimate(last, labels, last[:1])
    return estimate.argmax(1) == labels
