"""Votes without influence: the most harmful rows of every layer and query, from searches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from influence_fast import ops
from influence_fast.attribution.gradient_source import Gradients, GradientSource
from influence_fast.errors import InputError
from influence_fast.search.influence_index import InfluenceIndex
from influence_fast.search.norm_partitions import live_blocks


def vote_from_index(
    index: InfluenceIndex, queries: Gradients, k: int, *, check: int = 8
) -> tuple[Tensor, dict[str, float | int]]:
    """``vote`` from searches: for every layer and query the ``k`` most harmful rows, ``-sum of (k - rank)`` of each.

    No row of influence is formed, so this is for small ``k``; the index is a ``Flat`` one of inner products, to search
    layer by layer. It differs from ``aggregate(.., "vote")`` only in ties: scores are compared in float64, and those across
    the k-th place count as if no more rows shared them.

    Returns:
        Votes float64 ``(n,)`` and ``{"checked": rows of influence computed to compare, "difference": share of their votes
        that went elsewhere}``.
    """
    if index.metric != "dot":
        raise InputError("index: votes from an index are of inner products; build it with metric='dot'")
    source, n = GradientSource("queries", queries), len(index)
    votes = torch.zeros(n, dtype=torch.float64)
    off, total, checked = 0.0, 0.0, 0
    picked = set(np.random.default_rng(0).permutation(len(index.layers) * source.rows)[:check].tolist())
    for layer, name in enumerate(index.layers):
        values = source.read(name)
        scores, rows = index.search_rows({name: values}, k, harmful=True, layers=[name])
        for query in range(source.rows):
            _, run, size = scores[query].unique_consecutive(return_inverse=True, return_counts=True)
            rank = (size.cumsum(0) - (size + 1) / 2)[run].double()
            votes[rows[query]] -= k - rank
            if layer * source.rows + query in picked:
                own = torch.zeros(n, dtype=torch.float64)
                own[rows[query]] = rank - k
                row = torch.cat([values[query] @ block.T for _, block in live_blocks(index._rows, [name])])
                exact = ops.vote(row[None], k)
                off += float((exact - own).abs().sum()) / 2
                total += float(exact.abs().sum())
                checked += 1
    return votes, {"checked": checked, "difference": off / total if total else 0.0}
