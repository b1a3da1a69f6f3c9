"""bergson's random matrices on our kernels, and its gradient stores, read and written without bergson.

The matrices have the same bits for rademacher, the same numbers to their last bits for normal; so have those of a
:class:`~influence_fast.Projection` of ``k x k``, for layers of one name.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from influence_fast.compat.bergson_store import BergsonStore, export_store, import_store, open_store
from influence_fast.ops import Side

__all__ = ["BergsonStore", "export_store", "import_store", "open_store", "random_matrix"]

DISTRIBUTION, VERSIONS = "bergson", ("2.5.1",)
# Whose loaded modules may hold a name, and which modules define it.
HOLDERS = ("bergson",)
MODULES = ("bergson.collector.projection_matrix", "bergson.collector.collector")
REPLACED = (("bergson.collector.projection_matrix", "random_matrix"),)
_KINDS: dict[str, Literal["gaussian", "rademacher"]] = {"normal": "gaussian", "rademacher": "rademacher"}


def random_matrix(
    identifier: str,
    m: int,
    n: int,
    device: torch.device | str,
    projection_type: Literal["normal", "rademacher"],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """An ``(m, n)`` matrix of +-1 or standard normal entries that follow from ``identifier`` alone, not scaled.

    Raises:
        ValueError: an unknown type, or 2^31 rows or columns and more.
    """
    if projection_type not in _KINDS:
        raise ValueError(f"Unknown projection type: {projection_type}")
    if max(m, n) >= 1 << 31:
        raise ValueError(f"Projection matrices are limited to 2^31 rows and columns, got [{m}, {n}].")
    side = Side(_KINDS[projection_type], identifier, m, n, scale=1.0)
    return side.matrix(torch.float32, device).to(dtype)
