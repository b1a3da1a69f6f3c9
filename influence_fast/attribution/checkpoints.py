"""Influence over several checkpoints of one training: TracInCP and LESS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from influence_fast.attribution.gradient_source import Gradients, GradientSource
from influence_fast.attribution.influence import influence
from influence_fast.attribution.influence_matrix import MEMORY, Matrix
from influence_fast.attribution.method_inputs import MethodInputs
from influence_fast.errors import InputError
from influence_fast.gradients.differences import recorded_identity


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


def tracin(
    train: Sequence[Gradients],
    queries: Sequence[Gradients],
    weights: Sequence[float],
    layers: list[str] | None = None,
    *,
    memory: int | str = MEMORY,
) -> Checkpoints:
    """TracInCP (Pruthi et al. 2020, eq. 1), ``sum_c w_c <g_c(query), g_c(train)>`` by layer, positive = helpful.

    Args:
        train, queries: a store, or ``{layer: (rows, dim)}``, for each checkpoint, of the same rows in the same order.
        weights: the learning rate of each checkpoint, as :func:`~influence_fast.read_training` knows it.
        layers, memory: as of :func:`~influence_fast.influence`.

    Raises:
        InputError: another number of stores or weights than of checkpoints; stores of other rows; what ``influence`` raises.
        StoreError: stores of different models or projections at one checkpoint.
    """
    _check_lists(train, queries, weights)
    each = zip(train, queries, strict=True)
    return Checkpoints([influence(own, asked, "dot", layers, memory=memory) for own, asked in each], weights)


def less(
    train: Sequence[Gradients],
    queries: Sequence[Gradients],
    weights: Sequence[float],
    layers: list[str] | None = None,
    *,
    memory: int | str = MEMORY,
) -> Checkpoints:
    """LESS (Xia et al. 2024, eq. 3), ``sum_c w_c cos(g_c(query), update_c(train))``, positive = helpful.

    The cosine is of all layers together, so the matrix has one layer, ``all``.

    Args:
        train: a store of Adam's updates for each checkpoint (``build_store(adam=read_adam(checkpoint, model))``), or
            ``{layer: (rows, dim)}`` of such.
        queries: a store of plain gradients at each checkpoint, in the layers and projection of its training store.
        weights: the learning rate of each checkpoint.
        layers, memory: as of :func:`~influence_fast.influence`.

    Raises:
        InputError: a training store of plain gradients, or a query store of Adam's updates; otherwise as of
            :func:`~influence_fast.tracin`.
    """
    _check_lists(train, queries, weights)
    matrices = []
    for place, (own, asked) in enumerate(zip(train, queries, strict=True)):
        for argument, source, kind in (("train", own, "Adam's updates"), ("queries", asked, "plain gradients")):
            store = GradientSource(argument, source).store
            if store is not None and ("adam" in recorded_identity(store.meta)) != (argument == "train"):
                raise InputError(
                    f"{argument}: expected a store of {kind} at checkpoint {place}, and {store.path} is none"
                )
        matrices.append(WholeCosine(own, asked, layers, memory))
    return Checkpoints(matrices, weights)


def make_over_checkpoints(inputs: MethodInputs, adam: bool) -> Checkpoints:
    """:func:`less` where ``adam``, :func:`tracin` otherwise, over the checkpoints of the recorded training."""
    checkpoints = inputs.given.checkpoints
    stores = [inputs.at_checkpoint(one, adam) for one in checkpoints]
    rates = [one.learning_rate for one in checkpoints]
    inputs.facts["checkpoints"] = [{"step": one.step, "learning_rate": one.learning_rate} for one in checkpoints]
    train, queries = ([pair[side] for pair in stores] for side in (0, 1))
    layers = None if inputs.options.layers is None else list(inputs.options.layers)
    return (less if adam else tracin)(train, queries, rates, layers, memory=inputs.options.memory)


class WholeCosine:
    """Cosine of the gradients of all layers together, as a matrix of one layer, ``all``; a zero norm gives 0."""

    def __init__(
        self, train: Gradients, queries: Gradients, layers: list[str] | None = None, memory: int | str = MEMORY
    ) -> None:
        self._dot = influence(train, queries, "dot", layers, memory=memory)
        self.layers, self.shape = ["all"], self._dot.shape
        self._own, self._asked = (
            _inverse_norms(GradientSource(argument, source), self._dot.layers)
            for argument, source in (("train", train), ("queries", queries))
        )

    @property
    def query_correct(self) -> Tensor | None:
        """Queries that the model predicts correctly."""
        return self._dot.query_correct

    def layer(self, name: str) -> Tensor:
        """All of it: float32 ``(m, n)``."""
        return torch.cat([values[0] for _, values in self.columns()], 1)

    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]:
        yield "all", slice(0, self.shape[0]), self.layer("all")

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of training rows with all queries: ``(train, values)``, values ``(1, m, len(train))``."""
        for train, values in self._dot.columns():
            cosine = values.double().sum(0) * self._asked[:, None] * self._own[None, train]
            yield train, cosine.float()[None]


def _inverse_norms(source: GradientSource, layers: Sequence[str]) -> Tensor:
    """One over the norm of each row's whole gradient, 0 where that is 0: float64 ``(rows,)``."""
    squared = torch.stack([source.sqnorm(name) for name in layers]).sum(0)
    return torch.where(squared > 0, squared.rsqrt(), 0)


def _check_lists(train: Sequence[Gradients], queries: Sequence[Gradients], weights: Sequence[float]) -> None:
    if not len(train) == len(queries) == len(weights) or not len(train):
        raise InputError(
            f"train, queries, weights: expected one of each for every checkpoint, got {len(train)}, {len(queries)} and "
            f"{len(weights)}"
        )
    first: list[int | str] | None = None
    for place, source in enumerate(train):
        ids = list(GradientSource("train", source).ids)
        if first is not None and ids != first:
            raise InputError(f"train: the rows of checkpoint {place} are not those of the first")
        first = ids
