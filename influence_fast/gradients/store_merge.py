"""One store of the rows of several: their numbers keep every bit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.differences import difference, recorded_identity
from influence_fast.gradients.shard import Shard
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_writer import StoreWriter, copy_rows


def merge_stores(stores: Sequence[GradientStore], path: str | os.PathLike[str], resume: bool = True) -> GradientStore:
    """Write a store with the rows of ``stores``, one behind the other, but for those that were deleted.

    Rows keep their ids; where all stores number theirs from 0, the rows are numbered anew. Killed at any moment it goes on
    when it is called again with the same stores.

    Args:
        stores: of the same model, layers, projection, loss and dtype. They stay as they are.
        path: a new folder.
        resume: whether to go on with a merge that was begun there.

    Raises:
        InputError: no store, or rows of two that have the same id; ``path`` holds something else.
        StoreError: stores that differ; names the first thing. A store that is damaged.
        InfluenceError: the disk is full.
    """
    if not stores:
        raise InputError("stores: expected at least one, got none")
    first = stores[0]
    for other in stores[1:]:
        _check_same(first, other)
    target = Path(path).resolve()
    if any(store.path.resolve() == target for store in stores):
        raise InputError(f"path: {target} is one of the stores; choose a new folder")
    told = first._described()
    told["settings"]["data"] = hashlib.sha256("".join(store.digest for store in stores).encode()).hexdigest()
    told["settings"]["built"] = sum(len(store) for store in stores)
    told["facts"] = {key: value for key, value in told["facts"].items() if key not in ("probe", "verified")}
    told["ids"] = _joined_ids(stores)
    with StoreWriter.create(path, **told, resume=resume) as writer:
        copy_rows(writer, *_joined_shards(stores))
    return GradientStore.open(path)


def _joined_shards(stores: Sequence[GradientStore]) -> tuple[list[Shard], np.ndarray, np.ndarray]:
    """The shards of all stores, the first row of each, and the rows that are not deleted."""
    shards: list[Shard] = []
    firsts, live, at = [0], [], 0
    for store in stores:
        whole = store.with_deleted
        shards += whole.shards
        firsts += (at + whole.firsts[1:]).tolist()
        live.append(at + (np.arange(len(whole)) if store.live is None else store.live))
        at += len(whole)
    return shards, np.array(firsts, np.int64), np.concatenate(live)


def _check_same(first: GradientStore, other: GradientStore) -> None:
    """StoreError unless rows of both may stand in one store."""
    for key in ("model", "projection", "loss", "dtype", "factors", "layers"):
        if first.meta.get(key) != other.meta.get(key):
            shown = "" if key == "layers" else f" ({other.meta.get(key)}, {first.meta.get(key)})"
            raise StoreError(f"{other.path}: has another {key} than {first.path}{shown}")
    taken = [store.meta.get("settings", {}) for store in (first, other)]
    for key in ("truncate", "bias", "precision"):
        if taken[0].get(key) != taken[1].get(key):
            raise StoreError(f"{other.path}: was built with another {key} than {first.path}")
    found = difference(recorded_identity(first.meta), recorded_identity(other.meta))
    if found is not None:
        raise StoreError(f"{other.path}: was made by another computation than {first.path} ({found})")
    if first.columns != other.columns:
        raise StoreError(
            f"{other.path}: has the columns {', '.join(other.columns)}, {first.path} {', '.join(first.columns)}"
        )


def _joined_ids(stores: Sequence[GradientStore]) -> Sequence[int | str]:
    if all(isinstance(store.ids, range) for store in stores):
        return range(sum(len(store) for store in stores))
    seen: set[int | str] = set()
    names: list[int | str] = []
    for store in stores:
        for name in store.ids:
            if name in seen:
                raise InputError(f"stores: rows of two have the id {name!r}; expected each id once")
            seen.add(name)
            names.append(name)
    return names
