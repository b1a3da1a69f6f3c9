"""One public function per operation; the same numbers from every backend.

Shapes: ``N`` samples, ``T`` tokens, ``i`` inputs, ``o`` outputs, ``k`` projected numbers. ``G_n = sum_t dy[n, t]
(outer) x[n, t]`` is the gradient ``(o, i)`` of a linear layer for sample n. Inputs may be float32, float16, bfloat16
(accumulated and returned in float32) or float64 (float64 throughout), contiguous or not.

``lengths`` says which tokens count, everywhere alike: None (all), int ``(N,)`` (real tokens counted from the left), or
a boolean ``(N, T)`` such as ``attention_mask.bool()``. Tokens that do not count are never read into a result, whatever
they hold. Packed sequences come as ``x (S, i)``, ``dy (S, o)`` with the ``(N,)`` lengths of consecutive samples.

``backend``: ``auto`` takes cuda, then triton, then reference for tensors on a GPU, and cpu, then reference elsewhere;
the environment variable ``INFLUENCE_FAST_BACKEND`` replaces ``auto``. A backend that was asked for by name and cannot
run raises :class:`~influence_fast.BackendError` with the reason; a fallback of ``auto`` is logged once.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from influence_fast.errors import BackendError, InputError
from influence_fast.ops.common import FLOATS, Side, accumulator, check_float, pair

if TYPE_CHECKING:
    from influence_fast.ops.projections import Projection

BACKENDS = ("cuda", "triton", "cpu", "reference")
OPS = (
    "outer",
    "project_outer",
    "sketch_outer",
    "score_outer",
    "ghost_dot",
    "ghost_norm",
    "sketch",
    "rank",
    "vote",
    "tally",
    "random_matrix",
)
__all__ = ["BACKENDS", "OPS", "available", "choose", *OPS]

_log = logging.getLogger("influence_fast")


@cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"influence_fast.ops.{backend}")


def available(
    op: str, backend: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str | None:
    """None when ``backend`` can run ``op`` on tensors of this device and dtype, else the reason why it cannot."""
    if op not in OPS:
        raise InputError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    if backend not in BACKENDS:
        raise InputError(f"backend: expected auto, {', '.join(BACKENDS)}, got {backend!r}")
    return _module(backend).unavailable(op, torch.device(device), dtype)


def choose(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> str:
    """The backend that ``op`` takes for tensors of this device and dtype."""
    if backend == "auto":
        backend = os.environ.get("INFLUENCE_FAST_BACKEND") or "auto"
    device = torch.device(device)
    if backend != "auto":
        if reason := available(op, backend, device, dtype):
            raise BackendError(f"backend {backend!r} cannot run {op} on {device.type} {dtype}: {reason}")
        return backend
    for name in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        reason = available(op, name, device, dtype)
        if reason is None:
            return name
        _fallback(op, name, dtype, reason)
    return "reference"


@cache
def _fallback(op: str, backend: str, dtype: torch.dtype, reason: str) -> None:
    # float64 is the oracle's business: the reference is where it belongs, not a fallback.
    if dtype != torch.float64:
        _log.warning("%s does not run on backend %r: %s", op, backend, reason)


def _run(op: str, backend: str, tensor: Tensor, *args: Any) -> Tensor:
    # No torch.no_grad(): every tensor was detached on the way here, and entering it costs as much as a small kernel.
    return getattr(_module(choose(op, tensor.device, tensor.dtype, backend)), op)(*args)


def outer(x: Tensor, dy: Tensor, lengths: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Per-sample gradients of a linear layer: ``(N, T, i), (N, T, o) -> (N, o, i)``.

    Floor: ``2 N T i o`` FLOPs at the matmul rate, or ``4 N i o`` bytes written, whichever is longer.
    """
    x, dy, spans = pair(x, dy, lengths)
    return _run("outer", backend, x, x, dy, spans)


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
    return _run("project_outer", backend, x, x, dy, right, left, spans)


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
        scale = scale.detach()
    return _run("sketch_outer", backend, x, x, dy, side, spans, scale)


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
    return _run("score_outer", backend, x, x, dy, q.detach().to(accumulator(x.dtype)), spans)


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
    return _run("ghost_dot", backend, xa, xa, dya, xb, dyb, spans_a, spans_b)


