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
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.ops import torch_ops
from influence_fast.ops.arguments import AdamState, accumulator, check_float, pair, plain
from influence_fast.ops.dispatch import operation, run
from influence_fast.ops.projections import (
    Matrices,
    Projection,
    Role,
    Side,
    SparseSide,
    sketch_rows,
    sketch_rows_transposed,
)
from influence_fast.ops.torch_ops import empty, outputs, registered, samples

# Gradients that are formed at once to compare others with.
_FORMED_BYTES = 256 << 20
# Entries of a matrix that project makes at once where nothing keeps it.
_MATRIX_ENTRIES = 1 << 22
_SORTED = "a row is sorted by torch's radix sort, which the reference uses"


@operation("cuda", "triton", "cpu")
def outer(x: Tensor, dy: Tensor, lengths: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Per-sample gradients of a linear layer: ``(N, T, i), (N, T, o) -> (N, o, i)``.

    Floor: ``2 N T i o`` FLOPs at the matmul rate, or ``4 N i o`` bytes written, whichever is longer.
    """
    return _outer(x, dy, lengths, backend)


@registered(
    "(Tensor x, Tensor dy, Tensor? lengths, str backend) -> Tensor",
    lambda x, dy, lengths, backend: empty(x, samples(x, lengths), dy.shape[-1], x.shape[-1]),
    folded=(0, 1, 2),
    derivatives=torch_ops.OuterRules,
)
def _outer(x: Tensor, dy: Tensor, lengths: Tensor | None, backend: str) -> Any:
    x, dy, spans = pair(x, dy, lengths)
    return run("outer", backend, x.device, x.dtype, x, dy, spans)


@operation("cuda", "triton", "cpu")
def project_outer(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | Side | SparseSide | Projection | None,
    p_out: Tensor | Side | SparseSide | Projection | None,
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
    right, side_in = _travelling("p_in", p_in, "right", x)
    left, side_out = _travelling("p_out", p_out, "left", dy)
    return _project_outer(x, dy, right, left, side_in, side_out, lengths, backend)


@registered(
    "(Tensor x, Tensor dy, Tensor? p_in, Tensor? p_out, str side_in, str side_out, Tensor? lengths, str backend) "
    "-> Tensor",
    lambda x, dy, p_in, p_out, side_in, side_out, lengths, backend: empty(
        x, samples(x, lengths), outputs(p_out, side_out, dy.shape[-1]), outputs(p_in, side_in, x.shape[-1])
    ),
    folded=(0, 1, 6),
    derivatives=torch_ops.ProjectOuterRules,
)
def _project_outer(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | None,
    p_out: Tensor | None,
    side_in: str,
    side_out: str,
    lengths: Tensor | None,
    backend: str,
) -> Any:
    x, dy, spans = pair(x, dy, lengths)
    right = _side("p_in", p_in, side_in, x.shape[-1])
    left = _side("p_out", p_out, side_out, dy.shape[-1])
    if isinstance(right, Side) and not _one_kernel(right):
        right = right.matrix(accumulator(x.dtype), x.device)
    if isinstance(left, Side) and not _one_kernel(left):
        left = left.matrix(accumulator(x.dtype), x.device)
    return run("project_outer", backend, x.device, x.dtype, x, dy, right, left, spans)


@operation("cuda", "triton", "cpu")
def sketch_outer(
    x: Tensor,
    dy: Tensor,
    projection: Tensor | Side | SparseSide | Projection,
    lengths: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    adam: AdamState | None = None,
    backend: str = "auto",
) -> Tensor:
    """One-sided sketch ``S vec(G)`` of per-sample gradients: ``-> (N, k)``, nothing of size ``o * i`` written on a CPU.

    Equal to ``sketch(outer(x, dy).flatten(1), projection)``. ``scale (o, i)`` multiplies every gradient entry first, such
    as a diagonal preconditioner. ``adam`` turns every entry into Adam's update first, which no factor does: the gradients
    of LESS (Xia et al. 2024); not both.

    Floor: ``2 N T i o`` FLOPs at the matmul rate, and for SJLT one addition for each of the ``N i o`` entries of G in cache.
    """
    matrix, side = _travelling("projection", projection, "single", x, dy)
    m, v, (b1, b2), eps = (None, None, (0.0, 0.0), 0.0) if adam is None else (adam.m, adam.v, adam.betas, adam.eps)
    return _sketch_outer(x, dy, matrix, side, lengths, scale, m, v, b1, b2, eps, backend)


@registered(
    "(Tensor x, Tensor dy, Tensor? matrix, str side, Tensor? lengths, Tensor? scale, Tensor? m, Tensor? v, float b1, "
    "float b2, float eps, str backend) -> Tensor",
    lambda x, dy, matrix, side, lengths, *rest: empty(x, samples(x, lengths), outputs(matrix, side, 0)),
    folded=(0, 1, 4),
)
def _sketch_outer(
    x: Tensor,
    dy: Tensor,
    matrix: Tensor | None,
    side: str,
    lengths: Tensor | None,
    scale: Tensor | None,
    m: Tensor | None,
    v: Tensor | None,
    b1: float,
    b2: float,
    eps: float,
    backend: str,
) -> Any:
    x, dy, spans = pair(x, dy, lengths)
    shape = (dy.shape[-1], x.shape[-1])
    given = _side("projection", matrix, side, shape[0] * shape[1])
    if given is None:
        raise InputError("projection: identity does not sketch; use outer(x, dy)")
    found = []
    for name, tensor in (("scale", scale), ("adam.m", m), ("adam.v", v)):
        if tensor is not None:
            check_float(name, tensor, 2)
            if tuple(tensor.shape) != shape or tensor.device != x.device:
                got = f"{tuple(tensor.shape)} on {tensor.device}"
                raise InputError(f"{name}: expected shape {shape} on {x.device}, got {got}")
            tensor = plain(name, tensor)
        found.append(tensor)
    scale, m, v = found
    adam = None if m is None or v is None else AdamState(m, v, (b1, b2), eps)
    if adam is not None and scale is not None:
        raise InputError("scale, adam: expected one of the two, got both")
    if isinstance(given, Tensor) or _one_kernel(given):
        return run("sketch_outer", backend, x.device, x.dtype, x, dy, given, spans, scale, adam)
    # Masks, and columns of several non-zeros: a few gradients at a time.
    out = empty(x, x.shape[0], given.k)
    step = max(1, _FORMED_BYTES // (4 * max(1, shape[0] * shape[1])))
    for begin in range(0, x.shape[0], step):
        rows = slice(begin, begin + step)
        some = None if spans is None else spans[rows]
        g = run("outer", backend, x.device, x.dtype, x[rows], dy[rows], some)
        g = g if scale is None else g * scale.to(g.dtype)
        out[rows] = sketch_rows((g if adam is None else adam.update(g)).flatten(1), given, backend)
    return out


@operation("cuda", "triton", "cpu")
def score_outer(x: Tensor, dy: Tensor, q: Tensor, lengths: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Inner products of per-sample gradients with ``m`` given matrices: ``q (m, o, i) -> (N, m) = <G_n, q_j>``.

    Floor: ``2 N (T + m) i o`` FLOPs at the matmul rate; ``q`` is read once for many samples.
    """
    return _score_outer(x, dy, q, lengths, backend)


@registered(
    "(Tensor x, Tensor dy, Tensor q, Tensor? lengths, str backend) -> Tensor",
    lambda x, dy, q, lengths, backend: empty(x, samples(x, lengths), q.shape[0]),
    folded=(0, 1, 3),
)
def _score_outer(x: Tensor, dy: Tensor, q: Tensor, lengths: Tensor | None, backend: str) -> Any:
    x, dy, spans = pair(x, dy, lengths)
    check_float("q", q, 3)
    if tuple(q.shape[1:]) != (dy.shape[-1], x.shape[-1]) or q.device != x.device:
        raise InputError(
            f"q: expected shape (m, {dy.shape[-1]}, {x.shape[-1]}) on {x.device}, got {tuple(q.shape)} on {q.device}"
        )
    return run("score_outer", backend, x.device, x.dtype, x, dy, plain("q", q).to(accumulator(x.dtype)), spans)


@operation("cuda", "triton", "cpu")
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

    Pairs of vectors whose outer products' sum is a gradient, such as the factors of :func:`~influence_fast.build_store`, are
    tokens: ``x (N, c, i)`` and ``dy (N, c, o)``.

    Floor: ``2 Na Nb Ta Tb (i + o)`` FLOPs at the matmul rate, nothing of size T x T or i x o written. Where tokens are many
    and pairs are too, ``outer`` and one matrix product cost less: ``2 (Na Ta + Nb Tb + Na Nb) i o``.
    """
    return _ghost_dot(xa, dya, xb, dyb, lengths_a, lengths_b, backend)


@registered(
    "(Tensor xa, Tensor dya, Tensor xb, Tensor dyb, Tensor? lengths_a, Tensor? lengths_b, str backend) -> Tensor",
    lambda xa, dya, xb, dyb, lengths_a, lengths_b, backend: empty(xa, samples(xa, lengths_a), samples(xb, lengths_b)),
)
def _ghost_dot(
    xa: Tensor,
    dya: Tensor,
    xb: Tensor,
    dyb: Tensor,
    lengths_a: Tensor | None,
    lengths_b: Tensor | None,
    backend: str,
) -> Any:
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


@operation("cuda", "triton", "cpu")
def ghost_norm(x: Tensor, dy: Tensor, lengths: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Frobenius norms ``|G_n|`` of unprojected gradients: ``-> (N,)``, no gradient formed.

    Floor: ``N T^2 (i + o)`` FLOPs (half of two Gram matrices, which are symmetric) at the matmul rate.
    """
    return _ghost_norm(x, dy, lengths, backend)


@registered(
    "(Tensor x, Tensor dy, Tensor? lengths, str backend) -> Tensor",
    lambda x, dy, lengths, backend: empty(x, samples(x, lengths)),
    folded=(0, 1, 2),
)
def _ghost_norm(x: Tensor, dy: Tensor, lengths: Tensor | None, backend: str) -> Any:
    x, dy, spans = pair(x, dy, lengths)
    return run("ghost_norm", backend, x.device, x.dtype, x, dy, spans)


@operation("cuda", "triton", "cpu")
def sketch(
    g: Tensor | Mapping[str, Tensor] | Sequence[Tensor],
    projection: Tensor | Side | SparseSide | Projection,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Project flat vectors: ``(N, D) -> (N, k)``; the matrix is made on the fly, any ``k``, ``D`` beyond 2^31.

    Args:
        g: ``(N, D)``, or a dict or list of tensors ``(N, ...)`` that are taken as one vector, in their order, and never put
            together: parameters' gradients.
        out: where the result goes, ``(N, k)``; with ``accumulate`` it is added there.
        dtype: of the result, in place of float32 (float64 for float64).

    Floor: ``N D`` elements read once; a dense kind costs ``2 N D k`` FLOPs at the matmul rate too.
    """
    if isinstance(g, (Mapping, list, tuple)):
        found = _sketched_parts(list(g.values() if isinstance(g, Mapping) else g), projection, backend)
    else:
        found = _sketched(g, projection, backend)  # type: ignore[arg-type]
    return _delivered(found, out, accumulate, dtype)


def _sketched(g: Tensor, projection: Tensor | Side | SparseSide | Projection, backend: str) -> Tensor:
    if isinstance(projection, SparseSide):
        check_float("g", g, 2)
        if projection.features != g.shape[1]:
            raise InputError(f"projection: expected {g.shape[1]} features, got {projection.features}")
        return projection.sketch(g)
    matrix, side = _travelling("projection", projection, "single", g)
    found: Tensor = _sketch(g, matrix, side, backend)
    return found


def _sketched_parts(parts: list[Tensor], projection: Tensor | Side | SparseSide | Projection, backend: str) -> Tensor:
    for number, part in enumerate(parts):
        check_float(f"g[{number}]", part, tuple(range(1, 17)))
        if part.shape[0] != parts[0].shape[0]:
            raise InputError(f"g[{number}]: expected {parts[0].shape[0]} samples, got {part.shape[0]}")
    if not parts:
        raise InputError("g: expected at least one tensor")
    flat = [part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts]
    features = sum(part.shape[1] for part in flat)
    matrix: Tensor | Side | SparseSide
    matrix = _required(projection.side("", "single", features)) if isinstance(projection, Projection) else projection
    taken = matrix.shape[1] if isinstance(matrix, Tensor) else matrix.features
    if taken != features:
        raise InputError(f"projection: expected {features} features, the sum over g, got {taken}")
    total: Tensor | None = None
    begin = 0
    for part in flat:
        end = begin + part.shape[1]
        if end == begin:
            continue
        found = _sketched(part, _columns(matrix, begin, end), backend)
        total = found if total is None else total + found
        begin = end
    return _required(total)


def _columns(projection: Tensor | Side | SparseSide, begin: int, end: int) -> Tensor | Side | SparseSide:
    """What acts on features ``[begin, end)`` alone."""
    if isinstance(projection, Tensor):
        return projection[:, begin:end]
    if isinstance(projection, Side) and projection.kind not in ("random_mask", "grass"):
        return projection.columns(begin, end)
    if isinstance(projection, SparseSide):
        part = slice(begin, end)
        return SparseSide(projection.indices[part], projection.signs[part], projection.k, projection.scale)
    # A mask chooses among all features: its few columns here.
    return projection.matrix(cols=(begin, end))


def _required(found: Any) -> Any:
    if found is None:
        raise InputError("projection: identity does not sketch")
    return found


def _delivered(found: Tensor, out: Tensor | None, accumulate: bool, dtype: torch.dtype | None) -> Tensor:
    """The result in the dtype and the place that were asked for."""
    if out is None:
        if accumulate:
            raise InputError("accumulate: expected out, which the result is added to")
        return found if dtype is None else found.to(dtype)
    check_float("out", out, found.dim())
    if out.shape != found.shape or out.device != found.device or dtype not in (None, out.dtype):
        raise InputError(
            f"out: expected {tuple(found.shape)} {dtype or ''} on {found.device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    return out.add_(found) if accumulate else out.copy_(found)


@registered(
    "(Tensor g, Tensor? matrix, str side, str backend) -> Tensor",
    lambda g, matrix, side, backend: empty(g, g.shape[0], outputs(matrix, side, 0)),
    folded=(0,),
    derivatives=torch_ops.SketchRules,
)
def _sketch(g: Tensor, matrix: Tensor | None, side: str, backend: str) -> Any:
    check_float("g", g, 2)
    given = _required(_side("projection", matrix, side, g.shape[1]))
    if isinstance(given, Tensor):
        return run("sketch", backend, g.device, g.dtype, plain("g", g), given)
    return sketch_rows(plain("g", g), given, backend)


@registered(
    "(Tensor y, str side, str backend) -> Tensor",
    lambda y, side, backend: empty(y, y.shape[0], int(side.split("|", 2)[1])),
    folded=(0,),
    derivatives=torch_ops.TransposeRules,
)
def _sketch_transposed(y: Tensor, side: str, backend: str) -> Any:
    check_float("y", y, 2)
    given = _read(side)
    if y.shape[1] != given.k:
        raise InputError(f"x: expected {given.k} numbers, the k of {given!r}, got {y.shape[1]}")
    return sketch_rows_transposed(plain("y", y), given, backend)


@operation("cuda", "cpu", triton=_SORTED)
def rank(influence: Tensor, *, backend: str = "auto") -> Tensor:
    """Ranks within each row: ``(m, n) -> (m, n)``, 0 = lowest, ties get their average rank.

    Returns float32 while half-integers below n are exact in it (n up to 2^22), float64 beyond. NaN or infinity raises
    :class:`~influence_fast.InputError` naming the row.

    Floor: 4 bytes read and 4 written per element, and two moves at random within a row (one of 4 bytes out, one look).
    """
    return _rank(influence, backend)


@registered(
    "(Tensor influence, str backend) -> Tensor",
    lambda influence, backend: influence.new_empty(
        influence.shape, dtype=torch.float32 if influence.shape[1] <= 1 << 22 else torch.float64
    ),
    folded=(0,),
)
def _rank(influence: Tensor, backend: str) -> Any:
    check_float("influence", influence, 2)
    return run("rank", backend, influence.device, influence.dtype, plain("influence", influence))


@operation("cuda", "cpu", triton=_SORTED)
def vote(influence: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """Votes against each column: ``(m, n) -> (n,)`` float64, ``-sum over rows of max(k - rank, 0)``, 1 <= k <= n.

    Floor: 4 bytes read per element; only the lowest ``k`` of a row are ranked.
    """
    return _vote(influence, k, backend)


@registered(
    "(Tensor influence, SymInt k, str backend) -> Tensor",
    lambda influence, k, backend: influence.new_empty(influence.shape[1], dtype=torch.float64),
)
def _vote(influence: Tensor, k: int, backend: str) -> Any:
    _check_votes(influence, k)
    return run("vote", backend, influence.device, influence.dtype, plain("influence", influence), k)


@operation("cuda", "cpu", triton=_SORTED)
def rank_and_vote(influence: Tensor, k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """``(rank(influence).sum(0), vote(influence, k))``, both float64 ``(n,)``, with no ``(m, n)`` of ranks in between."""
    found: tuple[Tensor, Tensor] = _rank_and_vote(influence, k, backend)
    return found


@registered(
    "(Tensor influence, SymInt k, str backend) -> (Tensor, Tensor)",
    lambda influence, k, backend: tuple(influence.new_empty(influence.shape[1], dtype=torch.float64) for _ in range(2)),
)
def _rank_and_vote(influence: Tensor, k: int, backend: str) -> Any:
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
    r0, r1 = rows or (0, side.k)
    c0, c1 = cols or (0, side.features)
    return _random_matrix(side.text, r0, r1, c0, c1, dtype, torch.device(device), backend)


@registered(
    "(str side, SymInt r0, SymInt r1, SymInt c0, SymInt c1, ScalarType dtype, Device device, str backend) -> Tensor",
    lambda side, r0, r1, c0, c1, dtype, device, backend: torch.empty(r1 - r0, c1 - c0, dtype=dtype, device=device),
)
def _random_matrix(
    side: str, r0: int, r1: int, c0: int, c1: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Any:
    return _read(side).matrix(dtype, device, (r0, r1), (c0, c1), backend=backend)


def project(
    x: Tensor,
    sides: Side | SparseSide | Sequence[Side | SparseSide],
    *,
    transpose: bool = False,
    dtype: torch.dtype | None = None,
    matrices: Matrices | None = None,
    backend: str = "auto",
) -> Any:
    """Project the last dimension: ``(..., features) -> (..., k)``, a tuple of one for each of several ``sides``.

    ``transpose`` goes back, ``x P``: ``(..., k) -> (..., features)``. ``dtype`` is that of the result, in place of float32
    (float64 for float64). Several sides that act on one tensor cost one product, against their stacked matrices.
    ``matrices`` keeps the dense matrices between calls (:class:`~influence_fast.ops.Matrices`); without it they are made
    anew. Small dense matrices are multiplied by torch, which no kernel of ours beats at the few outputs that a side has;
    all others are :func:`sketch`.

    Floor: ``x`` read once; dense kinds cost ``2 features k`` FLOPs a row at the matmul rate, ``sjlt`` one addition an
    element.
    """
    check_float("x", x, tuple(range(1, 8)))
    several = (sides,) if isinstance(sides, (Side, SparseSide)) else tuple(sides)
    wanted = "k" if transpose else "features"
    for side in several:
        if not isinstance(side, (Side, SparseSide)) or getattr(side, wanted) != x.shape[-1]:
            raise InputError(f"sides: expected sides of {x.shape[-1]} {wanted}, got {side!r}")
    if not several:
        raise InputError("sides: expected at least one")
    if matrices is None and not transpose and torch_ops.is_plain(x) and all(map(_small, several)):
        matrices = Matrices(backend)
    if matrices is not None and not transpose:
        found = matrices.project(plain("x", x), several)  # type: ignore[arg-type]
    elif not transpose and all(map(_small, several)):
        x = x.to(accumulator(x.dtype))
        made = [
            random_matrix(s, dtype=x.dtype, device=x.device, backend=backend) for s in several if isinstance(s, Side)
        ]
        found = tuple(x @ matrix.T for matrix in made)
    else:
        flat = x.reshape(-1, x.shape[-1])
        found = tuple(_one_by_one(flat, side, transpose, backend).reshape(*x.shape[:-1], -1) for side in several)
    if dtype is not None:
        found = tuple(part.to(dtype) for part in found)
    return found[0] if isinstance(sides, (Side, SparseSide)) else found


def _small(side: Side | SparseSide) -> bool:
    """Whether a product of torch's with the whole matrix is what projects best."""
    if not isinstance(side, Side):
        return False
    return side.kind in ("rademacher", "gaussian") and side.k * side.features <= _MATRIX_ENTRIES


def _one_by_one(flat: Tensor, side: Side | SparseSide, transpose: bool, backend: str) -> Tensor:
    if isinstance(side, SparseSide):
        return side.transposed(flat) if transpose else side.sketch(flat)
    found: Tensor = (
        _sketch_transposed(flat, side.text, backend) if transpose else _sketch(flat, None, side.text, backend)
    )
    return found


def _one_kernel(side: Side) -> bool:
    """Whether backends know this kind of matrix as it is."""
    return side.kind in ("rademacher", "gaussian", "sjlt") and side.nonzeros == 1


def _travelling(name: str, value: Any, role: Role, *acted_on: Tensor) -> tuple[Tensor | None, str]:
    """What acts on one side as torch's graphs hold it: a matrix, or the text of a random one; neither is the identity."""
    if value is None or isinstance(value, Tensor):
        return value, ""
    if isinstance(value, Side):
        return None, value.text
    if isinstance(value, SparseSide):
        return value.matrix(), ""
    if not isinstance(value, Projection):
        raise InputError(f"{name}: expected a tensor, a Side, a Projection or None, got {value!r}")
    if value.kind == "identity":
        return None, ""
    if isinstance(value.dim, tuple) and role == "single":
        raise InputError(f"projection {value}: two-sided, has no single side; give dim as an int for a sketch")
    k = value.dim if not isinstance(value.dim, tuple) else value.dim[0] if role == "left" else value.dim[1]
    features = 1
    for tensor in acted_on:
        check_float(name, tensor, (2, 3))
        features *= tensor.shape[-1]
    # Sizes that a graph leaves open are fixed here: the matrix depends on them.
    return None, f"{k}|{int(features)}|projection|{role}|{value.text}"  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _read(text: str) -> Side:
    """The side that a text stands for: its own, or a Projection's."""
    if "|projection|" not in text:
        return Side.read(text)
    _, features, _, role, projection = text.split("|")
    side = Projection.parse(projection).side("", role, int(features))  # type: ignore[arg-type]
    found: Side = _required(side)
    return found


def _side(name: str, matrix: Tensor | None, text: str, features: int) -> Side | Tensor | None:
    """A dense matrix or a side of the right width; None is the identity."""
    if matrix is not None:
        check_float(name, matrix, 2)
        if matrix.shape[1] != features:
            raise InputError(
                f"{name}: expected a float matrix (k, {features}), got {matrix.dtype} {tuple(matrix.shape)}"
            )
        return plain(name, matrix)
    if not text:
        return None
    side = _read(text)
    if side.features != features:
        raise InputError(f"{name}: expected a (k, {features}) tensor or side, got {side!r}")
    return side
