"""Influence of every training sample on every query, per layer, in blocks.

``I[layer, query, train]``, positive = helpful: training on the sample lowers the query's loss.

=============  ===================================================================================================
method         definition per layer, query gradient ``v``, training gradients ``g``
=============  ===================================================================================================
``dot``        ``<v, g>``: TracIn with one checkpoint (Pruthi et al. 2020)
``cosine``     ``<v, g> / (|v| |g|)``; a zero norm gives 0 and is counted
``datainf``    ``(1/lam) [<v, g_k> - (1/n) sum_i <v, g_i> <g_i, g_k> / (lam + |g_i|^2)]``,
               ``lam = damping sum_i |g_i|^2 / (n d)``, d weights in the layer (Kwon et al. 2024, eq. 5)
``trak``       ``<v, C^-1 g>``, C the damped second moment of the training gradients: ``curvature.Whitening``
``trackstar``  ``<v, C^-1 g> / sqrt(<v, C^-1 v> <g, C^-1 g>)``: the cosine after whitening
``ekfac``      ``<v, H^-1 g>``, H the Kronecker-factored curvature: ``curvature.eigenvalue_corrected``
=============  ===================================================================================================

DataInf is an inner product with a preconditioned query ``v' = (1/lam) [v - (1/n) sum_i w_i <v, g_i> g_i]``, and so are the
others: each costs one matrix product per layer. No matrix of n x n is formed, but by whitening where n < d.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from influence_fast import ops
from influence_fast._memory import parse_memory
from influence_fast.attribution.gradient_source import Gradients, GradientSource, chosen_layers
from influence_fast.attribution.preconditioners import Damping, Whitening, damping_by_layer, eigenvalue_corrected
from influence_fast.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("dot", "cosine", "datainf", "trak", "trackstar", "ekfac")
MEMORY = 512 << 20
# Bytes that ranking takes for each training sample beside the influence (csrc/cpu/kernels/rank.inc): sums of ranks and
# votes of a block, those of the blocks before, and some more; then scratch of each thread, which has sums of its own in
# short rows.
_SUMS, _SCRATCH, _OWN_SUMS, _SHORT = 40, 16, 16, 1 << 18
# Numbers of a copy that stays within the cache: 2 MB in float64.
_CACHED = 1 << 18
# Squared norm up to which a gradient counts as zero: below the smallest normal numbers of float32.
_VANISHED = torch.finfo(torch.float32).tiny ** 2


class Matrix(Protocol):
    """Influence that can be aggregated: :class:`~influence_fast.InfluenceMatrix` is one, :class:`InMemory` another."""

    @property
    def layers(self) -> list[str]: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def query_correct(self) -> Tensor | None: ...
    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]: ...
    def columns(self) -> Iterator[tuple[slice, Tensor]]: ...


@dataclass(frozen=True)
class InnerProductOptions:
    """Arguments of :func:`~influence_fast.influence` beside the gradients and the method."""

    layers: Sequence[str] | None = None
    damping: Damping = 0.1
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    memory: int | str = MEMORY


def inner_products(
    train: Gradients, queries: Gradients, method: str, options: InnerProductOptions = InnerProductOptions()
) -> InfluenceMatrix:
    """Influence by one of :data:`METHODS`; arguments and errors as of :func:`~influence_fast.influence`."""
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    sources = GradientSource("train", train), GradientSource("queries", queries)
    matrix = InfluenceMatrix(*sources, method, options)
    missing = [name for name in matrix.layers if name not in matrix.factors] if method == "ekfac" else []
    if missing:
        raise InputError(f"factors: ekfac needs those of layer {missing[0]!r}; kronecker_factors() finds them")
    return matrix


class InfluenceMatrix:
    """``I[layer, query, train]``, lazily.

    Iterating gives ``(layer, queries, values)``: blocks of whole rows, ``values`` float32 ``(len(queries), n)`` for a
    slice of the queries. Memory is bounded by the size of a block.

    Attributes:
        layers: names, in the training store's order.
        shape: ``(m, n)``, queries by training rows.
        method: name of the method.
        query_correct: boolean ``(m,)`` of the queries that the model predicts correctly, or None if not known.
    """

    def __init__(
        self, train: GradientSource, queries: GradientSource, method: str, options: InnerProductOptions
    ) -> None:
        train.check_matches(queries)
        self.memory = parse_memory(options.memory)
        self.method = method
        self.layers = chosen_layers(train.layers, options.layers)
        self.shape = (queries.rows, train.rows)
        self.query_correct = queries.correct
        self.damping, self.factors = options.damping, options.factors
        self._damping = damping_by_layer(options.damping, self.layers)
        self._train, self._queries = train, queries
        self._ready: dict[str, Tensor] = {}
        self._scale: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return (
            f"InfluenceMatrix({self.method}: {self.shape[0]} queries x {self.shape[1]} rows, {len(self.layers)} layers)"
        )

    @property
    def zero_norms(self) -> dict[str, tuple[int, int]]:
        """Zero gradients by layer, ``(training rows, queries)``: their cosine is 0 whatever the other side."""
        return {
            name: (int((self._train.sqnorm(name) == 0).sum()), int((self._queries.sqnorm(name) == 0).sum()))
            for name in self.layers
        }

    def layer(self, name: str) -> Tensor:
        """All of one layer: float32 ``(m, n)``."""
        return self._rows(self._checked(name), slice(0, self.shape[0]))

    def total(self, *, equal_layers: bool = False) -> Tensor:
        """Summed over the layers: float32 ``(m, n)``.

        Args:
            equal_layers: each layer's influence is divided by its root mean square over all pairs first, so that none counts
                for more because its gradients, or its inverse curvature, are larger. Which of several models they are of
                then makes no difference either: sums over checkpoints count all alike.
        """
        out = torch.zeros(self.shape)
        for name in self.layers:
            values = self.layer(name)
            size = values.double().square().mean().sqrt() if equal_layers else torch.tensor(1.0)
            # A layer without any influence has no size.
            out += values / size.float() if size > 0 else 0
        return out

    def to_pandas(self, layers: Sequence[str] | None = None) -> pd.DataFrame:
        """All of some layers as a frame in memory, float32 ``(n, len(layers) * m)``.

        Rows are the ids of the training samples, columns ``(layer, query)`` by name; numbers where a side is in memory.
        """
        import pandas as pd

        names = chosen_layers(self.layers, layers)
        values = torch.cat([self.layer(name) for name in names])
        columns = pd.MultiIndex.from_product([names, list(self._queries.ids)], names=["layer", "query"])
        return pd.DataFrame(values.T.numpy(), pd.Index(list(self._train.ids), name="id"), columns)

    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]:
        for name, queries in self.pieces():
            yield name, queries, self.piece(name, queries)

    def pieces(self) -> list[tuple[str, slice]]:
        """What iterating goes through: layers, and slices of the queries that fit the memory.

        Raises:
            InputError: the memory holds no single row of influence.
        """
        m, n = self.shape
        threads, scratch = torch.get_num_threads(), _SCRATCH + (_OWN_SUMS if n <= _SHORT else 0)
        free = self.memory // n - _SUMS
        # A block of fewer rows than threads is ranked by as many threads.
        step = max((free - scratch * threads) // 4, min(free // (4 + scratch), threads))
        if step < 1:
            need = (_SUMS + scratch + 4) * n
            raise InputError(f"memory: {self.memory} bytes hold no row of {n} samples; this takes {need} at least")
        return [(name, slice(begin, min(begin + step, m))) for name in self.layers for begin in range(0, m, step)]

    def piece(self, name: str, queries: slice) -> Tensor:
        """Influence of all training rows on some queries: float32 ``(len(queries), n)``."""
        return self._rows(name, queries)

    def mean(self, name: str, keep: Tensor) -> Tensor:
        """Mean influence over sets of queries, in one pass over the layer: boolean ``(c, m)`` -> float64 ``(c, n)``."""
        share = keep.double()
        return self.weighted(name, share / share.sum(1, keepdim=True))

    def weighted(self, name: str, weights: Tensor) -> Tensor:
        """Influence summed over the queries with weights, in one pass over the layer: ``(c, m)`` -> float64 ``(c, n)``.

        The sum of inner products is the inner product with the summed query, so no row of influence is formed.

        Raises:
            InputError: unknown layer, or gradients that are not finite; names layer and row.
        """
        values = self.query(self._checked(name)).double()
        bad = values.isfinite().all(1).logical_not().nonzero()
        if len(bad):
            raise InputError(f"influence: layer {name!r} has NaN or infinity for query {int(bad[0])}")
        summed = weights.double() @ values
        out = torch.empty(len(weights), self.shape[1], dtype=torch.float64)
        for train in self._train.blocks(name):
            _products_of_doubles(summed, self._train.read(name, train), out[:, train])
            if name in self._scale:
                out[:, train] *= self._scale[name][train]
        bad = out.isfinite().all(0).logical_not().nonzero()
        if len(bad):
            raise InputError(f"influence: layer {name!r} has NaN or infinity for training row {int(bad[0])}")
        return out

    def between_queries(self, name: str) -> Tensor:
        """Influence of the queries on each other, by the curvature of the training gradients: float64 ``(m, m)``."""
        values, gradients = self.query(self._checked(name)).double(), self._queries.read(name).double()
        out = values @ gradients.T
        if name not in self._scale:
            return out
        # The left side is of unit length already, so the diagonal holds the lengths of the right one.
        length = out.diagonal()
        return out * torch.where(length > 0, 1 / length, 0)

    @property
    def digest(self) -> str:
        """Tells apart what was computed from what: SHA-256 over both sides, method and layers."""
        damping = repr(list(self._damping.values()) if isinstance(self.damping, Mapping) else self.damping)
        parts = [self._train.digest, self._queries.digest, self.method, damping, *self.layers]
        for name, pair in self.factors.items():
            parts += [name, *(hashlib.sha256(factor.contiguous().cpu().numpy().data).hexdigest() for factor in pair)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of training rows with all layers and queries: ``(train, values)``, values ``(L, m, len(train))``."""
        m, n = self.shape
        # Sorting a block takes about four times its size.
        step = max(1, min(self.memory, 4 * MEMORY) // (16 * max(m * len(self.layers), 1)))
        for begin in range(0, n, step):
            train = slice(begin, min(begin + step, n))
            yield train, torch.stack([self._product(name, slice(0, m), train) for name in self.layers])

    def query(self, name: str) -> Tensor:
        """What the training gradients are multiplied with: float32 ``(m, dim)``, preconditioned or of unit length."""
        if self._checked(name) not in self._ready:
            values = self._queries.read(name)
            if self.method == "cosine":
                values = values * _inverse_norm(self._queries.sqnorm(name))[:, None]
                self._scale[name] = _inverse_norm(self._train.sqnorm(name))
            elif self.method == "datainf":
                values = self._precondition(name, values)
            elif self.method in ("trak", "trackstar"):
                values = self._whitened(name, values)
            elif self.method == "ekfac":
                n = self.shape[1]
                values = eigenvalue_corrected(
                    name, values, lambda: self._train_blocks(name), n, self.factors[name], self._damping[name]
                )
            self._ready[name] = values
        return self._ready[name]

    def _checked(self, name: str) -> str:
        if name not in self.layers:
            raise InputError(f"layer: expected one of {', '.join(self.layers)}, got {name!r}")
        return name

    def _rows(self, name: str, queries: slice) -> Tensor:
        out = torch.empty(queries.stop - queries.start, self.shape[1])
        self.query(name)
        left = self._query_factors(name)
        for train in self._train.blocks(name):
            if left is not None:
                out[:, train] = self._of_factors(name, left, queries, train)
            else:
                torch.mm(self.query(name)[queries], self._train.read(name, train).T, out=out[:, train])
            if name in self._scale:
                out[:, train] *= self._scale[name][train]
        return out

    def _query_factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Factors of the queries where both sides are kept as such and nothing is to be inverted, or None."""
        train, queries = self._train.store, self._queries.store
        if self.method not in ("dot", "cosine") or train is None or queries is None:
            return None
        if name not in train.outs or name not in queries.outs:
            return None
        # Beyond this, the products of all pairs of factors are more work than the gradients' own.
        if (
            train.factors * queries.factors * (train.outs[name] + train.dims[name] // train.outs[name])
            > train.dims[name]
        ):
            return None
        return queries.read_factors(name)

    def _of_factors(self, name: str, left: tuple[Tensor, Tensor], queries: slice, train: slice) -> Tensor:
        assert self._train.store is not None
        # Factors are what few tokens of a linear layer are: output gradients, and inputs.
        outputs, inputs = self._train.store.read_factors(name, train)
        out = ops.ghost_dot(left[1][queries], left[0][queries], inputs, outputs)
        if self.method == "cosine":
            out *= _inverse_norm(self._queries.sqnorm(name)[queries])[:, None]
        return out

    def _product(self, name: str, queries: slice, train: slice) -> Tensor:
        values = self.query(name)[queries] @ self._train.read(name, train).T
        return values * self._scale[name][train] if name in self._scale else values

    def _train_blocks(self, name: str) -> Iterator[Tensor]:
        self._train.sqnorm(name)  # Names the layer and row of a gradient that is not finite.
        return (self._train.read(name, rows) for rows in self._train.blocks(name))

    def _whitened(self, name: str, values: Tensor) -> Tensor:
        n, dim = self.shape[1], self._train.dim(name)
        whitening = Whitening(name, lambda: self._train_blocks(name), n, dim, self._damping[name])
        solved = whitening.solve(values)
        if self.method == "trackstar":
            solved *= _inverse_norm((solved * values).sum(1))[:, None]
            self._scale[name] = _inverse_norm(whitening.sqnorm())
        return solved.float()

    def _precondition(self, name: str, values: Tensor) -> Tensor:
        """DataInf's ``v'``. Where every training gradient is zero there is nothing to invert: ``v' = 0``."""
        n, sqnorm = self.shape[1], self._train.sqnorm(name)
        damping = self._damping[name] * float(sqnorm.sum()) / (n * self._train.weights(name))
        if damping == 0:
            return torch.zeros_like(values)
        weight = (1 / (n * (damping + sqnorm))).float()
        correction = torch.zeros_like(values, dtype=torch.float64)
        for train in self._train.blocks(name):
            rows = self._train.read(name, train)
            correction += ((values @ rows.T) * weight[train]) @ rows
        return ((values.double() - correction) / damping).float()


class InMemory:
    """Influence that is there as a whole, ``{layer: (m, n)}``."""

    def __init__(self, values: Mapping[str, Tensor], query_correct: Tensor | None = None) -> None:
        self.query_correct = query_correct
        self.values = {name: torch.as_tensor(value) for name, value in values.items()}
        self.layers = list(self.values)
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        if len(set(shapes.values())) != 1 or any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
            raise InputError(f"matrix: expected layers of one shape (queries, samples), got {shapes}")
        m, n = next(iter(shapes.values()))
        self.shape = (m, n)

    def layer(self, name: str) -> Tensor:
        """All of one layer: ``(m, n)``."""
        return self.values[name]

    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]:
        for name, value in self.values.items():
            yield name, slice(0, self.shape[0]), value

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """All training rows in one block, ``(train, values)``, values ``(L, m, n)``."""
        yield slice(0, self.shape[1]), torch.stack(list(self.values.values()))


def as_matrix(matrix: Matrix | Mapping[str, Tensor]) -> Matrix:
    """What a method gave as something to aggregate: ``{layer: (m, n)}`` is wrapped."""
    return InMemory(matrix) if isinstance(matrix, Mapping) else matrix


def _products_of_doubles(left: Tensor, rows: Tensor, out: Tensor) -> None:
    """``left @ rows.T`` in float64: ``(c, dim)`` and float32 ``(n, dim)`` to ``(c, n)``.

    A part at a time, so that the copy in float64 stays within the cache.
    """
    step = max(1, _CACHED // rows.shape[1])
    copy = torch.empty(min(step, len(rows)), rows.shape[1], dtype=torch.float64)
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        out[:, begin : begin + step] = left @ copy[: len(part)].copy_(part).T


def _inverse_norm(sqnorm: Tensor) -> Tensor:
    # Of a gradient that all but vanishes it would be infinite in float32, and its products with zeros no number.
    return torch.where(sqnorm > _VANISHED, sqnorm.rsqrt(), 0).float()
