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
from typing import Any

import torch
from torch import Tensor

from influence_fast._memory import parse_memory
from influence_fast.attribution.preconditioners import Whitening, eigenvalue_corrected
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.store import GradientStore

METHODS = ("dot", "cosine", "datainf", "trak", "trackstar", "ekfac")
Gradients = GradientStore | Mapping[str, Tensor]
# Gradients read at once: small enough to be found in cache by the product that follows.
_BLOCK_BYTES = 16 << 20
_MEMORY = 512 << 20
# Bytes that ranking takes for each training sample, apart from the influence itself: kernels' room on two threads and sums.
_RANKING = 270


def influence(
    train: Gradients,
    queries: Gradients,
    method: str = "dot",
    layers: list[str] | None = None,
    *,
    damping: float = 0.1,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    memory: int | str = _MEMORY,
) -> InfluenceMatrix:
    """Influence of the rows of ``train`` on ``queries``, computed when asked for.

    Args:
        train: a store, or ``{layer: (n, dim)}``.
        queries: a store, or ``{layer: (m, dim)}`` with the same layers and projection.
        method: see the table above.
        layers: some of the layers; all by default.
        damping: share of the curvature's mean eigenvalue that is added to each (all but ``dot`` and ``cosine``).
        factors: ``{layer: (E[x x^T], E[dy dy^T])}`` of :func:`~influence_fast.kronecker_factors`, for ``ekfac``.
        memory: what blocks of influence, and aggregating them, may take, in bytes or as text such as ``2GiB``. More means
            fewer passes over the training store. Queries, scores and one block of gradients come on top.

    Raises:
        InputError: unknown method or layer, shapes that do not fit, gradients that are not finite, missing factors, too
            little memory.
        StoreError: stores of different models or projections.
    """
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < damping < float("inf"):
        raise InputError(f"damping: expected a positive share of the mean eigenvalue, got {damping!r}")
    matrix = InfluenceMatrix(Source("train", train), Source("queries", queries), method, layers, memory)
    matrix.damping, matrix.factors = damping, factors or {}
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
        self, train: Source, queries: Source, method: str, layers: list[str] | None, memory: int | str = _MEMORY
    ) -> None:
        train.check_matches(queries)
        self.memory = parse_memory(memory)
        self.method = method
        self.layers = chosen_layers(train.layers, layers)
        self.shape = (queries.rows, train.rows)
        self.query_correct = queries.correct
        self.damping = 0.1
        self.factors: Mapping[str, tuple[Tensor, Tensor]] = {}
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

    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]:
        for name, queries in self.pieces():
            yield name, queries, self.piece(name, queries)

    def pieces(self) -> list[tuple[str, slice]]:
        """What iterating goes through: layers, and slices of the queries that fit the memory."""
        m, n = self.shape
        step = (self.memory - _RANKING * n) // (4 * n)
        if step < 1:
            need = (_RANKING + 4) * n
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
        """
        values = self.query(self._checked(name)).double()
        bad = values.isfinite().all(1).logical_not().nonzero()
        if len(bad):
            raise InputError(f"influence: layer {name!r} has NaN or infinity for query {int(bad[0])}")
        summed = weights.double() @ values
        out = torch.empty(len(weights), self.shape[1], dtype=torch.float64)
        for train in self._train.blocks(name):
            out[:, train] = summed @ self._train.read(name, train).double().T
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
        parts = [self._train.digest, self._queries.digest, self.method, repr(self.damping), *self.layers]
        for name, pair in self.factors.items():
            parts += [name, *(hashlib.sha256(factor.contiguous().cpu().numpy().data).hexdigest() for factor in pair)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of training rows with all layers and queries: ``(train, values)``, values ``(L, m, len(train))``."""
        m, n = self.shape
        # Sorting a block takes about four times its size.
        step = max(1, min(self.memory, 4 * _MEMORY) // (16 * max(m * len(self.layers), 1)))
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
                    name, values, lambda: self._train_blocks(name), n, self.factors[name], self.damping
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
        for train in self._train.blocks(name):
            torch.mm(self.query(name)[queries], self._train.read(name, train).T, out=out[:, train])
            if name in self._scale:
                out[:, train] *= self._scale[name][train]
        return out

    def _product(self, name: str, queries: slice, train: slice) -> Tensor:
        values = self.query(name)[queries] @ self._train.read(name, train).T
        return values * self._scale[name][train] if name in self._scale else values

    def _train_blocks(self, name: str) -> Iterator[Tensor]:
        self._train.sqnorm(name)  # Names the layer and row of a gradient that is not finite.
        return (self._train.read(name, rows) for rows in self._train.blocks(name))

    def _whitened(self, name: str, values: Tensor) -> Tensor:
        n, dim = self.shape[1], self._train.dim(name)
        whitening = Whitening(name, lambda: self._train_blocks(name), n, dim, self.damping)
        solved = whitening.solve(values)
        if self.method == "trackstar":
            solved *= _inverse_norm((solved * values).sum(1))[:, None]
            self._scale[name] = _inverse_norm(whitening.sqnorm())
        return solved.float()

    def _precondition(self, name: str, values: Tensor) -> Tensor:
        """DataInf's ``v'``. Where every training gradient is zero there is nothing to invert: ``v' = 0``."""
        n, sqnorm = self.shape[1], self._train.sqnorm(name)
        damping = self.damping * float(sqnorm.sum()) / (n * self._train.weights(name))
        if damping == 0:
            return torch.zeros_like(values)
        weight = (1 / (n * (damping + sqnorm))).float()
        correction = torch.zeros_like(values, dtype=torch.float64)
        for train in self._train.blocks(name):
            rows = self._train.read(name, train)
            correction += ((values @ rows.T) * weight[train]) @ rows
        return ((values.double() - correction) / damping).float()


class Source:
    """One face for a store and for gradients in memory."""

    def __init__(self, argument: str, gradients: Gradients) -> None:
        if not isinstance(gradients, GradientStore | Mapping):
            raise InputError(
                f"{argument}: expected a GradientStore or {{layer: tensor}}, got {type(gradients).__name__}"
            )
        self.argument = argument
        self.store = gradients if isinstance(gradients, GradientStore) else None
        self.memory: Mapping[str, Tensor] = {} if isinstance(gradients, GradientStore) else gradients
        self.layers = list(gradients.layers if isinstance(gradients, GradientStore) else gradients)
        if not self.layers:
            raise InputError(f"{argument}: has no layers")
        for name, tensor in self.memory.items():
            if not isinstance(tensor, Tensor) or tensor.dim() != 2:
                raise InputError(
                    f"{argument}: expected a tensor (rows, dim) for layer {name!r}, got {_described(tensor)}"
                )
        counts = {name: len(tensor) for name, tensor in self.memory.items()}
        if len(set(counts.values())) > 1:
            raise InputError(f"{argument}: layers disagree on the number of rows: {counts}")
        self.rows = len(self.store) if self.store is not None else next(iter(counts.values()))
        if self.rows == 0:
            raise InputError(f"{argument}: has no rows")
        self._sqnorm: dict[str, Tensor] = {}

    @property
    def correct(self) -> Tensor | None:
        if self.store is None or "correct" not in self.store.columns:
            return None
        return self.store.column("correct").bool()

    def dim(self, name: str) -> int:
        return self.store.dims[name] if self.store is not None else self.memory[name].shape[1]

    def weights(self, name: str) -> int:
        """Number of weights of the layer, before any projection; a mapping's dim stands for itself."""
        if self.store is None:
            return self.dim(name)
        out, in_ = self.store.shapes[name]
        return out * in_

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        if self.store is not None:
            return self.store.read(name, rows)
        values = self.memory[name][rows].detach().float()
        return values

    def blocks(self, name: str) -> Iterator[slice]:
        step = self.rows if self.store is None else max(1, _BLOCK_BYTES // (4 * self.dim(name)))
        for begin in range(0, self.rows, step):
            yield slice(begin, min(begin + step, self.rows))

    def sqnorm(self, name: str) -> Tensor:
        """Squared norms of what is read (in a rounded store, not those that were rounded), float64 ``(rows,)``."""
        if name not in self._sqnorm:
            if self.store is not None and self.store.meta["dtype"] == "float32":
                found = self.store.sqnorm(name)
            else:
                found = torch.cat([self.read(name, block).double().square().sum(1) for block in self.blocks(name)])
            bad = found.isfinite().logical_not().nonzero()
            if len(bad):
                raise InputError(f"{self.argument}: layer {name!r} has NaN or infinity in row {int(bad[0])}")
            self._sqnorm[name] = found
        return self._sqnorm[name]

    @property
    def digest(self) -> str:
        """SHA-256 of a store's manifest hashes, or of the bytes in memory."""
        if self.store is not None:
            return self.store.digest
        digest = hashlib.sha256()
        for name, tensor in self.memory.items():
            values = tensor.detach().float().contiguous()
            digest.update(f"{name} {tuple(values.shape)}\n".encode())
            if values.numel():
                digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def check_matches(self, other: Source) -> None:
        """Raise unless ``other``'s gradients live in the same space as these."""
        missing = [name for name in self.layers if name not in other.layers]
        if missing:
            raise StoreError(
                f"{other.argument}: lacks layer {missing[0]!r} of {self.argument}; it has {', '.join(other.layers)}"
            )
        for name in self.layers:
            if self.dim(name) != other.dim(name):
                raise StoreError(
                    f"{other.argument}: layer {name!r} has {other.dim(name)} numbers per row, "
                    f"{self.argument} has {self.dim(name)}: not the same projection"
                )
        if self.store is None or other.store is None:
            return
        for key in ("model", "projection"):
            if self.store.meta[key] != other.store.meta[key]:
                raise StoreError(
                    f"{other.argument}: made with another {key} than {self.argument} "
                    f"({other.store.meta[key]} and {self.store.meta[key]})"
                )
        for name in self.layers:
            mine, theirs = self.store.meta["layers"][name], other.store.meta["layers"][name]
            if mine != theirs:
                raise StoreError(f"{other.argument}: layer {name!r} is {theirs}, {self.argument} has {mine}")


def _inverse_norm(sqnorm: Tensor) -> Tensor:
    return torch.where(sqnorm > 0, sqnorm.rsqrt(), 0).float()


def chosen_layers(there: list[str], layers: Sequence[str] | None) -> list[str]:
    if layers is None:
        return there
    if isinstance(layers, str):
        raise InputError(f"layers: expected a list of names, got the string {layers!r}")
    unknown = [name for name in layers if name not in there]
    if unknown or not layers:
        raise InputError(f"layers: expected some of {', '.join(there)}, got {unknown[0] if unknown else 'none'!r}")
    return [name for name in there if name in set(layers)]


def _described(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
