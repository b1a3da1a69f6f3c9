"""Layer group x method x aggregation from one capture, measured against known noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from influence_fast.attribution.aggregation import aggregated
from influence_fast.attribution.gradient_source import Gradients, GradientSource
from influence_fast.attribution.influence import influence
from influence_fast.attribution.influence_matrix import Matrix
from influence_fast.evaluation.comparison import Evaluation, RankingKey, compare
from influence_fast.evaluation.rankings import baselines, groups_by_name


def evaluate(
    train: Gradients,
    queries: Gradients,
    noise: Tensor,
    *,
    methods: Sequence[str] = ("dot", "cosine", "datainf"),
    aggregations: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    matrices: Mapping[str, Matrix | Mapping[str, Tensor]] | None = None,
    fraction: float = 0.2,
    rivals: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Evaluation:
    """Layer group x method x aggregation from one capture, measured against known noise, with baselines beside.

    Args:
        train, queries: stores or ``{layer: (rows, dim)}``.
        noise: boolean ``(n,)`` of the samples known to be bad.
        methods, fraction: as of :func:`~influence_fast.influence` and :func:`~influence_fast.aggregate`.
        aggregations: ``mean``, ``rank-c`` and ``vote-c`` where it is known which queries are predicted correctly,
            ``mean``, ``rank`` and ``vote`` elsewhere.
        groups: ``{name: layers}``; by default by the layers' names: embedding, attention, mlp, head, each block, all.
        matrices: influence by other methods, by name; of their layers, groups keep those that they have.
        rivals: scores ``(n,)`` of what stands beside the baselines, by name, lowest for the most doubtful sample.
        settings: ``levels``, ``accuracy``, ``resamples``, ``level`` and ``seed`` of :func:`compare`.
    """
    source = GradientSource("train", train)
    groups = groups or groups_by_name(source.layers)
    given: dict[str, Matrix | Mapping[str, Tensor]] = {m: influence(train, queries, m) for m in methods}
    beside = {**baselines(train, seed=settings.get("seed", 0)), **(rivals or {})}
    scores = {RankingKey(name): torch.as_tensor(values) for name, values in beside.items()}
    for method, matrix in {**given, **(matrices or {})}.items():
        for group, aggregation, values in aggregated(matrix, aggregations, groups, fraction):
            scores[RankingKey(method, group, aggregation)] = values
    return compare(scores, noise, **settings)
