"""Influence over several checkpoints of one training (TracInCP)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from influence_fast.attribution.influence_matrix import Matrix
from influence_fast.errors import InputError


class Checkpoints:
    """TracInCP (Pruthi et al. 2020, eq. 1): the weighted sum of the influence at several checkpoints.

    Args:
        matrices: one :class:`~influence_fast.InfluenceMatrix` for each checkpoint, over the same samples and queries.
        weights: one for each, such as the learning rate there; 1 by default.

    Raises:
        InputError: no matrix; other layers or shapes; a weight missing.
    """

    def __init__(self, matrices: Sequence[Matrix], weights: Sequence[float] | None = None) -> None:
        if not matrices:
            raise InputError("matrices: expected at least one checkpoint")
        self.matrices = list(matrices)
        self.weights = [1.0] * len(matrices) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.matrices):
            raise InputError(
                f"weights: expected {len(self.matrices)}, one for each checkpoint, got {len(self.weights)}"
            )
        first = self.matrices[0]
        self.layers, self.shape = first.layers, first.shape
        for place, matrix in enumerate(self.matrices):
            if matrix.layers != self.layers or matrix.shape != self.shape:
                raise InputError(
                    f"matrices: checkpoint {place} has {len(matrix.layers)} layers and shape {matrix.shape}, "
                    f"the first {len(self.layers)} and {self.shape}"
                )

    @property
    def query_correct(self) -> Tensor | None:
        """Queries that the model predicts correctly at the last checkpoint."""
        return self.matrices[-1].query_correct

    def layer(self, name: str) -> Tensor:
        """All of one layer: float32 ``(m, n)``."""
        return torch.cat([values for layer, _, values in self if layer == name])

    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]:
        for parts in zip(*self.matrices, strict=True):
            name, queries, _ = parts[0]
            yield name, queries, self._sum([values for _, _, values in parts])

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of training rows with all layers and queries: ``(train, values)``, values ``(L, m, len(train))``."""
        for parts in zip(*(matrix.columns() for matrix in self.matrices), strict=True):
            yield parts[0][0], self._sum([values for _, values in parts])

    def _sum(self, values: list[Tensor]) -> Tensor:
        total = self.weights[0] * values[0]
        for weight, part in zip(self.weights[1:], values[1:], strict=True):
            total += weight * part
        return total
