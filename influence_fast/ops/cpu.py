"""The C++ kernels of ``csrc/cpu`` on torch tensors in main memory.

Tensors cross the border as addresses, sizes and strides; the last dimension has unit stride (anything else is copied).
Random entries are made inside the kernels, for every call; only those of Gaussian sides are kept between calls (they cost a
logarithm and a cosine each), as long as all that is kept fits ``INFLUENCE_FAST_MATRIX_BYTES`` (1 GiB by default).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.ops.arguments import (
    AdamState,
    Side,
    accumulator,
    address,
    aligned,
    not_finite,
    output,
    plain,
    unit_stride,
)

try:
    import influence_fast_cpu as _native
except ImportError as error:
    _native = None
    _missing = f"the extension influence_fast_cpu is not built ({error})"

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_CPU = torch.device("cpu")
# Operations that sum in float64 where their arguments do.
_WIDE = ("random_matrix", "sketch")


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``op`` cannot run here, or None."""
    if device.type != "cpu":
        return f"it works on tensors in main memory, not on {device.type}"
    if _native is None:
        return _missing
    if dtype not in _DTYPES and op not in _WIDE:
        return f"it sums in float32, {dtype} is the reference's"
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
        tokens_x, _x = _tokens("x", x)
        tokens_dy, _dy = _tokens("dy", dy)
        threads = torch.get_num_threads()
        _native.project_outer(tokens_x, tokens_dy, _optional("lengths", spans), right, left, _to(out), threads)
    return out


def sketch_outer(
    x: Tensor,
    dy: Tensor,
    side: Side | Tensor,
    spans: Tensor | None,
    scale: Tensor | None,
    adam: AdamState | None = None,
) -> Tensor:
    matrix, _matrix, k = _side("projection", side, x.shape[2] * dy.shape[2], keep=False)
    out = _output(x.shape[0], k)
    if not x.shape[2] * dy.shape[2]:
        return out.zero_()
    if out.numel():
        weight = None if scale is None else _dense("scale", scale)
        tokens_x, _x = _tokens("x", x)
        tokens_dy, _dy = _tokens("dy", dy)
        moments = (None, None) if adam is None else (_dense("adam.m", adam.m), _dense("adam.v", adam.v))
        entries = (_optional("scale", weight), _optional("adam.m", moments[0]), _optional("adam.v", moments[1]))
        numbers = (0.0, 0.0, 0.0) if adam is None else (*adam.betas, adam.eps)
        tail = (*entries, *numbers, _to(out), torch.get_num_threads())
        _native.sketch_outer(tokens_x, tokens_dy, _optional("lengths", spans), matrix, *tail)
    return out


def score_outer(x: Tensor, dy: Tensor, q: Tensor, spans: Tensor | None) -> Tensor:
    # A sketch with the given matrices for rows.
    return sketch_outer(x, dy, q.flatten(1), spans, None)


def ghost_dot(
    xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor, spans_a: Tensor | None, spans_b: Tensor | None
) -> Tensor:
    out = _output(xa.shape[0], xb.shape[0])
    if out.numel():
        tokens_xa, _xa = _tokens("xa", xa)
        tokens_dya, _dya = _tokens("dya", dya)
        tokens_xb, _xb = _tokens("xb", xb)
        tokens_dyb, _dyb = _tokens("dyb", dyb)
        a, b = (
            (tokens_xa, tokens_dya, _optional("lengths_a", spans_a)),
            (tokens_xb, tokens_dyb, _optional("lengths_b", spans_b)),
        )
        _native.ghost_dot(*a, *b, _to(out), torch.get_num_threads())
    return out


def ghost_norm(x: Tensor, dy: Tensor, spans: Tensor | None) -> Tensor:
    out = _output(x.shape[0])
    if out.numel():
        tokens_x, _x = _tokens("x", x)
        tokens_dy, _dy = _tokens("dy", dy)
        _native.ghost_norm(tokens_x, tokens_dy, _optional("lengths", spans), _to(out), torch.get_num_threads())
    return out


def sketch(g: Tensor, side: Side | Tensor) -> Tensor:
    dtype = accumulator(g.dtype)
    if isinstance(side, Tensor):
        return g.to(dtype) @ side.to(dtype).T
    out = _output(g.shape[0], side.k, dtype=dtype)
    if out.numel() and dtype == torch.float64:
        g, at = aligned("g", unit_stride(_in_memory("g", g)))
        _native.sketch_wide(at, g.shape, g.stride(), _implicit(side), _to(out), torch.get_num_threads())
    elif out.numel():
        matrix, _g = _matrix("g", g, contiguous_rows=True)
        made = _panels(side) if side.kind == "gaussian" else None
        given = _implicit(side) if made is None else _native.with_panels(_implicit(side), _to(made))
        _native.sketch(matrix, given, _to(out), torch.get_num_threads())
    return out


def rank(influence: Tensor) -> Tensor:
    wide = influence.shape[1] > 1 << 22
    out = _output(*influence.shape, dtype=torch.float64 if wide else torch.float32)
    if out.numel():
        values, _influence = _matrix("influence", influence.to(torch.float32))
        _check(_native.rank(values, _to(out), wide, torch.get_num_threads()))
    return out


def vote(influence: Tensor, k: int) -> Tensor:
    out = _output(influence.shape[1], dtype=torch.float64).zero_()
    if influence.numel():
        values, _influence = _matrix("influence", influence.to(torch.float32))
        _check(_native.vote(values, k, _to(out), torch.get_num_threads()))
    return out


