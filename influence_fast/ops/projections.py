"""What to project gradients with: kind, sizes and seed, from which every matrix entry follows."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.ops.arguments import accumulator
from influence_fast.ops.dispatch import run

Kind = Literal["identity", "rademacher", "gaussian", "sjlt"]
Role = Literal["left", "right", "single"]


@dataclass(frozen=True)
class Side:
    """One implicit ``(k, features)`` random matrix, scaled so that ``E <Pg, Ph> = <g, h>``.

    Row = projected index, column = feature. Entries depend on ``identifier``, row and column alone (and, for
    ``sjlt``, on ``k``), never on device, thread count or batch: a store made on a GPU is queried on a laptop.
    """

    kind: Kind
    identifier: str
    k: int
    features: int

    def __post_init__(self) -> None:
        if self.kind not in ("rademacher", "gaussian", "sjlt"):
            raise InputError(f"kind: expected rademacher, gaussian or sjlt for a matrix, got {self.kind!r}")
        if self.k < 1 or self.features < 1:
            raise InputError(
                f"side {self.identifier!r}: sizes must be positive, got k={self.k}, features={self.features}"
            )

    @property
    def key(self) -> tuple[int, int]:
        """First eight bytes of ``md5(identifier)`` as two little-endian 32-bit words."""
        digest = hashlib.md5(self.identifier.encode(), usedforsecurity=False).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")

    @property
    def scale(self) -> float:
        """Factor on the raw entries: ``1/sqrt(k)`` for dense kinds, 1 for ``sjlt`` (one non-zero per column)."""
        return 1.0 if self.kind == "sjlt" else 1 / math.sqrt(self.k)

    def matrix(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        *,
        backend: str = "auto",
    ) -> Tensor:
        """The dense scaled matrix ``(k, features)``, or its part ``[r0, r1) x [c0, c1)``.

        Raises:
            InputError: a part that lies outside; names what came.
        """
        rows, cols = rows or (0, self.k), cols or (0, self.features)
        if not (0 <= rows[0] <= rows[1] <= self.k and 0 <= cols[0] <= cols[1] <= self.features):
            raise InputError(f"rows, cols: expected ranges within {self.k} x {self.features}, got {rows} and {cols}")
        device = torch.device(device)
        return run("random_matrix", backend, device, dtype, self, rows, cols, dtype, device)


@dataclass(frozen=True)
class Projection:
    """How per-sample gradients are compressed: two-sided, ``P_out G P_in^T``, or by a sketch of ``vec(G)``.

    Args:
        kind: ``identity`` (no compression), ``rademacher``, ``gaussian`` or ``sjlt``.
        dim: ``(out, in)`` projects both sides of each layer's gradient to ``out * in`` numbers; an int ``k`` is a
            one-sided sketch of the flattened gradient to ``k`` numbers. Not used by ``identity``.
        seed: part of every matrix's identifier when given, so that two seeds give independent matrices.

    Raises:
        InputError: unknown kind, or sizes that are not positive.
    """

    kind: Kind = "rademacher"
    dim: tuple[int, int] | int = (16, 16)
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"kind: expected one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if isinstance(self.dim, list):
            object.__setattr__(self, "dim", tuple(self.dim))
        sizes = self.dim if isinstance(self.dim, tuple) else (self.dim,)
        if len(sizes) not in (1, 2) or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
            raise InputError(f"dim: expected a positive int or a pair of them (out, in), got {self.dim!r}")
        if isinstance(self.dim, tuple) and len(self.dim) == 1:
            raise InputError(f"dim: a one-sided projection takes an int, got {self.dim!r}")

    @classmethod
    def parse(cls, text: str | Projection) -> Projection:
        """Read ``identity``, ``rademacher:16x16``, ``sjlt:4096``, ``gaussian:8x8:seed3``; inverse of ``str``.

        A Projection passes through, so that arguments may be either.
        """
        if isinstance(text, Projection):
            return text
        match = re.fullmatch(r"([a-z]+)(?::(\d+)(?:x(\d+))?)?(?::seed(-?\d+))?", str(text))
        if match is None or (match[1] != "identity" and match[2] is None):
            raise InputError(
                "projection: expected identity, KIND:OUTxIN or KIND:K, each with an optional :seedS "
                f"(such as rademacher:16x16 or sjlt:4096), got {text!r}"
            )
        kind, out, in_, seed = match.groups()
        dim = (int(out), int(in_)) if in_ else int(out) if out else (16, 16)
        return cls(kind, dim, None if seed is None else int(seed))  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.kind == "identity":
            return "identity"
        dim = "x".join(map(str, self.dim)) if isinstance(self.dim, tuple) else str(self.dim)
        return f"{self.kind}:{dim}" + ("" if self.seed is None else f":seed{self.seed}")

    @property
    def two_sided(self) -> bool:
        """Whether both sides of a gradient are projected, rather than its flattened numbers."""
        return self.kind != "identity" and isinstance(self.dim, tuple)

    def side(self, layer: str, role: Role, features: int) -> Side | None:
        """The matrix that acts on ``role`` of ``layer``; None for identity.

        ``left`` acts on outputs, ``right`` on inputs, ``single`` on the flattened gradient. The identifier is
        ``"{layer}/{role}"``, followed by ``"/seed{s}"`` when there is a seed.
        """
        if self.kind == "identity":
            return None
        if role not in get_args(Role):
            raise InputError(f"role: expected left, right or single, got {role!r}")
        if isinstance(self.dim, tuple):
            if role == "single":
                raise InputError(f"projection {self}: two-sided, has no single side; give dim as an int for a sketch")
            k = self.dim[0] if role == "left" else self.dim[1]
        else:
            k = self.dim
        seed = "" if self.seed is None else f"/seed{self.seed}"
        return Side(self.kind, f"{layer}/{role}{seed}", k, features)

    def output_dim(self, shape: tuple[int, int]) -> int:
        """Numbers kept per sample for a weight of ``shape`` ``(out, in)``."""
        if self.kind == "identity":
            return shape[0] * shape[1]
        return self.dim[0] * self.dim[1] if isinstance(self.dim, tuple) else self.dim


class Matrices:
    """Dense matrices of sides, made once for each device and dtype and kept as long as this object lives.

    Sides that act on one tensor are stacked, so that one product projects for all of them. ``constants`` serves layers with
    a bias: a side that has one feature more than the tensor takes it as this constant (1, or 0 to leave the bias out).
    """

    def __init__(self, backend: str = "auto") -> None:
        self._backend = backend
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}

    def project(self, x: Tensor, sides: Sequence[Side], constants: Sequence[float] | None = None) -> tuple[Tensor, ...]:
        """``x P^T`` for each side: ``(..., features) -> (..., k)``, float32 (float64 for float64)."""
        dtype = accumulator(x.dtype)
        x = x.to(dtype)
        constants = constants or [0.0] * len(sides)
        if sides[0].kind == "sjlt":
            return tuple(self._sketch(x, *pair) for pair in zip(sides, constants, strict=True))
        weight, constant = self._stacked(tuple(sides), tuple(constants), dtype, x.device, x.shape[-1])
        product = x @ weight
        if constant is not None:
            product += constant
        return (product,) if len(sides) == 1 else product.split([side.k for side in sides], dim=-1)

    def columns(self, ids: Tensor, side: Side, dtype: torch.dtype, constant: float = 0.0) -> Tensor:
        """The same of one-hot rows, given by their ids ``(N, T)``: columns of P, ``(N, T, k)``."""
        weight, _ = self._stacked((side,), (constant,), dtype, ids.device, side.features)
        return torch.nn.functional.embedding(ids, weight)

    def _sketch(self, x: Tensor, side: Side, constant: float) -> Tensor:
        missing = side.features - x.shape[-1]
        if missing:
            x = torch.nn.functional.pad(x, (0, missing), value=constant)
        flat = x.flatten(0, -2)
        return run("sketch", self._backend, x.device, x.dtype, flat, side).unflatten(0, x.shape[:-1])

    def _stacked(
        self,
        sides: tuple[Side, ...],
        constants: tuple[float, ...],
        dtype: torch.dtype,
        device: torch.device,
        features: int,
    ) -> tuple[Tensor, Tensor | None]:
        """``(features, sum of k)``, and the row that constants add, if there are any."""
        key = (sides, constants, dtype, device, features)
        if key not in self._made:
            whole = [side.matrix(dtype, device, backend=self._backend) for side in sides]
            rows = [p[:, -1] * c if c else p.new_zeros(len(p)) for p, c in zip(whole, constants, strict=True)]
            constant = torch.cat(rows) if any(constants) else None
            self._made[key] = torch.cat([p[:, :features] for p in whole]).T, constant
        return self._made[key]
