"""Matrices of Gaussian sides, kept between calls: each entry costs a logarithm and a cosine.

All that is kept fits ``INFLUENCE_FAST_MATRIX_BYTES`` (1 GiB by default); the least recently used is dropped first.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.ops.arguments import Side
from influence_fast.ops.cpu.native import address_of, implicit_side, library, new

# The last used at the end.
_kept: OrderedDict[tuple[str, Side], Tensor] = OrderedDict()
_lock = Lock()


def _budget() -> int:
    text = os.environ.get("INFLUENCE_FAST_MATRIX_BYTES", "")
    if text and not text.isdecimal():
        raise InputError(f"INFLUENCE_FAST_MATRIX_BYTES: expected a number of bytes, got {text!r}")
    return int(text or 1 << 30)


def gaussian(side: Side) -> Tensor:
    """The unscaled matrix of a Gaussian side, as rows."""
    kept = _keep("rows", side, 4 * side.k * side.features, lambda: _filled(side))
    return _filled(side) if kept is None else kept


def panels(side: Side) -> Tensor | None:
    """Its entries as the kernel of sketch reads them; None where they do not fit, and are made anew a block at a time."""
    numbers = library.panel_numbers(side.k, side.features)

    def make() -> Tensor:
        panels = new(numbers)
        library.fill_panels(implicit_side(side), address_of(panels), torch.get_num_threads())
        return panels

    # The layout follows from the width of a vector.
    return _keep(library.isa(), side, 4 * numbers, make)


def _filled(side: Side) -> Tensor:
    matrix = new(side.k, side.features)
    fill(matrix, side, 0, 0)
    return matrix


def fill(out: Tensor, side: Side, row: int, column: int) -> None:
    """Unscaled entries from ``(row, column)`` on."""
    if out.numel():
        library.random_matrix(
            side=implicit_side(side),
            row=row,
            rows=out.shape[0],
            column=column,
            columns=out.shape[1],
            out=address_of(out),
            threads=torch.get_num_threads(),
        )


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
