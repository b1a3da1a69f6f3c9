"""Which rows of which stores an index is of: how ``index.json`` names them, and how they are found again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_reader import StoreReader
from influence_fast.search.stored_rows import Rows

_log = logging.getLogger("influence_fast")


def open_rows(
    folder: Path,
    document: Mapping[str, Any],
    store: GradientStore | Sequence[GradientStore] | None,
    verify: bool | None,
) -> tuple[Rows, list[int]]:
    """The rows that ``index.json`` names, and how many rows each store had when it was indexed.

    Raises:
        StoreError: a store is another than was indexed, or has not the layers that the index names.
        InputError: another number of stores than was indexed.
    """
    entries = document["stores"]
    given = [store] if isinstance(store, GradientStore) else list(store or [])
    if store is not None and len(given) != len(entries):
        raise InputError(f"store: the index is of {len(entries)} stores, got {len(given)}")
    found = given or [
        GradientStore.open(os.path.normpath(folder.resolve() / entry["path"]), verify) for entry in entries
    ]
    pairs, counts = [], []
    for entry, one in zip(entries, found, strict=True):
        whole = one.with_deleted
        written = entry.get("written", len(whole))
        if whole.digest_of(written) != entry["digest"]:
            raise StoreError(
                f"{folder}: {one.path} is another store than was indexed; update the index or build it again"
            )
        begin, end = entry["rows"]
        if not begin < end <= written:
            raise StoreError(f"{folder}: damaged index, rows {begin} to {end} of the {written} of {one.path}")
        if end == written < len(whole):
            _log.warning("%s: %d rows were appended since it was indexed", one.path, len(whole) - written)
        pairs.append((one, range(begin, end)))
        counts.append(written)
    layers, dims = document["layers"], document["dims"]
    if not pairs or not layers or any({name: one.dims.get(name) for name in layers} != dims for one in found):
        raise StoreError(f"{folder}: damaged index, its layers are not those of its stores")
    for key in ("model", "projection"):
        if any(one.meta[key] != document[key] for one in found):
            raise StoreError(f"{folder}: damaged index, its {key} is not that of its stores")
    return Rows(pairs, layers), counts


def store_entries(rows: Rows, written: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """What ``index.json`` in a folder says of the stores."""
    return [
        {
            "path": os.path.relpath(store.path.resolve(), folder),
            "digest": store.digest_of(count),
            "rows": [part.start, part.stop],
            "written": count,
        }
        for (store, part), count in zip(rows.stores, written, strict=True)
    ]


def digest_of_rows(rows: Rows, written: Sequence[int]) -> str:
    """Tells the rows that the index finds now from others."""
    digest = hashlib.sha256()
    for (store, part), count in zip(rows.stores, written, strict=True):
        digest.update(f"{store.digest_of(count)} {part.start} {part.stop}\n".encode())
    if rows.live is not None:
        digest.update(rows.live.astype("<i8").data)
    return digest.hexdigest()


def row_names(rows: Rows) -> Sequence[int | str]:
    """Names of the rows that are not deleted, in the order of the stores; numbers go on from store to store."""
    stores, live = rows.stores, rows.live
    names: Sequence[int | str]
    if len(stores) == 1:
        names = stores[0][0].ids[stores[0][1].start : stores[0][1].stop]
    elif _by_rows(rows):
        names = range(rows.count)
    else:
        names = [name for store, part in stores for name in store.ids[part.start : part.stop]]
    return names if live is None else [names[row] for row in live.tolist()]


def row_name(rows: Rows, row: int) -> int | str:
    """``row_names(rows)[row]``, without reading the others."""
    if rows.live is not None:
        row = int(rows.live[row])
    return row if len(rows.stores) > 1 and _by_rows(rows) else rows.id_of(row)


def first_number(rows: Rows) -> int | None:
    """What is added to a row for its name, where names are numbers without a gap; nothing is read for it."""
    if rows.live is not None or not _by_rows(rows):
        return None
    names = row_names(rows)
    return names.start if isinstance(names, range) else None


def _by_rows(rows: Rows) -> bool:
    return all(isinstance(store.ids, range) for store, _ in rows.stores)


def follow(rows: Rows, written: Sequence[int], store: StoreReader) -> tuple[Rows, int] | None:
    """The rows with a store of theirs as it is now, and which one that is; None where it was compacted.

    Raises:
        InputError: the store is none of them, or has changed in a way that an index of several cannot follow.
    """
    given = rows.given
    own = [i for i, (other, _) in enumerate(given) if other.path.resolve() == store.path.resolve()]
    if len(given) > 1 and not own:
        raise InputError(f"store: {store.path} is none of the {len(given)} stores of the index")
    place = own[0] if own else 0
    (was, covered), now = given[place], store.with_deleted
    known = written[place]
    if now.digest_of(known) != was.with_deleted.digest_of(known):
        if len(given) > 1 or covered != range(known):
            raise InputError("store: was compacted, and the index is of a part of it or of others too; build it again")
        return None
    if covered.stop == known:
        covered = range(covered.start, len(now))
    followed = Rows([*given[:place], (store, covered), *given[place + 1 :]], rows.layers)
    if followed.count > rows.count and place < len(given) - 1:
        raise InputError(f"store: only the last store of an index can grow, {given[-1][0].path}; build it again")
    return followed, place


def same_rows(before: np.ndarray | None, now: np.ndarray | None, count: int) -> bool:
    """Whether of the first ``count`` rows the same are left."""
    whole = np.arange(count)
    mine = whole if before is None else before
    left = whole if now is None else now[: np.searchsorted(now, count)]
    return np.array_equal(mine, left)


def as_written(store: StoreReader, rows: range) -> range:
    """A range of rows as the shards number them, deleted rows among them."""
    if store.live is None:
        return rows
    whole = rows.start == 0 and rows.stop == len(store)
    return (
        range(len(store.with_deleted))
        if whole
        else range(int(store.live[rows.start]), int(store.live[rows.stop - 1]) + 1)
    )
