"""Changes to a store that is there: rows deleted, a segment added, everything replaced by a copy.

Each is written aside, and is there once ``manifest.json`` names it, which is replaced in one step. So a reader sees the
store as it was or as it is, whatever stops the process. What no manifest names is removed by the next change. The
caller holds the store's lock.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast import _records as records
from influence_fast._blocks import PlainFile
from influence_fast._files import atomic_write, remove_leftovers
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients import row_ids
from influence_fast.gradients.store_format import JOURNAL, MANIFEST
from influence_fast.gradients.store_records import (
    SEGMENT,
    TOMBSTONES,
    State,
    fingerprint,
    read_manifest,
    tombstone_bytes,
)

_OWN = re.compile(rf"shard-\d+\.safetensors|{re.escape(JOURNAL)}|{re.escape(row_ids.FILE)}")


def delete_rows(
    folder: Path, state: State, ids: Iterable[int | str], files: Sequence[PlainFile | None]
) -> tuple[int, dict[str, Any]]:
    """Leave the rows of some ids out; how many they are, and the new manifest.

    Raises:
        InputError: an id that no row has or had, or no row would be left.
        StoreError: a store of version 1.
    """
    check_version(folder, state.manifest)
    wanted = set(ids)
    written = State(state.manifest, state.parts, None)
    found, dead = set(), []
    for row, name in enumerate(written.ids(files)):
        if name in wanted:
            found.add(name)
            dead.append(row)
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"ids: no row of {folder} has the id {min(missing, key=repr)!r}; nothing was deleted")
    before = np.arange(state.written) if state.live is None else state.live
    live = before[~np.isin(before, np.array(dead, np.int64))]
    if not len(live):
        raise InputError(f"ids: no row of {folder} would be left; remove the folder instead")
    if len(live) == len(before):
        return 0, state.manifest
    data, about = tombstone_bytes(live, state.written)
    last = state.manifest.get("tombstones", {}).get("file", "deleted-00000.bin")
    file = f"deleted-{int(last[8:-4]) + 1:05d}.bin"
    atomic_write(folder / file, data)
    manifest = {**state.manifest, "segments": _segments(state.manifest), "next": state.manifest.get("next", 1)}
    return len(before) - len(live), _named(folder, {**manifest, "tombstones": {"file": file, **about}})


def add_segment(folder: Path, name: str) -> dict[str, Any]:
    """Name a finished segment, whose rows follow those that are there; the new manifest."""
    manifest = read_manifest(folder)
    segments = [*_segments(manifest), _segment(folder, name)]
    return _named(folder, {**manifest, "segments": segments, "next": manifest.get("next", 1) + 1})


def drop_other(folder: Path, data: str) -> bool:
    """Remove what is left of a segment or copy that was begun of other rows; whether there was one."""
    if not (folder / MANIFEST).exists():
        return False
    try:
        same = read_manifest(folder)["settings"].get("data") == data
    except StoreError:
        same = False
    if not same:
        _remove(folder)
    return not same


def _remove(folder: Path) -> None:
    # The manifest first: a folder without one is nobody's store.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def replace_by(folder: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Name a finished copy in place of all that is there; the new manifest."""
    return _named(
        folder,
        {**read_manifest(folder / name), "segments": [_segment(folder, name)], "next": manifest.get("next", 1) + 1},
    )


def check_version(folder: Path, manifest: Mapping[str, Any]) -> None:
    """StoreError where a store cannot be changed."""
    if manifest["version"] == 1:
        raise StoreError(f"{folder}: a store of version 1 cannot be changed; rewrite it by influence-fast upgrade")


def clear(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove what no manifest names: what a change replaced, and what is left of one that was killed.

    A segment or copy that may still be finished, that of the number which is next, stays.
    """
    check_version(folder, manifest)
    remove_leftovers(folder)
    kept = {entry["folder"] for entry in _segments(manifest)}
    kept |= {f"{kind}-{manifest.get('next', 1):05d}" for kind in ("segment", "compacted")}
    tombstones = manifest.get("tombstones", {}).get("file")
    for path in folder.iterdir():
        if path.name in kept or path.name == tombstones or path.is_symlink():
            continue
        if re.fullmatch(SEGMENT, path.name):
            _remove(path)
        elif re.fullmatch(TOMBSTONES, path.name) or ("" not in kept and _OWN.fullmatch(path.name)):
            path.unlink()


def _segments(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    own = {"folder": "", "rows": manifest["rows"], "settings": fingerprint(manifest)}
    return list(manifest.get("segments") or [own])


def _segment(folder: Path, name: str) -> dict[str, Any]:
    manifest = read_manifest(folder / name)
    return {"folder": name, "rows": manifest["rows"], "settings": fingerprint(manifest)}


def _named(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    manifest = {
        **manifest,
        "requires": [name for name in ("block_scales", "factors", "segments", "tombstones") if name in manifest],
    }
    atomic_write(folder / MANIFEST, records.seal(manifest))
    return manifest