def rank_and_vote(influence: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ranks, votes = (_output(influence.shape[1], dtype=torch.float64).zero_() for _ in range(2))
    if influence.numel():
        values, _influence = _matrix("influence", influence.to(torch.float32))
        threads = torch.get_num_threads()
        _check(_native.rank_and_vote(values, k, _to(ranks), _to(votes), threads))
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
    return out if side.scale == 1 else out.mul_(side.scale)


def _fill(out: Tensor, side: Side, row: int, column: int) -> None:
    """Unscaled entries from ``(row, column)`` on."""
    if out.numel():
        _native.random_matrix(
            side=_implicit(side),
            row=row,
            rows=out.shape[0],
            column=column,
            columns=out.shape[1],
            out=_to(out),
            threads=torch.get_num_threads(),
        )


def _output(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return output(shape, dtype, _CPU)


def _tokens(name: str, x: Tensor) -> tuple[Any, Tensor]:
    """What the kernels take for ``(N, T, features)``, and the tensor that must outlive the call."""
    return _described(_native.Tokens, name, x, unit=True)


def _matrix(name: str, x: Tensor, contiguous_rows: bool = False) -> tuple[Any, Tensor]:
    """The same for ``(rows, columns)``, of any strides or with columns one after another."""
    return _described(_native.Matrix, name, x, contiguous_rows)


def _described(make: Any, name: str, x: Tensor, unit: bool) -> tuple[Any, Tensor]:
    # A microsecond counts here: one call of torch for each thing to know.
    x, at = aligned(name, _in_memory(name, x))
    strides = x.stride()
    if unit and strides[-1] != 1:
        x = unit_stride(x)
        x, at = aligned(name, x)
        strides = x.stride()
    try:
        return make(at, _DTYPES[x.dtype], x.shape, strides), x
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def _dense(name: str, x: Tensor) -> Tensor:
    """Contiguous float32."""
    x = _in_memory(name, x).to(torch.float32).contiguous()
    return aligned(name, x)[0]


def _in_memory(name: str, x: Tensor) -> Tensor:
    if not x.is_cpu:
        raise InputError(f"{name}: expected a tensor in main memory, got one on {x.device}")
    return x if x.layout is torch.strided and not x.is_neg() else plain(name, x)


def _to(out: Tensor) -> int:
    """Where a kernel writes."""
    return address("out", out)


def _optional(name: str, tensor: Tensor | None) -> int:
    return 0 if tensor is None else address(name, tensor)


@lru_cache(maxsize=4096)
def _implicit(side: Side) -> Any:
    key0, key1 = side.words
    try:
        numbers = {"k": side.k, "features": side.features, "scale": side.scale, "offset": side.offset}
        return _native.Side(kind=side.kind, key0=key0, key1=key1, **numbers)
    except ValueError as error:
        raise InputError(f"projection: {error}") from None


def _side(name: str, side: Side | Tensor | None, features: int, keep: bool = True) -> tuple[Any, Tensor | None, int]:
    """What the kernels take for a side, the tensor that must outlive the call, and how many numbers it leaves."""
    if side is None:
        return None, None, features
    if not isinstance(side, Tensor):
        if not (keep and side.kind == "gaussian"):
            return _implicit(side), None, side.k
        matrix, scale = _gaussian(side), side.scale
    else:
        matrix, scale = _dense(name, side), 1.0
    at = address(name, matrix)
    given = _native.dense_side(data=at, shape=matrix.shape, strides=matrix.stride(), scale=scale)
    return given, matrix, matrix.shape[0]


# What was made of Gaussian sides, the last used at the end.
_kept: OrderedDict[tuple[str, Side], Tensor] = OrderedDict()
_lock = Lock()


def _budget() -> int:
    text = os.environ.get("INFLUENCE_FAST_MATRIX_BYTES", "")
    if text and not text.isdecimal():
        raise InputError(f"INFLUENCE_FAST_MATRIX_BYTES: expected a number of bytes, got {text!r}")
    return int(text or 1 << 30)


def _gaussian(side: Side) -> Tensor:
    """The unscaled matrix of a Gaussian side, as rows."""
    kept = _keep("rows", side, 4 * side.k * side.features, lambda: _filled(side))
    return _filled(side) if kept is None else kept


def _panels(side: Side) -> Tensor | None:
    """Its entries as the kernel of sketch reads them; None where they do not fit, and are made anew a block at a time."""
    numbers = _native.panel_numbers(side.k, side.features)

    def make() -> Tensor:
        panels = _output(numbers)
        _native.fill_panels(_implicit(side), _to(panels), torch.get_num_threads())
        return panels

    # The layout follows from the width of a vector.
    return _keep(_native.isa(), side, 4 * numbers, make)


def _filled(side: Side) -> Tensor:
    matrix = _output(side.k, side.features)
    _fill(matrix, side, 0, 0)
    return matrix


def _keep(layout: str, side: Side, size: int, make: Callable[[], Tensor]) -> Tensor | None:
    """What ``make`` gives, from this call or an earlier one; None where it takes more bytes than may be kept."""
    budget = _budget()
    if size > budget:
        return None
    with _lock:
        found = _kept.pop((layout, side), None)
        while _kept and sum(tensor.nbytes for tensor in _kept.values()) + size > budget:
            _kept.popitem(last=False)
        _kept[layout, side] = found = make() if found is None else found
    return found
