"""Inverse curvature applied to query gradients, so that influence stays one matrix product per layer.

Every method here is ``v^T H^-1 g`` for some curvature ``H`` of one layer, estimated from the training gradients; ``H^-1 v``
is found once for each query. ``blocks()`` gives the training gradients, float32 ``(rows, dim)``, a block at a time, and
``damping`` is a share of the mean eigenvalue of ``H`` that is added to each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real

import torch
from torch import Tensor

from influence_fast.errors import InputError

Blocks = Callable[[], Iterator[Tensor]]
Damping = float | Mapping[str, float]
"""One for all layers, or one for each."""
_LARGEST = 16384


def damping_by_layer(damping: Damping, layers: Iterable[str]) -> dict[str, float]:
    """The damping of each layer.

    Raises:
        InputError: one that is not a positive number, or that is missing; names the layer.
    """
    out: dict[str, float] = {}
    for name in layers:
        if isinstance(damping, Mapping) and name not in damping:
            raise InputError(f"damping: has none for layer {name!r}")
        value = damping[name] if isinstance(damping, Mapping) else damping
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < float("inf"):
            where = f" for layer {name!r}" if isinstance(damping, Mapping) else ""
            raise InputError(f"damping: expected a positive share of the mean eigenvalue, got {value!r}{where}")
        out[name] = float(value)
    return out


class Whitening:
    """``(C + lam I)^-1`` with ``C = (1/n) sum_i g_i g_i^T`` and ``lam = damping * trace(C) / dim``.

    TRAK (Park et al. 2023, eq. 13) and TrackStar (Chang et al. 2024, sec. 3) whiten projected gradients by it. Solved in
    float64 on whichever side is smaller: dim x dim, or rows x rows by the push-through identity.

    Raises:
        InputError: both sides are too large to be factored; names the layer.
    """

    def __init__(self, name: str, blocks: Blocks, rows: int, dim: int, damping: float) -> None:
        if min(rows, dim) > _LARGEST:
            raise InputError(
                f"layer {name!r}: whitening {dim} numbers of {rows} rows needs a matrix of {min(rows, dim)}^2; "
                f"project to at most {_LARGEST} numbers"
            )
        self._blocks, self._rows = blocks, rows
        self._dual = dim > rows
        gram = self._gram() if self._dual else self._covariance(dim)
        trace = float(gram.trace()) / rows
        self.damping = damping * trace / dim
        self._shift = self.damping * rows
        gram.diagonal().add_(self._shift)
        self._factor = None if trace == 0 else _cholesky(gram, name)

    def solve(self, values: Tensor) -> Tensor:
        """``(C + lam I)^-1 v`` of each row of ``values``: float64 ``(m, dim)``; 0 where every gradient is zero."""
        values = values.double()
        if self._factor is None:
            return torch.zeros_like(values)
        if not self._dual:
            return torch.cholesky_solve(values.T * self._rows, self._factor).T
        products = torch.cat([values @ rows.double().T for rows in self._blocks()], 1)
        weights = torch.cholesky_solve(products.T, self._factor).T
        begin = 0
        out = values.clone()
        for rows in self._blocks():
            out -= weights[:, begin : begin + len(rows)] @ rows.double()
            begin += len(rows)
        return out / self.damping

    def sqnorm(self) -> Tensor:
        """``g^T (C + lam I)^-1 g`` of every training gradient: float64 ``(rows,)``."""
        if self._factor is None:
            return torch.zeros(self._rows, dtype=torch.float64)
        if self._dual:
            inverse = torch.cholesky_inverse(self._factor).diagonal()
            return (self._rows * (1 - self._shift * inverse)).clamp_min(0)
        parts = [
            torch.linalg.solve_triangular(self._factor, rows.double().T, upper=False).square().sum(0)
            for rows in self._blocks()
        ]
        return torch.cat(parts) * self._rows

    def _covariance(self, dim: int) -> Tensor:
        total = torch.zeros(dim, dim, dtype=torch.float64)
        for rows in self._blocks():
            total.addmm_(rows.double().T, rows.double())
        return total

    def _gram(self) -> Tensor:
        gram = torch.empty(self._rows, self._rows, dtype=torch.float64)
        begin = 0
        for rows in self._blocks():
            other = 0
            for columns in self._blocks():
                gram[begin : begin + len(rows), other : other + len(columns)] = rows.double() @ columns.double().T
                other += len(columns)
            begin += len(rows)
        return gram


def eigenvalue_corrected(
    name: str, values: Tensor, blocks: Blocks, rows: int, factors: tuple[Tensor, Tensor], damping: float
) -> Tensor:
    """EKFAC (George et al. 2018; influence as in Grosse et al. 2023, eq. 20): ``(m, out * in)`` from ``values`` alike.

    With ``A = E[x x^T] = U_A D_A U_A^T`` and ``S = E[dy dy^T] = U_S D_S U_S^T``, a gradient G ``(out, in)`` is taken to the
    basis ``U_S^T G U_A``, where entry (o, i) is divided by its mean square over the training gradients (the corrected
    eigenvalue) plus ``damping`` times the mean of these.

    Raises:
        InputError: factors that do not fit the layer; names it.
    """
    left, right = kronecker_basis(name, factors, values.shape[1])
    eigenvalues = torch.zeros(len(left), len(right), dtype=torch.float64)
    for part in blocks():
        eigenvalues += turned(part, left, right).square().sum(0, dtype=torch.float64)
    eigenvalues /= rows
    shift = damping * eigenvalues.mean()
    if float(shift) == 0:
        return torch.zeros_like(values)
    scaled = turned(values, left, right).double() / (eigenvalues + shift)
    return (left @ scaled.float() @ right.T).flatten(1)


def kronecker_basis(name: str, factors: tuple[Tensor, Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors ``U_S (out, out)`` and ``U_A (in, in)`` of ``(A, S)``, float32; InputError unless they fit."""
    a, s = (factor.double() for factor in factors)
    if len(a) * len(s) != dim:
        raise InputError(
            f"factors: layer {name!r} has {dim} numbers per row, its factors stand for {len(s)} x {len(a)}; "
            "ekfac needs whole gradients (projection identity, no bias)"
        )
    right, left = (torch.linalg.eigh(factor).eigenvectors.float() for factor in (a, s))
    return left, right


def turned(gradients: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Gradients ``(n, out * in)`` in the basis of the factors: float32 ``(n, out, in)``."""
    return left.T @ gradients.float().unflatten(1, (len(left), len(right))) @ right


def _cholesky(matrix: Tensor, name: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise InputError(f"damping: too small, the curvature of layer {name!r} is singular")
    return factor
