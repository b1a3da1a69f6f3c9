"""One public function per operation: its arguments, checks and floor, and the backends that have a kernel for it.

Shapes: ``N`` samples, ``T`` tokens, ``i`` inputs, ``o`` outputs, ``k`` projected numbers. ``G_n = sum_t dy[n, t]
(outer) x[n, t]`` is the gradient ``(o, i)`` of a linear layer for sample n. Inputs may be float32, float16, bfloat16
(accumulated and returned in float32) or float64 (float64 throughout), contiguous or not.

``lengths`` says which tokens count, everywhere alike: None (all), int ``(N,)`` (real tokens counted from the left), or
a boolean ``(N, T)`` such as ``attention_mask.bool()``. Tokens that do not count are never read into a result, whatever
they hold. Packed sequences come as ``x (S, i)``, ``dy (S, o)`` with the ``(N,)`` lengths of consecutive samples.

``backend`` names one of ``dispatch.BACKENDS``, or is ``auto``. All functions raise :class:`~influence_fast.InputError` for
shapes, dtypes and devices that do not fit, naming the argument, and :class:`~influence_fast.BackendError` for a backend that
was asked for and cannot run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.ops.arguments import accumulator, check_float, pair, plain
from influence_fast.ops.dispatch import operation, run
from influence_fast.ops.projections import Matrices, Projection, Role, Side

# Gradients that are formed at once to compare others with.
_FORMED_BYTES = 256 << 20
_SORTED = "a row is sorted by torch's radix sort, which the reference uses"


@operation("triton", "cpu", cuda="a batched product of cuBLAS, which the reference is, runs at the matmul ceiling")
def outer(x: Tensor, dy: Tensor, lengths: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Per-sample gradients of a linear layer: ``(N, T, i), (N, T, o) -> (N, o, i)``.

    Floor: ``2 N T i o`` FLOPs at the matmul rate, or ``4 N i o`` bytes written, whichever is longer.
    """
    x, dy, spans = pair(x, dy, lengths)
    return run("outer", backend, x.device, x.dtype, x, dy, spans)