def ghost_norm(x: Tensor, dy: Tensor, lengths: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Frobenius norms ``|G_n|`` of unprojected gradients: ``-> (N,)``, no gradient formed.

    Floor: ``N T^2 (i + o)`` FLOPs (half of two Gram matrices, which are symmetric) at the matmul rate.
    """
    x, dy, spans = pair(x, dy, lengths)
    return _run("ghost_norm", backend, x, x, dy, spans)


def sketch(g: Tensor, projection: Tensor | Side | Projection, *, backend: str = "auto") -> Tensor:
    """Project flat vectors: ``(N, D) -> (N, k)``; the matrix is made on the fly, any ``k``, ``D`` beyond 2^31.

    Floor: ``N D`` elements read once; a dense kind costs ``2 N D k`` FLOPs at the matmul rate too.
    """
    check_float("g", g, 2)
    side = _side("projection", projection, "single", g.shape[1])
    if side is None:
        raise InputError("projection: identity does not sketch")
    return _run("sketch", backend, g, g.detach(), side)


def rank(influence: Tensor, *, backend: str = "auto") -> Tensor:
    """Ranks within each row: ``(m, n) -> (m, n)``, 0 = lowest, ties get their average rank.

    Returns float32 while half-integers below n are exact in it (n up to 2^22), float64 beyond. NaN or infinity raises
    :class:`~influence_fast.InputError` naming the row.

    Floor: 4 bytes read and 4 written per element, and two moves at random within a row (one of 4 bytes out, one look).
    """
    check_float("influence", influence, 2)
    return _run("rank", backend, influence, influence.detach())


def vote(influence: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """Votes against each column: ``(m, n) -> (n,)`` float64, ``-sum over rows of max(k - rank, 0)``, 1 <= k <= n.

    Floor: 4 bytes read per element; only the lowest ``k`` of a row are ranked.
    """
    _check_votes(influence, k)
    return _run("vote", backend, influence, influence.detach(), k)


def tally(influence: Tensor, k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """``(rank(influence).sum(0), vote(influence, k))``, both float64 ``(n,)``, with no ``(m, n)`` of ranks in between."""
    _check_votes(influence, k)
    chosen = choose("tally", influence.device, influence.dtype, backend)
    return _module(chosen).tally(influence.detach(), k)


def _check_votes(influence: Tensor, k: int) -> None:
    check_float("influence", influence, 2)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= influence.shape[1]:
        raise InputError(f"k: expected an int from 1 to the {influence.shape[1]} columns of influence, got {k!r}")


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
    rows, cols = rows or (0, side.k), cols or (0, side.features)
    if not (0 <= rows[0] <= rows[1] <= side.k and 0 <= cols[0] <= cols[1] <= side.features):
        raise InputError(f"rows, cols: expected ranges within {side.k} x {side.features}, got {rows} and {cols}")
    device = torch.device(device)
    chosen = choose("random_matrix", device, dtype, backend)
    return _module(chosen).random_matrix(side, rows, cols, dtype, device)


def _side(name: str, value: Any, role: str, features: int) -> Side | Tensor | None:
    """A dense matrix or a projection side of the right width, from whatever a caller may pass; None is identity."""
    if hasattr(value, "side"):
        value = value.side("", role, features)
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.dim() != 2 or value.dtype not in FLOATS or value.shape[1] != features:
            raise InputError(f"{name}: expected a float matrix (k, {features}), got {value.dtype} {tuple(value.shape)}")
        return value.detach()
    if getattr(value, "features", None) != features:
        raise InputError(f"{name}: expected a (k, {features}) tensor or side, got {value!r}")
    return value
