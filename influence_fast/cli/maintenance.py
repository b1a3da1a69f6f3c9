"""``verify`` and ``upgrade``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from influence_fast.cli.options import example, json_option, print_document, say
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