@operation("cuda", "triton", "cpu")
def project_outer(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | Side | Projection | None,
    p_out: Tensor | Side | Projection | None,
    lengths: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Two-sided projection ``P_out G P_in^T`` of per-sample gradients, without forming ``G``: ``-> (N, k_out, k_in)``.

    Args:
        x: ``(N, T, i)``; dy: ``(N, T, o)``.
        p_in: what acts on inputs: a dense ``(k_in, i)`` tensor, a side of a :class:`~influence_fast.Projection`, a
            Projection itself (its ``right`` side for the empty layer name), or None for the identity.
        p_out: what acts on outputs, likewise (``left`` side).

    Floor: each input read once, ``N T (i + o)`` elements. Dense sides also cost ``2 N T k (i + o)`` FLOPs at the
    matmul rate; Rademacher sides of 24 outputs or more on a CPU a quarter of that in additions; SJLT sides one addition
    per element.
    """
    x, dy, spans = pair(x, dy, lengths)
    right, left = _side("p_in", p_in, "right", x.shape[-1]), _side("p_out", p_out, "left", dy.shape[-1])
    return run("project_outer", backend, x.device, x.dtype, x, dy, right, left, spans)


@operation("cuda", "triton", "cpu")
def sketch_outer(
    x: Tensor,
    dy: Tensor,
    projection: Tensor | Side | Projection,
    lengths: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One-sided sketch ``S vec(G * scale)`` of per-sample gradients: ``-> (N, k)``, nothing of size ``o * i`` written.

    Equal to ``sketch(outer(x, dy).flatten(1), projection)``. ``scale (o, i)`` multiplies every gradient entry first:
    the Adam factor of LESS (Xia et al. 2024).

    Floor: ``2 N T i o`` FLOPs at the matmul rate, and for SJLT one addition for each of the ``N i o`` entries of G in cache.
    """
    x, dy, spans = pair(x, dy, lengths)
    shape = (dy.shape[-1], x.shape[-1])
    side = _side("projection", projection, "single", shape[0] * shape[1])
    if side is None:
        raise InputError("projection: identity does not sketch; use outer(x, dy)")
    if scale is not None:
        check_float("scale", scale, 2)
        if tuple(scale.shape) != shape or scale.device != x.device:
            raise InputError(f"scale: expected shape {shape} on {x.device}, got {tuple(scale.shape)} on {scale.device}")
        scale = plain("scale", scale)
    return run("sketch_outer", backend, x.device, x.dtype, x, dy, side, spans, scale)


@operation("triton", "cpu", cuda="Triton has it")
def score_outer(x: Tensor, dy: Tensor, q: Tensor, lengths: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Inner products of per-sample gradients with ``m`` given matrices: ``q (m, o, i) -> (N, m) = <G_n, q_j>``.

    Floor: ``2 N (T + m) i o`` FLOPs at the matmul rate; ``q`` is read once for many samples.
    """
    x, dy, spans = pair(x, dy, lengths)
    check_float("q", q, 3)
    if tuple(q.shape[1:]) != (dy.shape[-1], x.shape[-1]) or q.device != x.device:
        raise InputError(
            f"q: expected shape (m, {dy.shape[-1]}, {x.shape[-1]}) on {x.device}, got {tuple(q.shape)} on {q.device}"
        )
    return run("score_outer", backend, x.device, x.dtype, x, dy, plain("q", q).to(accumulator(x.dtype)), spans)


@operation("triton", "cpu", cuda="Triton has it")
def ghost_dot(
    xa: Tensor,
    dya: Tensor,
    xb: Tensor,
    dyb: Tensor,
    lengths_a: Tensor | None = None,
    lengths_b: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Inner products of two sets of unprojected gradients: ``-> (Na, Nb) = <G_a, G_b>``, no gradient formed.

    Floor: ``2 Na Nb Ta Tb (i + o)`` FLOPs at the matmul rate, nothing of size T x T or i x o written. Where tokens are many
    and pairs are too, ``outer`` and one matrix product cost less: ``2 (Na Ta + Nb Tb + Na Nb) i o``.
    """
    xa, dya, spans_a = pair(xa, dya, lengths_a, ("xa", "dya", "lengths_a"))
    xb, dyb, spans_b = pair(xb, dyb, lengths_b, ("xb", "dyb", "lengths_b"))
    if xa.shape[-1] != xb.shape[-1] or dya.shape[-1] != dyb.shape[-1] or xa.dtype != xb.dtype or xa.device != xb.device:
        raise InputError(
            f"xb, dyb: expected features {xa.shape[-1]} and {dya.shape[-1]}, {xa.dtype} on {xa.device}, "
            f"got {xb.shape[-1]} and {dyb.shape[-1]}, {xb.dtype} on {xb.device}"
        )
    return run("ghost_dot", backend, xa.device, xa.dtype, xa, dya, xb, dyb, spans_a, spans_b)


def dot_outer(
    xa: Tensor,
    dya: Tensor,
    xb: Tensor,
    dyb: Tensor,
    lengths_a: Tensor | None = None,
    lengths_b: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Inner products of two sets of unprojected gradients, ``-> (Na, Nb)``, by whichever way costs fewer operations.

    Either :func:`ghost_dot`, which pairs tokens, or the gradients of the second set formed once and :func:`score_outer`,
    which is cheaper where tokens are many and weights few. Gradients of more than 256 MiB are not formed. Arguments and
    errors as of :func:`ghost_dot`.

    Floor: the cheaper of ``2 Na Nb Ta Tb (i + o)`` and ``2 (Nb Tb + Na Ta + Na Nb) i o`` FLOPs at the matmul rate.
    """
    for name, tensor in (("xa", xa), ("dya", dya), ("xb", xb), ("dyb", dyb)):
        check_float(name, tensor, (2, 3))
    (na, ta), (nb, tb), weights = xa.shape[:2], xb.shape[:2], xa.shape[-1] * dya.shape[-1]
    by_tokens = na * nb * ta * tb * (xa.shape[-1] + dya.shape[-1])
    formed = (nb * tb + na * ta + na * nb) * weights
    if xa.dim() == 3 and xb.dim() == 3 and formed < by_tokens and 4 * nb * weights <= _FORMED_BYTES:
        gradients = outer(xb, dyb, lengths_b, backend=backend)
        return score_outer(xa, dya, gradients, lengths_a, backend=backend)
    return ghost_dot(xa, dya, xb, dyb, lengths_a, lengths_b, backend=backend)


@operation("triton", "cpu", cuda="Triton has it")
def ghost_norm(x: Tensor, dy: Tensor, lengths: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Frobenius norms ``|G_n|`` of unprojected gradients: ``-> (N,)``, no gradient formed.

    Floor: ``N T^2 (i + o)`` FLOPs (half of two Gram matrices, which are symmetric) at the matmul rate.
    """
    x, dy, spans = pair(x, dy, lengths)
    return run("ghost_norm", backend, x.device, x.dtype, x, dy, spans)


@operation("cuda", "triton", "cpu")
def sketch(g: Tensor, projection: Tensor | Side | Projection, *, backend: str = "auto") -> Tensor:
    """Project flat vectors: ``(N, D) -> (N, k)``; the matrix is made on the fly, any ``k``, ``D`` beyond 2^31.

    Floor: ``N D`` elements read once; a dense kind costs ``2 N D k`` FLOPs at the matmul rate too.
    """
    check_float("g", g, 2)
    side = _side("projection", projection, "single", g.shape[1])
    if side is None:
        raise InputError("projection: identity does not sketch")
    return run("sketch", backend, g.device, g.dtype, plain("g", g), side)


@operation("cuda", "cpu", triton=_SORTED)
def rank(influence: Tensor, *, backend: str = "auto") -> Tensor:
    """Ranks within each row: ``(m, n) -> (m, n)``, 0 = lowest, ties get their average rank.

    Returns float32 while half-integers below n are exact in it (n up to 2^22), float64 beyond. NaN or infinity raises
    :class:`~influence_fast.InputError` naming the row.

    Floor: 4 bytes read and 4 written per element, and two moves at random within a row (one of 4 bytes out, one look).
    """
    check_float("influence", influence, 2)
    return run("rank", backend, influence.device, influence.dtype, plain("influence", influence))


@operation("cuda", "cpu", triton=_SORTED)
def vote(influence: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """Votes against each column: ``(m, n) -> (n,)`` float64, ``-sum over rows of max(k - rank, 0)``, 1 <= k <= n.

    Floor: 4 bytes read per element; only the lowest ``k`` of a row are ranked.
    """
    _check_votes(influence, k)
    return run("vote", backend, influence.device, influence.dtype, plain("influence", influence), k)


@operation("cpu", triton=_SORTED, cuda="it has rank and vote")
def rank_and_vote(influence: Tensor, k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """``(rank(influence).sum(0), vote(influence, k))``, both float64 ``(n,)``, with no ``(m, n)`` of ranks in between."""
    _check_votes(influence, k)
    return run("rank_and_vote", backend, influence.device, influence.dtype, plain("influence", influence), k)


def tally(influence: Tensor, k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The name of :func:`rank_and_vote` in version 0.1. It warns, and goes in version 2."""
    warnings.warn("ops.tally is called ops.rank_and_vote now", DeprecationWarning, stacklevel=2)
    return rank_and_vote(influence, k, backend=backend)


def _check_votes(influence: Tensor, k: int) -> None:
    check_float("influence", influence, 2)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= influence.shape[1]:
        raise InputError(f"k: expected an int from 1 to the {influence.shape[1]} columns of influence, got {k!r}")


@operation("cuda", "cpu", triton="kernels make entries where they need them; the reference makes whole matrices")
def random_matrix(
    side: Side,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Entries ``[r0, r1) x [c0, c1)`` of an implicit random matrix, scaled; all of it by default.

    Floor: its bytes written; one Philox block makes 128 signs or 4 normals.
    """
    return side.matrix(dtype, device, rows, cols, backend=backend)


def project(x: Tensor, sides: Side | Sequence[Side], *, matrices: Matrices | None = None, backend: str = "auto") -> Any:
    """Project the last dimension: ``(..., features) -> (..., k)``, a tuple of one for each of several ``sides``.

    Several sides that act on one tensor cost one product, against their stacked matrices. ``matrices`` keeps the dense
    matrices between calls (:class:`~influence_fast.ops.Matrices`); without it they are made anew. Dense kinds are a product
    of torch's with a kept matrix, which no kernel of ours beats at the few outputs that a side has; ``sjlt`` is
    :func:`sketch`.

    Floor: ``x`` read once; dense kinds cost ``2 features k`` FLOPs a row at the matmul rate, ``sjlt`` one addition an
    element.
    """
    check_float("x", x, tuple(range(1, 8)))
    several = (sides,) if isinstance(sides, Side) else tuple(sides)
    for side in several:
        if not isinstance(side, Side) or side.features != x.shape[-1]:
            raise InputError(f"sides: expected sides of {x.shape[-1]} features, got {side!r}")
    if not several:
        raise InputError("sides: expected at least one")
    found = (matrices or Matrices(backend)).project(plain("x", x), several)
    return found[0] if isinstance(sides, Side) else found


def _side(name: str, value: Any, role: Role, features: int) -> Side | Tensor | None:
    """A dense matrix or a projection side of the right width, from whatever a caller may pass; None is identity."""
    if isinstance(value, Projection):
        value = value.side("", role, features)
    if value is None:
        return None
    if isinstance(value, Tensor):
        check_float(name, value, 2)
        if value.shape[1] != features:
            raise InputError(f"{name}: expected a float matrix (k, {features}), got {value.dtype} {tuple(value.shape)}")
        return plain(name, value)
    if getattr(value, "features", None) != features:
        raise InputError(f"{name}: expected a (k, {features}) tensor or side, got {value!r}")
    return value
