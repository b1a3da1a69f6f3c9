"""Factors of rows and matrices of queries as 8-bit codes, with bounds on what the codes leave out (``exact``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import influence_fast_cpu as _native
except ImportError:
    _native = None


def factor_codes(
    left: Tensor, right: Tensor, codes: np.ndarray, offset: int, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Put codes and scales of factors ``(n, c, out)`` and ``(n, c, in)`` in their places; ``error`` and ``norm`` by row.

    ``codes`` uint8 ``(n, stride)`` takes them from byte ``offset`` of a row on, ``scale`` float32 ``(c.., n)``.
    """
    count = len(left)
    error, norm = np.zeros(count), np.zeros(count)
    for c in range(left.shape[1]):
        found = []
        for side in (left, right):
            values = side[:, c].contiguous()
            step, rest, length = (np.empty(count, np.float32) for _ in range(3))
            _native.quantise(
                rows=_native.Matrix(values.data_ptr(), "float32", values.shape, values.stride()),
                codes=codes.ctypes.data + offset,
                stride=codes.strides[0],
                scale=step.ctypes.data,
                error=rest.ctypes.data,
                norm=length.ctypes.data,
                threads=torch.get_num_threads(),
            )
            offset += -(-values.shape[1] // 4) * 4
            found.append((step, rest.astype(np.float64), length.astype(np.float64)))
        (u, u_rest, u_norm), (v, v_rest, v_norm) = found
        with np.errstate(over="ignore", under="ignore"):
            product = u * v
        # What a scale cannot hold is all rest.
        held = (product > 1e-30) & np.isfinite(product)
        scale[c] = np.where(held, product, 0)
        error += np.where(held, u_rest * v_norm + (u_norm + u_rest) * v_rest, u_norm * v_norm)
        norm += u_norm * v_norm
    # Upwards: a bound stays one.
    with np.errstate(over="ignore", under="ignore"):
        above = [((bound * (1 + 1e-6)) + np.where(norm > 0, 1e-37, 0)).astype(np.float32) for bound in (error, norm)]
    return above[0], above[1]


# Of the largest singular value of a query's matrix, what may be left out of its terms.
_LEFT_OUT = 0.004


def query_terms(queries: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """What stands for queries ``(m, out, in)`` of each layer that is factors: arguments ``term_*`` of ``exact_search``.

    A query's matrix is the sum of as many terms ``a b^T`` as have singular values above ``_LEFT_OUT`` of its largest, both
    rounded to 8 bits, and a rest, whose norm between two vectors is bounded by its Schatten norm of order 8.
    """
    layers, m = len(queries), len(queries[0])
    counts = np.empty((layers, m), np.int64)
    bounds = np.empty((3, layers, m))
    codes: list[Any] = [None] * layers
    scales, shifts = list(codes), list(codes)
    # Layers of one shape together: what a call costs by itself is most of what one query takes.
    for shape in dict.fromkeys(given.shape for given in queries):
        places = [place for place, given in enumerate(queries) if given.shape == shape]
        terms = _terms(torch.cat([queries[place] for place in places]))
        counts[places] = terms.counts.view(-1, m)
        bounds[:, places] = terms.bounds.view(3, -1, m)
        ends = counts[places].sum(1).cumsum()[:-1]
        for found, own in ((codes, terms.codes), (scales, terms.scale), (shifts, terms.shift)):
            for place, part in zip(places, np.split(own.numpy(), ends), strict=True):
                found[place] = part
    width = np.array([part.shape[1] for part in codes])
    size = (counts * width[:, None]).ravel()
    return {
        "term_first": np.concatenate([[0], counts.ravel().cumsum()]),
        "term_begin": size.cumsum() - size,
        "term_codes": np.concatenate([part.ravel() for part in codes]),
        "term_scale": np.concatenate(scales),
        "term_shift": np.concatenate(shifts).ravel(),
        "term_bounds": bounds.ravel(),
    }


@dataclass(frozen=True)
class _Terms:
    """Of matrices of one shape: terms of each, those of one behind those of another, and what they leave out."""

    counts: Tensor
    codes: Tensor
    scale: Tensor
    shift: Tensor
    bounds: Tensor


def _terms(queries: Tensor) -> _Terms:
    whole = queries.double()
    # Of length 1 at most, so that no power of it is beyond float64.
    largest = whole.abs().amax((1, 2), keepdim=True)
    matrix = torch.where(largest > 0, whole / largest, 0)
    flip = whole.shape[1] > whole.shape[2]
    if flip:
        matrix = matrix.mT
    # Any vectors would do, for the rest is measured; those of the smaller side's products are found fastest.
    squares, left = torch.linalg.eigh(matrix @ matrix.mT)
    values = squares.flip(1).clamp_min(0).sqrt()
    wanted = (values > _LEFT_OUT * values[:, :1]).sum(1)
    most = max(int(wanted.max()), 1)
    left = left.flip(2)[:, :, :most].mT
    rounded = [_rounded(side) for side in (left, left @ matrix)]
    kept = torch.arange(most) < wanted[:, None]
    near = [torch.where(kept, step, 0)[:, :, None] * code for step, code in rounded]
    approximated = near[0].mT @ near[1]
    summed = (near[0].norm(dim=2) * near[1].norm(dim=2)).sum(1)
    bounds = torch.stack([_schatten(approximated), _schatten(matrix - approximated), summed]) * largest[:, 0, 0]
    first, second = (rounded[1], rounded[0]) if flip else rounded
    scale = first[0] * second[0] * largest[:, :, 0]
    pair = [torch.nn.functional.pad(side[1], (0, -side[1].shape[2] % 64))[kept] for side in (first, second)]
    shift = 128 * torch.stack([side.sum(1) for side in pair], 1)
    return _Terms(wanted, torch.cat(pair, 1).to(torch.int8), scale[kept], shift.int(), bounds)


def _rounded(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """A step and whole numbers up to 127 of each vector ``(m, r, n)``."""
    step = vectors.abs().amax(2) / 127
    return step, torch.where(step[:, :, None] > 0, vectors / step[:, :, None], 0).round()


def _schatten(matrices: Tensor) -> Tensor:
    """At least the largest singular value of each matrix: the eighth root of the sum of eighth powers of all."""
    gram = matrices @ matrices.mT if matrices.shape[1] <= matrices.shape[2] else matrices.mT @ matrices
    return (gram @ gram).square().sum((1, 2)).pow(1 / 8) * (1 + 1e-9)
