"""The C++ kernels of ``csrc/cpu`` on torch tensors in main memory.

Tensors cross the border as addresses, sizes and strides; the last dimension has unit stride (anything else is copied).
Random entries are made inside the kernels, for every call; only Gaussian sides of ``project_outer`` are kept (they cost
a logarithm and a cosine each), in a small cache of pure functions of the side.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from influence_fast.ops.arguments import Side, not_finite

try:
    import influence_fast_cpu as _native
except ImportError as error:
    _native = None
    _missing = f"the extension influence_fast_cpu is not built ({error})"

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NONE = (0, 0, 0, 1, 1, 1.0, 0, 0)
_KINDS = {"rademacher": 2, "gaussian": 3, "sjlt": 4}
_CACHE_BYTES = 1 << 26


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``op`` cannot run here, or None."""
    if device.type != "cpu":
        return f"it works on tensors in main memory, not on {device.type}"
    if _native is None:
        return _missing
    if dtype not in _TYPES and op != "random_matrix":
        return f"it sums in float32, {dtype} is the reference's"
    if op not in globals():
        return f"it has no kernel for {op}"
    return None


def outer(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    return project_outer(x, dy, None, None, spans)


def project_outer(
    x: Tensor, dy: Tensor, p_in: Side | Tensor | None, p_out: Side | Tensor | None, spans: Tensor | None
) -> Tensor:
    right, _right = _side(p_in, cached=True)
    left, _left = _side(p_out, cached=True)
    k_out = dy.shape[2] if p_out is None else left[3]
    k_in = x.shape[2] if p_in is None else right[3]
    out = torch.empty(x.shape[0], k_out, k_in)
    if out.numel():
        x, dy, head = _batch(x, dy, spans)
        _native.project_outer(*head, *_tokens(x), *_tokens(dy), right, left, out.data_ptr(), torch.get_num_threads())
    return out


def sketch_outer(x: Tensor, dy: Tensor, side: Side | Tensor, spans: Tensor | None, scale: Tensor | None) -> Tensor:
    matrix, _matrix = _side(side)
    out = torch.empty(x.shape[0], matrix[3])
    if not x.shape[2] * dy.shape[2]:
        return out.zero_()
    if out.numel():
        if scale is not None:
            scale = scale.detach().to(torch.float32).contiguous()
        weight = 0 if scale is None else scale.data_ptr()
        x, dy, head = _batch(x, dy, spans)
        tail = (matrix, weight, out.data_ptr(), torch.get_num_threads())
        _native.sketch_outer(*head, *_tokens(x), *_tokens(dy), *tail)
    return out


def score_outer(x: Tensor, dy: Tensor, q: Tensor, spans: Tensor | None) -> Tensor:
    # A sketch with the given matrices for rows.
    return sketch_outer(x, dy, q.flatten(1), spans, None)


def ghost_dot(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None
) -> Tensor:
    out = torch.empty(xa.shape[0], xb.shape[0])
    if out.numel():
        xa, dya, (kind, *head_a) = _batch(xa, dya, spans_a)
        xb, dyb, (_, *head_b) = _batch(xb, dyb, spans_b)
        (pxb, _, *sxb), (pdyb, _, *sdyb) = _tokens(xb), _tokens(dyb)
        second = (*head_b, pxb, *sxb, pdyb, *sdyb)
        _native.ghost_dot(kind, *head_a, *_tokens(xa), *_tokens(dya), *second, out.data_ptr(), torch.get_num_threads())
    return out


def ghost_norm(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    out = torch.empty(x.shape[0])
    if out.numel():
        x, dy, head = _batch(x, dy, spans)
        _native.ghost_norm(*head, *_tokens(x), *_tokens(dy), out.data_ptr(), torch.get_num_threads())
    return out


def sketch(g: Tensor, side: Side | Tensor) -> Tensor:
    if isinstance(side, Tensor):
        return g.to(torch.float32) @ side.to(torch.float32).T
    out = torch.empty(g.shape[0], side.k)
    if out.numel():
        g = _unit(g)
        matrix, _ = _side(side)
        size = (g.shape[0], g.shape[1], g.stride(0))
        _native.sketch(g.data_ptr(), _TYPES[g.dtype], *size, matrix, out.data_ptr(), torch.get_num_threads())
    return out


def rank(influence: Tensor) -> Tensor:
    influence = influence.to(torch.float32)
    out = torch.empty(influence.shape, dtype=torch.float32 if influence.shape[1] <= 1 << 22 else torch.float64)
    if out.numel():
        wide = out.dtype == torch.float64
        _check(_native.rank(*_rows(influence), out.data_ptr(), wide, torch.get_num_threads()))
    return out


def vote(influence: Tensor, k: int) -> Tensor:
    influence = influence.to(torch.float32)
    out = torch.zeros(influence.shape[1], dtype=torch.float64)
    if influence.numel():
        _check(_native.vote(*_rows(influence), k, out.data_ptr(), torch.get_num_threads()))
    return out


def tally(influence: Tensor, k: int) -> tuple[Tensor, Tensor]:
    influence = influence.to(torch.float32)
    ranks, votes = (torch.zeros(influence.shape[1], dtype=torch.float64) for _ in range(2))
    if influence.numel():
        _check(_native.tally(*_rows(influence), k, ranks.data_ptr(), votes.data_ptr(), torch.get_num_threads()))
    return ranks, votes


def _rows(influence: Tensor) -> tuple[int, ...]:
    return influence.data_ptr(), *influence.shape, *influence.stride()


def _check(row: int) -> None:
    if row >= 0:
        raise not_finite(row)


def random_matrix(
    side: Side, rows: tuple[int, int], cols: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    out = torch.empty(rows[1] - rows[0], cols[1] - cols[0])
    if out.numel():
        _native.random_matrix(_implicit(side), *rows, *cols, out.data_ptr(), torch.get_num_threads())
    out = out.to(dtype)
    return out if side.kind == "sjlt" else out.mul_(side.scale)


def _unit(x: Tensor) -> Tensor:
    """``x`` with a last stride of one."""
    if x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    if x.dim() == 3 and x.stride(0) == 0:
        # A packed batch: N views of the same tokens stay that.
        return x[:1].contiguous().expand(x.shape)
    return x.contiguous()


def _batch(x: Tensor, dy: Tensor, spans: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
    pointer = 0 if spans is None else spans.data_ptr()
    return _unit(x), _unit(dy), (_TYPES[x.dtype], x.shape[0], x.shape[1], pointer)


def _tokens(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.shape[2], x.stride(0), x.stride(1)


@lru_cache(maxsize=4096)
def _implicit(side: Side) -> tuple[Any, ...]:
    return (_KINDS[side.kind], *side.key, side.k, side.features, side.scale, 0, 0)


def _side(side: Side | Tensor | None, cached: bool = False) -> tuple[tuple[Any, ...], Tensor | None]:
    """What the kernels take for a side, and the tensor that must outlive the call."""
    if side is None:
        return _NONE, None
    if not isinstance(side, Tensor):
        if not (cached and side.kind == "gaussian"):
            return _implicit(side), None
        matrix, scale = _gaussian(side), side.scale
    else:
        matrix, scale = side.to(torch.float32).contiguous(), 1.0
    return (1, 0, 0, *matrix.shape, scale, matrix.data_ptr(), matrix.shape[1]), matrix


_kept: OrderedDict[Side, Tensor] = OrderedDict()
_lock = Lock()


def _gaussian(side: Side) -> Tensor:
    """The unscaled matrix of a Gaussian side; the last few of them are kept."""
    with _lock:
        matrix = _kept.pop(side, None)
        if matrix is None:
            matrix = torch.empty(side.k, side.features)
            size = (0, side.k, 0, side.features)
            _native.random_matrix(_implicit(side), *size, matrix.data_ptr(), torch.get_num_threads())
        if matrix.nbytes <= _CACHE_BYTES:
            _kept[side] = matrix
            while sum(m.nbytes for m in _kept.values()) > _CACHE_BYTES:
                _kept.popitem(last=False)
    return matrix
