"""What to project gradients with: kind, sizes and seed, from which every matrix entry follows."""

from __future__ import annotations

import hashlib
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.ops import philox
from influence_fast.ops.arguments import accumulator
from influence_fast.ops.dispatch import run

Kind = Literal["identity", "rademacher", "gaussian", "sjlt"]
SideKind = Literal["rademacher", "gaussian", "sjlt", "random_mask", "grass"]
Role = Literal["left", "right", "single"]
# Features, or entries of a matrix, that are made at a time.
_COLUMNS, _ENTRIES = 1 << 16, 1 << 22


@dataclass(frozen=True)
class Side:
    """One implicit ``(k, features)`` random matrix: row = projected index, column = feature.

    Entries depend on the key, row and column alone (and, for the sparse kinds, on ``k``), never on device, thread count or
    batch: a store made on a GPU is queried on a laptop.

    Args:
        kind: ``rademacher`` (+-1), ``gaussian`` (standard normal), ``sjlt`` (``nonzeros`` entries of +-1 a column),
            ``random_mask`` (keeps ``k`` features, one of each of ``k`` equal runs of them) or ``grass`` (a mask to ``4 k``
            features, then ``sjlt``).
        key: an integer from ``-2^63`` to ``2^64 - 1``, or a name: then the first eight bytes of its MD5 digest.
        k: numbers that are kept; features: numbers that come in.
        scale: factor on every entry. None is 1 for an integer key, and for a name what makes ``E <Pg, Ph> = <g, h>``:
            ``1/sqrt(k)`` for dense kinds.
        nonzeros: of a column, of ``sjlt`` and ``grass``: that many independent matrices of one non-zero are added.
        offset: the matrix has the columns ``[offset, offset + features)`` of its key's.

    Raises:
        InputError: unknown kind, or numbers out of range; names the argument.
    """

    kind: SideKind
    key: int | str
    k: int
    features: int
    scale: float = None  # type: ignore[assignment]  # a float from here on
    nonzeros: int = 1
    offset: int = 0
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(SideKind):
            raise InputError(f"kind: expected {', '.join(get_args(SideKind))} for a matrix, got {self.kind!r}")
        for name, least in (("k", 1), ("features", 1), ("nonzeros", 1), ("offset", 0)):
            self._whole_number(name, least, 1 << 63)
        if not isinstance(self.key, str):
            self._whole_number("key", -(1 << 63), 1 << 64)
        if self.scale is None:
            named = isinstance(self.key, str) and self.kind in ("rademacher", "gaussian")
            object.__setattr__(self, "scale", 1 / math.sqrt(self.k) if named else 1.0)
        object.__setattr__(self, "scale", float(self.scale))
        if not math.isfinite(self.scale):
            raise InputError(f"scale: expected a finite number, got {self.scale}")
        sparse, masked = self.kind in ("sjlt", "grass"), self.kind in ("random_mask", "grass")
        if self.nonzeros > (self.k if sparse else 1):
            wanted = f"at most k = {self.k}" if sparse else f"1 for {self.kind}"
            raise InputError(f"nonzeros: expected {wanted}, got {self.nonzeros}")
        if masked and (self.k > self.features or self.offset):
            raise InputError(
                f"k, offset: expected at most the {self.features} features and 0 for {self.kind}, "
                f"got {self.k} and {self.offset}"
            )
        # What traced programs carry in place of this object: plain text, its number of outputs first.
        numbers = f"{self.k}|{self.features}|{self.kind}|{self.scale!r}|{self.nonzeros}|{self.offset}"
        object.__setattr__(self, "text", f"{numbers}|{type(self.key).__name__}|{self.key}")

    def _whole_number(self, name: str, least: int, end: int) -> None:
        value = getattr(self, name)
        try:
            number = operator.index(value)
        except TypeError:
            raise InputError(f"{name}: expected a whole number, got {value!r}") from None
        if isinstance(value, bool) or not least <= number < end:
            raise InputError(f"{name}: expected a whole number from {least} to {end - 1}, got {value!r}")
        object.__setattr__(self, name, number)

    @staticmethod
    def read(text: str) -> Side:
        """The side whose ``text`` this is."""
        k, features, kind, scale, nonzeros, offset, type_name, key = text.split("|", 7)
        numbers = (int(k), int(features), float(scale), int(nonzeros), int(offset))
        return Side(kind, int(key) if type_name == "int" else key, *numbers)  # type: ignore[arg-type]

    @property
    def identifier(self) -> str:
        """The key as text, as messages and layers' names use it."""
        return str(self.key)

    @cached_property
    def words(self) -> tuple[int, int]:
        """The key as two 32-bit words, the low one first: of a name, the first eight bytes of its MD5 digest."""
        if isinstance(self.key, int):
            return self.key & 0xFFFFFFFF, self.key >> 32 & 0xFFFFFFFF
        digest = hashlib.md5(self.key.encode(), usedforsecurity=False).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")

    def columns(self, begin: int, end: int) -> Side:
        """The side of features ``[begin, end)`` alone, of the same matrix: parts of a vector are sketched one by one.

        Sums over parts that begin at multiples of 32,768 (``8 k`` beyond a ``k`` of 4096) have the bits of one sum.

        Raises:
            InputError: a range that lies outside, or a kind that has no parts (a mask depends on all features).
        """
        if self.kind in ("random_mask", "grass"):
            raise InputError(f"kind: {self.kind} chooses among all features, so it has no part of columns")
        if not 0 <= begin < end <= self.features:
            raise InputError(f"begin, end: expected a range within {self.features} features, got {begin} and {end}")
        return replace(self, features=end - begin, offset=self.offset + begin)

    def simple(self) -> tuple[Side, ...]:
        """The matrices of one non-zero a column that add up to this one; itself where it is dense."""
        if self.nonzeros == 1:
            return (self,)
        low, high = self.words
        keys = [((high << 32 | low) + j * 0x9E3779B97F4A7C15) % (1 << 64) for j in range(self.nonzeros)]
        return tuple(replace(self, key=key, nonzeros=1) for key in keys)

    def mask(self) -> tuple[Tensor, Side | None]:
        """Of the kinds that choose features: which, sorted int64, and what those are sketched with (None: nothing)."""
        kept = self.k if self.kind == "random_mask" else min(4 * self.k, self.features)
        ends = torch.arange(kept + 1) * (self.features // kept) + (
            torch.arange(kept + 1) * (self.features % kept) // kept
        )
        quad = torch.arange(-(-kept // 4))
        words = torch.stack(philox.philox4x32((quad, 0, 3, 0), self.words), -1).flatten()[:kept]
        chosen = ends[:-1] + ((words * (ends[1:] - ends[:-1])) >> 32)
        if self.kind == "random_mask":
            return chosen, None
        return chosen, replace(self, kind="sjlt", features=kept)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Of ``sjlt``: output of each non-zero, int64 ``(features, nonzeros)``, and its sign, int8.

        Raises:
            InputError: another kind.
        """
        if self.kind != "sjlt":
            raise InputError(f"kind: expected sjlt, {self.kind} has no list of non-zeros")
        cols = (self.offset, self.offset + self.features)
        found = [philox.sjlt(side.words, side.k, cols, torch.device("cpu")) for side in self.simple()]
        return torch.stack([index for index, _ in found], 1), torch.stack([sign for _, sign in found], 1)

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
        if self.kind in ("random_mask", "grass"):
            chosen, then = self.mask()
            kept = torch.eye(self.k) * self.scale if then is None else then.matrix(torch.float32, "cpu")
            whole = torch.zeros(self.k, self.features).index_copy_(1, chosen, kept)
            return whole[rows[0] : rows[1], cols[0] : cols[1]].to(device, dtype)
        found = [
            run("random_matrix", backend, device, dtype, side, rows, cols, dtype, device) for side in self.simple()
        ]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)


@dataclass(frozen=True, eq=False)
class SparseSide:
    """A ``(k, features)`` matrix of given non-zeros: column f has ``signs[f, j] * scale`` in row ``indices[f, j]``.

    Args:
        indices: integers ``(features, c)`` from 0 to ``k - 1``; signs: ``(features, c)``, any numbers.

    Raises:
        InputError: shapes, dtypes or indices that do not fit.
    """

    indices: Tensor
    signs: Tensor
    k: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        i, s = self.indices, self.signs
        if not (isinstance(i, Tensor) and isinstance(s, Tensor) and i.dim() == 2 and i.shape == s.shape):
            raise InputError("indices, signs: expected two tensors of one shape (features, c)")
        if i.is_floating_point() or i.dtype == torch.bool:
            raise InputError(f"indices: expected integers, got {i.dtype}")
        # While a graph is traced there are no values to look at.
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or i.is_meta
        if not traced and i.numel() and not (int(i.min()) >= 0 and int(i.max()) < self.k):
            raise InputError(f"indices: expected 0 to {self.k - 1}, got {int(i.min())} to {int(i.max())}")

    @property
    def features(self) -> int:
        """Numbers that come in."""
        return self.indices.shape[0]

    def matrix(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The dense matrix ``(k, features)``."""
        return self.sketch(torch.eye(self.features, dtype=dtype, device=device)).T.to(dtype).contiguous()

    def sketch(self, g: Tensor) -> Tensor:
        """``g P^T``: ``(N, features) -> (N, k)`` in plain torch, so that it is differentiable and traceable."""
        dtype = accumulator(g.dtype)
        out = torch.zeros(g.shape[0], self.k, dtype=dtype, device=g.device)
        for index, sign in zip(self.indices.to(g.device).T, self.signs.to(g.device, dtype).T, strict=True):
            out = out.index_add(1, index.long(), g.to(dtype) * sign)
        return out if self.scale == 1 else out * self.scale

    def transposed(self, y: Tensor) -> Tensor:
        """``y P``: ``(N, k) -> (N, features)``."""
        y = y.to(accumulator(y.dtype))
        signs = self.signs.to(y.device, y.dtype) * self.scale
        return (y[:, self.indices.to(y.device).long()] * signs).sum(-1)


def sketch_rows(g: Tensor, side: Side, backend: str = "auto") -> Tensor:
    """``g P^T`` for a plain ``(N, features)`` tensor and any side: ``(N, k)``, float32 (float64 for float64)."""
    if side.kind in ("random_mask", "grass"):
        chosen, then = side.mask()
        kept = g.index_select(1, chosen.to(g.device))
        if then is not None:
            return sketch_rows(kept, then, backend)
        return kept.to(accumulator(g.dtype), copy=True).mul_(side.scale)
    first, *others = side.simple()
    out: Tensor = run("sketch", backend, g.device, g.dtype, g, first)
    for other in others:
        out += run("sketch", backend, g.device, g.dtype, g, other)
    return out


def sketch_rows_transposed(y: Tensor, side: Side, backend: str = "auto") -> Tensor:
    """``y P`` for a plain ``(N, k)`` tensor: ``(N, features)``, a block of the matrix at a time."""
    y = y.to(accumulator(y.dtype))
    if side.kind in ("random_mask", "grass"):
        chosen, then = side.mask()
        kept = y * side.scale if then is None else sketch_rows_transposed(y, then, backend)
        return y.new_zeros(y.shape[0], side.features).index_copy_(1, chosen.to(y.device), kept)
    out = y.new_zeros(y.shape[0], side.features)
    step = _COLUMNS if side.kind == "sjlt" else max(256, _ENTRIES // side.k // 256 * 256)
    for part in side.simple():
        for begin in range(0, side.features, step):
            end = min(begin + step, side.features)
            if side.kind == "sjlt":
                cols = (side.offset + begin, side.offset + end)
                index, sign = philox.sjlt(part.words, side.k, cols, y.device)
                out[:, begin:end] += y[:, index] * (sign.to(y.dtype) * side.scale)
            else:
                out[:, begin:end] = y @ part.matrix(y.dtype, y.device, cols=(begin, end), backend=backend)
    return out


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
        # As in Side: what a traced program carries.
        object.__setattr__(self, "text", str(self))

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
        if sides[0].kind not in ("rademacher", "gaussian"):
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

    def sketch(self, flat: Tensor, side: Side) -> Tensor:
        """``(N, features) -> (N, k)`` by any kind of side, as :func:`~influence_fast.ops.sketch`: nothing is kept."""
        return sketch_rows(flat.detach(), side, self._backend)

    def _sketch(self, x: Tensor, side: Side, constant: float) -> Tensor:
        missing = side.features - x.shape[-1]
        if missing:
            x = torch.nn.functional.pad(x, (0, missing), value=constant)
        flat = x.flatten(0, -2)
        return self.sketch(flat, side).unflatten(0, x.shape[:-1])

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
