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

from influence_fast.errors import InputError
from influence_fast.ops.common import Side, not_finite, unit_stride

try:
    import influence_fast_cpu as _native
except ImportError as error:
    _native = None
    _missing = f"the extension influence_fast_cpu is not built ({error})"

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_CACHE_BYTES = 1 << 26


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``op`` cannot run here, or None."""
    if device.type != "cpu":
        return f"it works on tensors in main memory, not on {device.type}"
    if _native is None:
        return _missing
    if dtype not in _DTYPES and op != "random_matrix":
        return f"it sums in float32, {dtype} is the reference's"
    if op not in globals():
        return f"it has no kernel for {op}"
    return None


def outer(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    return project_outer(x, dy, None, None, spans)


def project_outer(
    x: Tensor, dy: Tensor, p_in: Side | Tensor | None, p_out: Side | Tensor | None, spans: Tensor | None
) -> Tensor:
    right, _right, k_in = _side("p_in", p_in, x.shape[2])
    left, _left, k_out = _side("p_out", p_out, dy.shape[2])
    out = _output(x.shape[0], k_out, k_in)
    if out.numel():
        x, dy = _readable("x", x), _readable("dy", dy)
        _native.project_outer(
            x=_tokens(x),
            dy=_tokens(dy),
            spans=_optional(spans),
            p_in=right,
            p_out=left,
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
        )
    return out


def sketch_outer(x: Tensor, dy: Tensor, side: Side | Tensor, spans: Tensor | None, scale: Tensor | None) -> Tensor:
    matrix, _matrix, k = _side("projection", side, x.shape[2] * dy.shape[2], keep=False)
    out = _output(x.shape[0], k)
    if not x.shape[2] * dy.shape[2]:
        return out.zero_()
    if out.numel():
        if scale is not None:
            scale = _readable("scale", scale.to(torch.float32)).contiguous()
        x, dy = _readable("x", x), _readable("dy", dy)
        _native.sketch_outer(
            x=_tokens(x),
            dy=_tokens(dy),
            spans=_optional(spans),
            side=matrix,
            weight=_optional(scale),
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
        )
    return out


def score_outer(x: Tensor, dy: Tensor, q: Tensor, spans: Tensor | None) -> Tensor:
    # A sketch with the given matrices for rows.
    return sketch_outer(x, dy, q.flatten(1), spans, None)


def ghost_dot(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None
) -> Tensor:
    out = _output(xa.shape[0], xb.shape[0])
    if out.numel():
        xa, dya = _readable("xa", xa), _readable("dya", dya)
        xb, dyb = _readable("xb", xb), _readable("dyb", dyb)
        _native.ghost_dot(
            xa=_tokens(xa),
            dya=_tokens(dya),
            spans_a=_optional(spans_a),
            xb=_tokens(xb),
            dyb=_tokens(dyb),
            spans_b=_optional(spans_b),
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
        )
    return out


def ghost_norm(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    out = _output(x.shape[0])
    if out.numel():
        x, dy = _readable("x", x), _readable("dy", dy)
        _native.ghost_norm(
            x=_tokens(x), dy=_tokens(dy), spans=_optional(spans), out=out.data_ptr(), threads=torch.get_num_threads()
        )
    return out


def sketch(g: Tensor, side: Side | Tensor) -> Tensor:
    if isinstance(side, Tensor):
        return g.to(torch.float32) @ side.to(torch.float32).T
    out = _output(g.shape[0], side.k)
    if out.numel():
        g = _readable("g", g)
        _native.sketch(g=_matrix(g), side=_implicit(side), out=out.data_ptr(), threads=torch.get_num_threads())
    return out


def rank(influence: Tensor) -> Tensor:
    influence = _values(influence)
    out = _output(*influence.shape, dtype=torch.float32 if influence.shape[1] <= 1 << 22 else torch.float64)
    if out.numel():
        wide = out.dtype == torch.float64
        _check(_native.rank(values=_matrix(influence), out=out.data_ptr(), wide=wide, threads=torch.get_num_threads()))
    return out


def vote(influence: Tensor, k: int) -> Tensor:
    influence = _values(influence)
    out = _output(influence.shape[1], dtype=torch.float64).zero_()
    if influence.numel():
        _check(_native.vote(values=_matrix(influence), k=k, votes=out.data_ptr(), threads=torch.get_num_threads()))
    return out


def tally(influence: Tensor, k: int) -> tuple[Tensor, Tensor]:
    influence = _values(influence)
    ranks, votes = (_output(influence.shape[1], dtype=torch.float64).zero_() for _ in range(2))
    if influence.numel():
        _check(
            _native.rank_and_vote(
                values=_matrix(influence),
                k=k,
                ranks=ranks.data_ptr(),
                votes=votes.data_ptr(),
                threads=torch.get_num_threads(),
            )
        )
    return ranks, votes


def _check(row: int) -> None:
    if row >= 0:
        raise not_finite(row)


def random_matrix(
    side: Side, rows: tuple[int, int], cols: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    out = _output(rows[1] - rows[0], cols[1] - cols[0])
    _fill(out, side, rows[0], cols[0])
    out = out.to(dtype)
    return out if side.kind == "sjlt" else out.mul_(side.scale)


def _fill(out: Tensor, side: Side, row: int, column: int) -> None:
    """Unscaled entries from ``(row, column)`` on."""
    if out.numel():
        _native.random_matrix(
            side=_implicit(side),
            row=row,
            rows=out.shape[0],
            column=column,
            columns=out.shape[1],
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
        )


def _output(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where a result goes, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _readable(name: str, x: Tensor) -> Tensor:
    """``x`` as it lies in main memory, with a last stride of one; InputError where it does not lie there."""
    return unit_stride(_in_memory(name, x))


def _in_memory(name: str, x: Tensor) -> Tensor:
    if not x.is_cpu or x.layout is not torch.strided:
        raise InputError(f"{name}: expected a dense tensor in main memory, got {x.layout} on {x.device}")
    try:
        x.data_ptr()
    except RuntimeError as error:
        raise InputError(f"{name}: expected a tensor with memory, got {type(x).__name__} ({error})") from None
    # Memory of a negated view holds the opposite of its values.
    return x.resolve_neg() if x.is_neg() else x


def _values(influence: Tensor) -> Tensor:
    return _in_memory("influence", influence.to(torch.float32))


def _optional(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tokens(x: Tensor) -> Any:
    return _native.Tokens(x.data_ptr(), _DTYPES[x.dtype], x.shape, x.stride())


def _matrix(x: Tensor) -> Any:
    return _native.Matrix(x.data_ptr(), _DTYPES[x.dtype], x.shape, x.stride())


@lru_cache(maxsize=4096)
def _implicit(side: Side) -> Any:
    key0, key1 = side.key
    return _native.Side(kind=side.kind, key0=key0, key1=key1, k=side.k, features=side.features, scale=side.scale)


def _side(name: str, side: Side | Tensor | None, features: int, keep: bool = True) -> tuple[Any, Tensor | None, int]:
    """What the kernels take for a side, the tensor that must outlive the call, and how many numbers it leaves."""
    if side is None:
        return None, None, features
    if not isinstance(side, Tensor):
        if not (keep and side.kind == "gaussian"):
            return _implicit(side), None, side.k
        matrix, scale = _gaussian(side), side.scale
    else:
        matrix, scale = _in_memory(name, side.to(torch.float32)).contiguous(), 1.0
    given = _native.dense_side(data=matrix.data_ptr(), shape=matrix.shape, strides=matrix.stride(), scale=scale)
    return given, matrix, matrix.shape[0]


_kept: OrderedDict[Side, Tensor] = OrderedDict()
_lock = Lock()


def _gaussian(side: Side) -> Tensor:
    """The unscaled matrix of a Gaussian side; the last few of them are kept."""
    with _lock:
        matrix = _kept.pop(side, None)
        if matrix is None:
            matrix = _output(side.k, side.features)
            _fill(matrix, side, 0, 0)
        if matrix.nbytes <= _CACHE_BYTES:
            _kept[side] = matrix
            while sum(m.nbytes for m in _kept.values()) > _CACHE_BYTES:
                _kept.popitem(last=False)
    return matrix
