"""Curvature that is kept: sums over the training gradients, to which rows can be added, and queries preconditioned by them.

Where ``preconditioners`` reads the training gradients again for each set of queries, here they are read once, by
:meth:`LayerCurvature.extend`, and queries cost ``dim^2`` numbers each, whatever the number of rows:

=============  =====================================================================================================
``trak``       ``sum_i g_i g_i^T``; queries become ``(C + lam I)^-1 v``, ``C`` the mean of it
``trackstar``  the same; beside it ``g_i^T (C + lam I)^-1 g_i`` of every row, whose roots the scores are divided by
``datainf``    ``sum_i g_i g_i^T / (lam + |g_i|^2)``; queries become ``(1/lam) (v - (1/n) sum v)``
``ekfac``      the bases of the Kronecker factors, and the squares of the gradients in them
=============  =====================================================================================================

For a layer of more than :data:`DENSE` numbers ``dim x dim`` would be too many. Its sum is multiplied, while it is read, with
a random matrix of ``rank`` columns, from which its largest eigenvalues and their vectors follow (the Nystroem approximation
of one pass: Tropp, Yurtsever, Udell & Cevher 2017, algorithm 3), and is inverted by Woodbury's identity (LoRIF, arXiv
2601.21929), the eigenvalues beyond the rank taken for their mean. It takes ``dim * rank`` numbers. One pass finds somewhat
less than the best of that rank: :attr:`LayerCurvature.share` says how much of the trace it holds, 1 for a dense sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import md5

import torch
from torch import Tensor

from influence_fast.attribution.preconditioners import kronecker_basis, turned
from influence_fast.errors import InputError
from influence_fast.ops import philox

METHODS = ("datainf", "trak", "trackstar", "ekfac")
DENSE = 4096
"""Numbers of a layer's gradient up to which its curvature is kept whole."""
_RANK, _SKETCH_NUMBERS = 1024, 1 << 27
# Features that the random matrix is drawn for at once.
_FEATURES = 1 << 14

Factors = tuple[Tensor, Tensor]
Blocks = Callable[[], Iterable[Tensor]]
Together = Callable[[Callable[[], Sequence[Tensor]]], Sequence[Tensor]]
"""Adds up over processes what each of them makes of its own rows."""


