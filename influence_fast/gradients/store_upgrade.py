"""Rewriting a store of an earlier version: the same numbers, with the checksums of the present one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from influence_fast._files import disk_errors, locked
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_format import MANIFEST, VERSION
from influence_fast.gradients.store_records import read_lines, read_manifest, read_state
from influence_fast.gradients.store_writer import StoreWriter


def upgrade_store(path: str | os.PathLike[str]) -> GradientStore | None:
    """Rewrite a store of version 1 as one of the present version, in its place; None where its build is unfinished.

    The new store is written beside the old one (``NAME.upgrading``), which must be whole, and then takes its name; killed at
    any moment it goes on when it is called again. Gradients keep every bit; an index of the store is to be built again.

    Raises:
        InputError: it is of the present version already.
        StoreError: there is no store, or it is damaged.
        InfluenceError: the disk is full; the old store is untouched.
    """
    folder = Path(os.path.abspath(path))
    beside, old = folder.with_name(f"{folder.name}.upgrading"), folder.with_name(f"{folder.name}.version-1")
    if not folder.exists() and (beside / MANIFEST).exists() and old.exists():
        # Killed between the two renames.
        return _swap(folder, beside, old)
    manifest = read_manifest(folder)
    if manifest["version"] == VERSION:
        if old.exists() and not beside.exists():
            with disk_errors(old):
                shutil.rmtree(old)
            return _finished(folder)
        raise InputError(f"{folder}: is of version {VERSION} already")
    store = GradientStore(folder, read_state(folder, verify=True, unfinished=True), verify=True)
    with disk_errors(folder), locked(folder / ".lock"):
        writer = StoreWriter.create(
            beside,
            layers=store.shapes,
            dims=store.dims,
            ids=store.ids,
            projection=manifest["projection"],
            identifiers={name: layer["matrices"] for name, layer in manifest["layers"].items()},
            model=manifest["model"],
            loss=manifest["loss"],
            dtype=manifest["dtype"],
            shard_rows=manifest["shard_rows"],
            settings=manifest.get("settings", {}),
            facts=manifest.get("facts"),
        )
        with writer:
            missing = set(writer.missing)
            for shard in store.shards:
                number, beyond = divmod(shard.first, manifest["shard_rows"])
                if beyond or shard.rows != len(writer.span(number)):
                    raise StoreError(f"{shard.path}: holds {shard.span}, which no shard of {folder} should")
                if number in missing:
                    writer.write_tensors(number, {name: shard.tensor(name) for name in shard.places})
    return _swap(folder, beside, old)


def _swap(folder: Path, beside: Path, old: Path) -> GradientStore | None:
    with disk_errors(folder):
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old)
    return _finished(folder)


def _finished(folder: Path) -> GradientStore | None:
    manifest: dict[str, Any] = read_manifest(folder)
    done = sum(line["rows"] for line in read_lines(folder, manifest))
    return GradientStore.open(folder) if done == manifest["rows"] else None
