"""The CUDA kernels of ``csrc/cuda`` on torch tensors on a GPU: what is allocated, which launch, on which stream.

Work is queued on torch's current stream of the tensors' device. Nothing here waits for it, except the look for NaN at
the end of rank and vote, and packed samples that are multiplied one by one. Kernels read any strides with a last one of
1; other tensors are made contiguous first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from influence_fast.ops import reference
from influence_fast.ops.arguments import AdamState, Side, address, not_finite, output, unit_stride

try:
    import influence_fast_cuda as _native
except ImportError as error:
    _native = None
    _missing = f"the extension influence_fast_cuda is not built ({error})"

# Parts of a sketch, in floats, before its rows are taken in pieces.
_SCRATCH = 1 << 26
# Entries that are ranked at a time; each takes about 50 bytes.
_SORTED = 1 << 23
# Entries of G, or of a dense random matrix, that exist at a time where a kernel does not spare them.
_ENTRIES = 1 << 26


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it works on tensors on an NVIDIA GPU, not on {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, not {dtype}"
    if _native is None:
        return _missing
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need compute capability 8.0 (Ampere) or later"
    return None


def project_outer(
    x: Tensor, dy: Tensor, p_in: Side | Tensor | None, p_out: Side | Tensor | None, spans: Tensor | None
) -> Tensor:
    if _fused(p_in) and _fused(p_out) and x.numel() and dy.numel():
        return project_outer_grouped([(x, dy, p_in, p_out)], spans)[0]
    right, left = _projected(x, p_in, spans), _projected(dy, p_out, spans)
    if spans is None or x.shape[0] < 2 or x.stride(0):
        return left.mT @ right
    # Packed: N views of the same tokens.
    out = right.new_empty(x.shape[0], left.shape[-1], right.shape[-1])
    for sample, (begin, end) in enumerate(spans.tolist()):
        torch.matmul(left[sample, begin:end].T, right[sample, begin:end], out=out[sample])
    return out


def project_outer_grouped(layers: Sequence[tuple[Tensor, Tensor, Side, Side]], spans: Tensor | None) -> list[Tensor]:
    """``project_outer`` of several layers over the same tokens: ``(x, dy, p_in, p_out)`` each, one launch for 16.

    Sides are rademacher or sjlt with at most 128 outputs and 32,768 features, tensors are not empty and share dtype,
    device, samples and tokens: what the kernel is for. Small models are made of many launches otherwise.
    """
    results: list[Tensor] = []
    for begin in range(0, len(layers), _native.LAYERS_PER_LAUNCH):
        group = layers[begin : begin + _native.LAYERS_PER_LAUNCH]
        n, t = group[0][0].shape[:2]
        k_in, k_out = max(p_in.k for _, _, p_in, _ in group), max(p_out.k for _, _, _, p_out in group)
        splits = _native.project_outer_splits(t, k_in, k_out)
        records, keep = [], []
        # Layers with a common input, such as query, key and value, share its copy.
        inputs = {id(tensor): tensor for x, dy, _, _ in group for tensor in (x, dy)}
        readable = {key: unit_stride(tensor) for key, tensor in inputs.items()}
        for x, dy, p_in, p_out in group:
            x, dy = readable[id(x)], readable[id(dy)]
            out = _empty(x, n, p_out.k, p_in.k)
            parts = _empty(x, n, splits, p_out.k, p_in.k) if splits > 1 else None
            keep.append(parts)
            results.append(out)
            records.append(
                _native.Layer(
                    x=_tokens(x),
                    dy=_tokens(dy),
                    p_in=_side(p_in),
                    p_out=_side(p_out),
                    result=address("out", out),
                    parts=_address(parts),
                )
            )
        spans = None if spans is None else spans.contiguous()
        _native.project_outer(
            layers=records,
            spans=_address(spans),
            row_warps=_native.project_outer_row_warps(t, k_in, k_out),
            splits=splits,
            **_where(group[0][0]),
        )
    return results


def sketch_outer(
    x: Tensor,
    dy: Tensor,
    side: Side | Tensor,
    spans: Tensor | None,
    scale: Tensor | None,
    adam: AdamState | None = None,
) -> Tensor:
    n, o, i = x.shape[0], dy.shape[2], x.shape[2]
    if isinstance(side, Tensor) or side.kind != "sjlt" or side.offset or adam is not None:
        # A dense matrix meets every entry of G: that many multiplications dwarf the writing of G, a few samples a time.
        # Adam's formula is not in the kernel either.
        k = side.shape[0] if isinstance(side, Tensor) else side.k
        out = _empty(x, n, k)
        step = max(1, _ENTRIES // max(1, o * i))
        for begin in range(0, n, step):
            rows = slice(begin, begin + step)
            g = reference.outer(x[rows], dy[rows], None if spans is None else spans[rows])
            g = g if scale is None else g * scale.to(g.dtype)
            out[rows] = sketch((g if adam is None else adam.update(g)).flatten(1), side)
        return out
    if x.numel() == 0 or dy.numel() == 0:
        return _empty(x, n, side.k).zero_()
    if side.scale != 1:
        return sketch_outer(x, dy, replace(side, scale=1.0), spans, scale) * side.scale  # type: ignore[type-var]
    x, dy, out = unit_stride(x), unit_stride(dy), _empty(x, n, side.k)
    strips = _native.sketch_outer_strips(i, o)
    parts = _empty(x, n, strips, side.k) if strips > 1 else None
    spans = None if spans is None else spans.contiguous()
    scale = None if scale is None else scale.detach().to(torch.float32).contiguous()
    _native.sketch_outer(
        x=_tokens(x),
        dy=_tokens(dy),
        spans=_address(spans),
        side=_side(side),
        scale=_address(scale),
        out=address("out", out),
        parts=_address(parts),
        **_where(x),
    )
    return out


def sketch(g: Tensor, side: Side | Tensor) -> Tensor:
    if isinstance(side, Tensor):
        return reference.sketch(g, side)
    if side.kind == "sjlt" and side.scale != 1:
        # The kernels for it know named sides, whose scale is 1.
        return sketch(g, replace(side, scale=1.0)) * side.scale  # type: ignore[type-var]
    if g.numel() == 0:
        return _empty(g, g.shape[0], side.k).zero_()
    if side.kind == "sjlt" and side.offset:
        return reference.sketch(g, side)
    if side.kind == "gaussian" or side.offset:
        out = _empty(g, g.shape[0], side.k).zero_()
        step = max(4, _ENTRIES // side.k // 4 * 4)
        for begin in range(0, side.features, step):
            cols = (begin, min(begin + step, side.features))
            out += g[:, cols[0] : cols[1]].float() @ random_matrix(side, (0, side.k), cols, torch.float32, g.device).T
        return out
    g, out = unit_stride(g), _empty(g, g.shape[0], side.k)
    splits = _native.sketch_splits(side.kind, side.features, side.k)
    step = g.shape[0] if splits == 1 else min(g.shape[0], max(32, _SCRATCH // (splits * side.k)))
    parts = _empty(g, splits, step, side.k) if splits > 1 else None
    for begin in range(0, g.shape[0], step):
        rows = g[begin : begin + step]
        _native.sketch(
            g=_matrix(rows),
            side=_side(side),
            out=address("out", out[begin:]),
            parts=_address(parts),
            **_where(g),
        )
    return out


def rank(influence: Tensor) -> Tensor:
    out = torch.empty(influence.shape, dtype=_rank_dtype(influence), device=influence.device)
    for begin, ranks in _ranked(influence):
        out[begin : begin + ranks.shape[0]] = ranks
    return out


def vote(influence: Tensor, k: int) -> Tensor:
    out = torch.zeros(influence.shape[1], dtype=torch.float64, device=influence.device)
    for _, ranks in _ranked(influence):
        _native.vote(
            ranks=address("workspace", ranks),
            wide=ranks.dtype == torch.float64,
            rows=ranks.shape[0],
            columns=ranks.shape[1],
            k=k,
            votes=address("out", out),
            **_where(out),
        )
    return out


def _rank_dtype(influence: Tensor) -> torch.dtype:
    return torch.float32 if influence.shape[1] <= 1 << 22 else torch.float64


def _ranked(influence: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and ranks of consecutive groups of rows, in a buffer that the next group overwrites."""
    m, n = influence.shape
    if influence.numel() == 0:
        return
    influence, where = unit_stride(influence), _where(influence)
    device, step = influence.device, min(m, max(1, _SORTED // n))
    keys = torch.empty(2, step, n, dtype=torch.int64, device=device)
    index = torch.empty(2, step, n, dtype=torch.int32, device=device)
    ranks = torch.empty(step, n, dtype=_rank_dtype(influence), device=device)
    bad = torch.full((), m, dtype=torch.int64, device=device)
    workspace = torch.empty(_native.rank_workspace(step, n, where["device"]), dtype=torch.uint8, device=device)
    for begin in range(0, m, step):
        rows = influence[begin : begin + step]
        _native.rank(
            values=_matrix(rows),
            first_row=begin,
            keys=address("workspace", keys[0]),
            sorted_keys=address("workspace", keys[1]),
            index=address("workspace", index[0]),
            sorted_index=address("workspace", index[1]),
            workspace=address("workspace", workspace),
            workspace_bytes=workspace.numel(),
            ranks=address("workspace", ranks),
            wide=ranks.dtype == torch.float64,
            bad=address("workspace", bad),
            **where,
        )
        yield begin, ranks[: rows.shape[0]]
    if (row := int(bad)) < m:
        raise not_finite(row)


def random_matrix(
    side: Side, rows: tuple[int, int], cols: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    out = torch.empty(rows[1] - rows[0], cols[1] - cols[0], dtype=dtype, device=device)
    if out.numel():
        # The kernel knows columns of a key's matrix alone.
        key0, key1 = side.words
        whole = {"kind": side.kind, "key0": key0, "key1": key1, "k": side.k, "scale": side.scale}
        _native.random_matrix(
            side=_native.Side(features=side.offset + side.features, **whole),
            row=rows[0],
            rows=out.shape[0],
            column=side.offset + cols[0],
            columns=out.shape[1],
            dtype=_dtype(out),
            out=address("out", out),
            **_where(out),
        )
    return out


def _fused(side: Side | Tensor | None) -> TypeGuard[Side]:
    """Whether the kernel of project_outer takes this side; the others are multiplied one after the other."""
    return (
        side is not None
        and not isinstance(side, Tensor)
        and side.kind in ("rademacher", "sjlt")
        and not side.offset
        and side.k <= _native.PROJECT_MAX_K
        and side.features <= _native.PROJECT_MAX_FEATURES
    )


def _projected(x: Tensor, side: Side | Tensor | None, spans: Tensor | None) -> Tensor:
    """``x P^T`` in float32, tokens that do not count as zeros; packed tokens are projected once."""
    if side is None or isinstance(side, Tensor):
        return reference.project(reference._live(x, spans), side)
    if x.shape[0] > 1 and x.stride(0) == 0:
        return _projected(x[:1], side, None).expand(x.shape[0], -1, -1)
    return reference._live(sketch(x.flatten(0, 1), side).unflatten(0, x.shape[:2]), spans)


def _side(side: Side) -> Any:
    key0, key1 = side.words
    return _native.Side(kind=side.kind, key0=key0, key1=key1, k=side.k, features=side.features, scale=side.scale)


def _tokens(x: Tensor) -> Any:
    return _native.Tokens(address("x, dy", x), _dtype(x), x.shape, x.stride())


def _matrix(x: Tensor) -> Any:
    return _native.Matrix(address("g, influence", x), _dtype(x), x.shape, x.stride())


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _empty(like: Tensor, *shape: int) -> Tensor:
    return output(shape, torch.float32, like.device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else address("lengths, scale", tensor)


def _where(tensor: Tensor) -> dict[str, Any]:
    """Device and stream of a launch; 0 and 0 in main memory, where tests run a host build of the kernels."""
    if not tensor.is_cuda:
        return {"device": 0, "stream": 0}
    stream = torch.cuda.current_stream(tensor.device)
    return {"device": tensor.device.index, "stream": stream.cuda_stream}
