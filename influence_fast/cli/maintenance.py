"""``verify``, ``upgrade``, ``delete``, ``compact`` and ``merge``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from influence_fast.cli.options import Command, example, json_option, names, print_document, say, verify_option
from influence_fast.errors import InputError, StoreError


@click.command(epilog=example("influence-fast verify store store.index partial"))
@click.argument("path", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
@click.pass_context
def verify(context: click.Context, path: tuple[Path, ...], as_json: bool) -> None:
    """Check every byte of stores, indexes and checkpoints; names file, layers and rows of what is damaged.

    A PATH is a store, an index, the folder of score --checkpoint, or a folder that holds any of them, such as that of an
    audit. Exit code 1 where something is damaged.
    """
    found = [(kind, place) for given in path for kind, place in _within(given)]
    document = [
        {"path": str(place), "kind": kind, "damage": list(map(str, _damage(kind, place)))} for kind, place in found
    ]

    def show() -> None:
        for entry in document:
            say(f"{entry['path']}: {entry['kind']}, {'damaged' if entry['damage'] else 'whole'}")
            for damage in entry["damage"]:
                say(f"  {damage}")

    print_document(document, as_json, show)
    context.exit(any(entry["damage"] for entry in document))


@click.command(epilog=example("influence-fast upgrade store"))
@click.argument("path", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def upgrade(path: tuple[Path, ...], as_json: bool) -> None:
    """Rewrite stores of version 1 as ones of the present version, in their place; the gradients keep every bit.

    An index of such a store is to be built again.
    """
    from influence_fast.gradients.store_upgrade import upgrade_store

    document: list[dict[str, Any]] = []
    for place in path:
        store = upgrade_store(place)
        document.append({"path": str(place), "rows": None if store is None else len(store)})
    print_document(document, as_json, lambda: say("\n".join(f"{entry['path']}: rewritten" for entry in document)))


@click.command(cls=Command, epilog=example("influence-fast delete store --ids 17,42"))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--ids", help="Ids of the rows, joined by commas.")
@click.option("--file", type=click.Path(path_type=Path), help="A file with one id a line.")
@json_option
def delete(store: Path, ids: str | None, file: Path | None, as_json: bool) -> None:
    """Delete rows of a store: no command sees them from now on. Their bytes are gone after compact."""
    from influence_fast.gradients.store import GradientStore

    if (ids is None) == (file is None):
        raise click.UsageError("Give --ids or --file.")
    if file is not None:
        wanted = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    else:
        wanted = names(ids) or []
    opened = GradientStore.open(store)
    count = opened.delete([int(name) for name in wanted if _number(name)] if opened.numbered else wanted)
    document = {"path": str(store), "deleted": count, "rows": len(opened)}
    print_document(document, as_json, lambda: say(f"{store}: {count} rows deleted, {len(opened)} are left"))


@click.command(epilog=example("influence-fast compact store"))
@click.argument("store", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def compact(store: tuple[Path, ...], as_json: bool) -> None:
    """Rewrite stores without the rows that were deleted, and what was appended as one; no byte of a deleted row is left.

    Bring an index of such a store up to date by influence-fast index --update.
    """
    from influence_fast.gradients.store import GradientStore

    document = []
    for place in store:
        opened = GradientStore.open(place)
        opened.compact()
        document.append({"path": str(place), "rows": len(opened)})
    print_document(
        document, as_json, lambda: say("\n".join(f"{entry['path']}: {entry['rows']} rows" for entry in document))
    )


@click.command(cls=Command, epilog=example("influence-fast merge monday tuesday --out week"))
@click.argument("store", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new store.")
@verify_option
@json_option
def merge(store: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write one store with the rows of several, which are of the same model, layers, projection and loss.

    Rows keep their ids; where all stores number theirs from 0, the rows are numbered anew.
    """
    from influence_fast.gradients.store import GradientStore
    from influence_fast.gradients.store_merge import merge_stores

    merged = merge_stores([GradientStore.open(place) for place in store], out)
    document = {"path": str(out), "rows": len(merged), "stores": [str(place) for place in store]}
    print_document(document, as_json, lambda: say(str(merged)))


def _number(name: str) -> bool:
    if not name.removeprefix("-").isdecimal():
        raise InputError(f"ids: the rows of this store are numbered, got {name!r}")
    return True


def _within(path: Path) -> Iterator[tuple[str, Path]]:
    """What there is to check in a folder, and in those below it."""
    kinds = {"manifest.json": "store", "index.json": "index", "partial.safetensors": "checkpoint"}
    if path.is_file() and path.name in kinds:
        path = path.parent
    found = []
    for folder, inner, files in os.walk(path):
        inner.sort()
        if "manifest.json" in files:
            # Segments are parts of their store.
            inner[:] = [name for name in inner if not name.startswith(("segment-", "compacted-"))]
        found += [(kinds[name], Path(folder)) for name in kinds if name in files]
    if not found:
        raise InputError(f"path: {path} holds no store, index or checkpoint")
    yield from found


def _damage(kind: str, path: Path) -> Iterator[StoreError]:
    from influence_fast.attribution import aggregation
    from influence_fast.gradients import store_reader
    from influence_fast.search import index_files

    yield from {"store": store_reader, "index": index_files, "checkpoint": aggregation}[kind].find_damage(path)
