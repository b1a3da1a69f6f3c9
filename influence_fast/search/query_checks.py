"""What a search is asked with, checked against what the index holds: queries, layers, rows to search among, new stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.attribution.gradient_source import Gradients, GradientSource, chosen_layers
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.differences import other_space, recorded_identity
from influence_fast.gradients.store_reader import StoreReader


def layer_weights(known: list[str], layers: Sequence[str] | Mapping[str, float] | None) -> dict[str, float]:
    """The weight of each layer that is searched by: 1 where none is given, and none of weight 0."""
    if not isinstance(layers, Mapping):
        return dict.fromkeys(chosen_layers(known, layers), 1.0)
    names = chosen_layers(known, list(layers))
    weights = {name: float(layers[name]) for name in names}
    if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
        raise InputError(f"layers: expected weights that are not negative, one of them positive, got {layers!r}")
    return {name: weight for name, weight in weights.items() if weight}


def row_mask(n: int, only: Any, names: Callable[[], Sequence[int | str]]) -> Tensor:
    """Rows to search among, given by a mask or by ids: boolean ``(n,)``."""
    if isinstance(only, Tensor | np.ndarray) or (len(only) and isinstance(only[0], bool)):
        given = torch.as_tensor(only)
        if given.dtype == torch.bool:
            if given.shape != (n,):
                raise InputError(f"only: expected a mask of the {n} rows, got shape {tuple(given.shape)}")
            return given
        only = given.tolist()
    ids = names()
    place = ids if isinstance(ids, range) else {name: row for row, name in enumerate(ids)}
    mask = torch.zeros(n, dtype=torch.bool)
    for name in only:
        if name not in place:
            raise InputError(f"only: no row has the id {name!r}")
        mask[place.index(name) if isinstance(place, range) else place[name]] = True
    return mask


def query_values(
    queries: Gradients, layers: Sequence[str], meta: Mapping[str, Any], identity: dict[str, Any]
) -> Tensor:
    """Gradients of the queries, layers side by side: float32 ``(m, dims of the layers)``.

    Raises:
        StoreError: other layers, dimensions, model, projection or computation than the index has.
        InputError: NaN or infinity.
    """
    found = GradientSource("queries", queries)
    for name in layers:
        if name not in found.layers:
            raise StoreError(f"queries: lack layer {name!r} of the index; they have {', '.join(found.layers)}")
        if found.dim(name) != meta["dims"][name]:
            raise StoreError(
                f"queries: layer {name!r} has {found.dim(name)} numbers per row, the index {meta['dims'][name]}"
            )
    if found.store is not None:
        _check_space("queries", found.store, meta, identity)
    values = torch.cat([found.read(name) for name in layers], 1)
    if not values.isfinite().all():
        row = int(values.isfinite().all(1).logical_not().nonzero()[0])
        raise InputError(f"queries: row {row} has NaN or infinity")
    return values


def check_store(store: StoreReader, meta: Mapping[str, Any], identity: dict[str, Any]) -> None:
    """StoreError unless the rows of a store can stand beside those of the index."""
    _check_space("store", store, meta, identity)
    for name in meta["layers"]:
        if store.dims.get(name) != meta["dims"][name]:
            raise StoreError(
                f"store: layer {name!r} has {store.dims.get(name)} numbers per row, the index {meta['dims'][name]}"
            )


def _check_space(what: str, store: StoreReader, meta: Mapping[str, Any], identity: dict[str, Any]) -> None:
    for key in ("model", "projection"):
        if store.meta[key] != meta[key]:
            raise StoreError(f"{what}: another {key} than the index ({store.meta[key]}, {meta[key]})")
    if other := other_space(identity, recorded_identity(store.meta)):
        raise StoreError(f"{what}: made by another computation than the index ({other})")