def alone(make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What one process makes of all rows."""
    return make()


def default_rank(dim: int) -> int:
    """Eigenvalues kept of a layer that is too wide for all: up to 1,024, in a GiB where 64 fit."""
    return min(_RANK, max(64, _SKETCH_NUMBERS // dim))


class LayerCurvature:
    """Curvature of one layer for one method; made by :meth:`made`, or again from :attr:`tensors`.

    Attributes:
        method: one of :data:`METHODS`.
        name: of the layer.
        damping: share of the mean eigenvalue that is added to each.
        weights: numbers of the layer's weight, before any projection.
        tensors: all that is kept, float64.
    """

    def __init__(self, method: str, name: str, weights: int, damping: float, tensors: Mapping[str, Tensor]) -> None:
        self.method, self.name, self.weights, self.damping = method, name, weights, damping
        self.tensors = dict(tensors)
        self._ready: tuple[Tensor, ...] | None = None

    @classmethod
    def made(
        cls,
        method: str,
        name: str,
        dim: int,
        weights: int,
        damping: float,
        blocks: Blocks,
        rank: int | None = None,
        factors: Factors | None = None,
        together: Together = alone,
    ) -> LayerCurvature:
        """Read all rows once, and once more for what rests on their sum: ``blocks()`` gives float32 ``(rows, dim)``.

        Args:
            method, name, weights, damping: as of the class.
            dim: numbers of a row.
            rank: eigenvalues to keep of a layer of more than :data:`DENSE` numbers, or of any where it is given; by default
                all, or :func:`default_rank`.
            factors: ``(E[x x^T], E[dy dy^T])``, for ``ekfac``.
            together: adds up the sums of several processes, each of which gives blocks of its own rows.

        Raises:
            InputError: gradients that are not finite, factors that do not fit, a curvature that is singular.
        """
        zero = torch.zeros((), dtype=torch.float64)
        tensors = {"rows": zero, "square": zero.clone()}
        if method == "ekfac":
            if factors is None:
                raise InputError(f"factors: ekfac needs those of layer {name!r}; kronecker_factors() finds them")
            left, right = kronecker_basis(name, factors, dim)
            # In one order of memory, so that products have the same bits once they were saved and loaded.
            tensors |= {"left": left.double().contiguous(), "right": right.double().contiguous()}
            tensors["squares"] = torch.zeros(len(left), len(right), dtype=torch.float64)
        else:
            small = dim <= DENSE if rank is None else rank >= dim
            width = dim if small else default_rank(dim) if rank is None else rank
            tensors["moment" if small else "sketch"] = torch.zeros(dim, width, dtype=torch.float64)
        found = cls(method, name, weights, damping, tensors)
        found._fill(blocks, together)
        return found

    def remade(self, blocks: Blocks) -> LayerCurvature:
        """The same of other rows, all of them read anew; the bases of Kronecker factors stay."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in ("trace", "lengths")}
        empty = {name: t if name in ("left", "right") else torch.zeros_like(t) for name, t in kept.items()}
        found = type(self)(self.method, self.name, self.weights, self.damping, empty)
        found._fill(blocks)
        return found

    def _fill(self, blocks: Blocks, together: Together = alone) -> None:
        def measure() -> list[Tensor]:
            for _ in self._measured(blocks()):
                pass
            return [self.tensors[name] for name in counted]

        def add() -> list[Tensor]:
            self.extend(blocks())
            return [self.tensors[name] for name in summed]

        counted, summed = ["rows", "square"], [name for name in self.tensors if name in ("moment", "sketch", "squares")]
        if self.method == "datainf":
            # What each row is divided by rests on the lengths of all.
            self.tensors |= zip(counted, together(measure), strict=True)
            if "sketch" in self.tensors:
                self.tensors["trace"] = torch.zeros((), dtype=torch.float64)
                summed.append("trace")
        else:
            summed += counted
        self.tensors |= zip(summed, together(add), strict=True)
        self._ready = None
        if self.method == "trackstar":
            self.tensors["lengths"] = self.squares_of(blocks())

    @property
    def rows(self) -> int:
        """Training rows that it is of."""
        return int(self.tensors["rows"])

    @property
    def grows(self) -> bool:
        """Whether rows can be added without reading the others again."""
        return self.method in ("trak", "ekfac")

    @property
    def shift(self) -> float:
        """What is added to each eigenvalue: ``lam``."""
        if self.method == "ekfac":
            return self.damping * float(self.tensors["squares"].mean()) / max(self.rows, 1)
        over = self.weights if self.method == "datainf" else self._dim
        return self.damping * float(self.tensors["square"]) / (max(self.rows, 1) * over)

    @property
    def share(self) -> float:
        """Share of the curvature's trace that is kept: 1 but for a layer with a ``rank``."""
        if "sketch" not in self.tensors or self.shift == 0:
            return 1.0
        return min(1.0, float(self._solved[1].sum()) / self._trace)

    @property
    def _trace(self) -> float:
        return float(self.tensors["trace" if self.method == "datainf" else "square"]) / self.rows

    @property
    def _inverted(self) -> tuple[Tensor, Tensor, float]:
        """Eigenvectors, what ``H^-1`` multiplies each with, and with what all that is orthogonal to them: the inverse at the
        mean of the eigenvalues that are left, whose sum is known from the trace."""
        vectors, eigenvalues = self._solved
        left = max(self._dim - len(eigenvalues), 1)
        rest = max(self._trace - float(eigenvalues.sum()), 0.0) / left
        if self.method == "datainf":
            return vectors, (1 - eigenvalues) / self.shift, (1 - rest) / self.shift
        return vectors, 1 / (eigenvalues + self.shift), 1 / (rest + self.shift)

    @property
    def _dim(self) -> int:
        return len(self.tensors["moment" if "moment" in self.tensors else "sketch"])

    def extend(self, blocks: Iterable[Tensor]) -> None:
        """Take in more training gradients, float32 ``(rows, dim)`` each.

        Raises:
            InputError: gradients that are not finite.
        """
        self._ready = None
        random = self._random() if "sketch" in self.tensors else None
        if self.method != "datainf":
            blocks = self._measured(blocks)
        for block in blocks:
            rows = block.double()
            if self.method == "ekfac":
                left, right = self.tensors["left"].float(), self.tensors["right"].float()
                self.tensors["squares"] += turned(block, left, right).square().sum(0, dtype=torch.float64)
                continue
            weighted = rows
            if self.method == "datainf":
                square = rows.square().sum(1)
                if self.shift == 0:
                    continue
                weighted = rows / (self.shift + square)[:, None]
                if random is not None:
                    self.tensors["trace"] += (square / (self.shift + square)).sum()
            if random is None:
                self.tensors["moment"].addmm_(weighted.T, rows)
            else:
                self.tensors["sketch"].addmm_(weighted.T, rows @ random)

    def precondition(self, values: Tensor) -> Tensor:
        """``H^-1 v`` of each row of ``values``: float64 ``(m, dim)``; 0 where every training gradient is zero.

        Raises:
            InputError: a damping too small for the curvature to be inverted.
        """
        values = values.double()
        if self.shift == 0:
            return torch.zeros_like(values)
        if self.method == "ekfac":
            left, right = self.tensors["left"].float(), self.tensors["right"].float()
            eigenvalues = self.tensors["squares"] / self.rows
            scaled = turned(values, left, right).double() / (eigenvalues + self.shift)
            return (self.tensors["left"] @ scaled @ self.tensors["right"].T).flatten(1)
        if "moment" in self.tensors:
            if self.method == "datainf":
                return (values - values @ self.tensors["moment"] / self.rows) / self.shift
            return torch.cholesky_solve(values.T, self._solved[0]).T
        vectors, by, beyond = self._inverted
        along = values @ vectors
        return (along * by) @ vectors.T + (values - along @ vectors.T) * beyond

    def squares_of(self, blocks: Iterable[Tensor]) -> Tensor:
        """``g^T (C + lam I)^-1 g`` of gradients: float64 ``(rows,)``; for whitening methods alone."""
        out = [torch.empty(0, dtype=torch.float64)]
        for block in blocks:
            rows = block.double()
            if self.shift == 0:
                out.append(torch.zeros(len(rows), dtype=torch.float64))
            elif "moment" in self.tensors:
                out.append(torch.linalg.solve_triangular(self._solved[0], rows.T, upper=False).square().sum(0))
            else:
                vectors, by, beyond = self._inverted
                along = (rows @ vectors).square()
                rest = (rows.square().sum(1) - along.sum(1)).clamp_min(0)
                out.append(along @ by + rest * beyond)
        return torch.cat(out)

    @property
    def _solved(self) -> tuple[Tensor, ...]:
        """The Cholesky factor of ``C + lam I``; or eigenvectors ``(dim, rank)`` and eigenvalues of a sketched mean."""
        if self._ready is None:
            if "moment" in self.tensors:
                matrix = self.tensors["moment"] / self.rows
                matrix.diagonal().add_(self.shift)
                factor, failed = torch.linalg.cholesky_ex(matrix)
                if failed:
                    raise InputError(f"damping: too small, the curvature of layer {self.name!r} is singular")
                self._ready = (factor,)
            else:
                try:
                    self._ready = self._eigenvectors()
                except torch.linalg.LinAlgError as error:
                    raise InputError(
                        f"curvature: that of layer {self.name!r} cannot be decomposed, as where what was kept of it is "
                        f"damaged; make it again ({error})"
                    ) from None
        return self._ready

    def _eigenvectors(self) -> tuple[Tensor, Tensor]:
        sketch, random = self.tensors["sketch"] / self.rows, self._random()
        # Shifted by the size of its rounding, so that the core below is positive; taken off the eigenvalues again.
        tiny = torch.finfo(torch.float64).eps * float(sketch.norm()) * len(sketch) ** 0.5
        sketch.add_(random, alpha=tiny)
        core = random.T @ sketch
        core = (core + core.T) / 2
        # Columns that the gradients do not reach, where there are fewer of them than the rank, make the core singular.
        values, basis = torch.linalg.eigh(core)
        kept = values > values[-1] * 1e-13
        half = sketch @ (basis[:, kept] * values[kept].rsqrt())
        squares, turn = torch.linalg.eigh(half.T @ half)
        real = squares > squares[-1] * 1e-13
        vectors = half @ (turn[:, real] * squares[real].rsqrt())
        return vectors, (squares[real] - tiny).clamp_min(0)

    def _measured(self, blocks: Iterable[Tensor]) -> Iterable[Tensor]:
        """The same blocks, counted."""
        for block in blocks:
            square = block.double().square().sum(1)
            bad = square.isfinite().logical_not().nonzero()
            if len(bad):
                number = self.rows + int(bad[0])
                raise InputError(f"store: layer {self.name!r} has NaN or infinity in row {number}")
            self.tensors["rows"] = self.tensors["rows"] + len(block)
            self.tensors["square"] = self.tensors["square"] + square.sum()
            yield block

    def _random(self) -> Tensor:
        """Standard normal numbers ``(dim, width)`` that depend on the layer's name alone."""
        dim, width = self.tensors["sketch"].shape
        digest = md5(f"{self.name}/curvature".encode(), usedforsecurity=False).digest()
        key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
        out = torch.empty(dim, width, dtype=torch.float64)
        for begin in range(0, dim, _FEATURES):
            end = min(begin + _FEATURES, dim)
            out[begin:end] = philox.gaussian(key, (begin, end), (0, width), torch.device("cpu"))
        return out
