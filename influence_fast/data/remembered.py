"""What a store's rows were made of: where the data are, how they were read, and each row's text and label for people."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence_fast._files import atomic_write
from influence_fast._json import check_types, read_object
from influence_fast.data.forms import TOKENISED, Form, recognise
from influence_fast.data.labels import is_missing
from influence_fast.data.loading import Table, digests, read_table
from influence_fast.data.settings import OPTIONS, DataSettings
from influence_fast.errors import InputError

SOURCE = "source.json"
"""File in a store's folder: the data's place as seen from there, their digests, and how they were read."""


def remember(folder: str | Path, source: Any, settings: DataSettings, task: str) -> None:
    """Note beside a store what its rows were made of, unless they were blocks of texts or in memory.

    What is noted once stays: a store that was there already has the rows that it was built of.
    """
    parts = [source] if isinstance(source, str | os.PathLike) else source
    in_files = isinstance(parts, list | tuple) and all(isinstance(part, str | os.PathLike) for part in parts)
    path = Path(folder) / SOURCE
    if not in_files or settings.block_size is not None or path.exists():
        return
    places = [os.path.relpath(part, folder) if Path(part).exists() else str(part) for part in parts]
    options = settings.options()
    if template := options.get("chat_template"):
        options["chat_template"] = os.path.relpath(template, folder)
    document = {"data": places, "task": task, "options": options}
    found = digests("data", list(parts), settings.split)
    document["sha256"] = list(found.values())
    atomic_write(path, json.dumps(document, indent=1) + "\n")


class Remembered:
    """What :func:`remember` noted of a store.

    Attributes:
        data: where the data are, as seen from here.
        settings: how they were read.
        task: what the rows are samples of.
        sha256: of each file, in their order; empty for data of a hub.

    Raises:
        InputError: the note is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        document = read_object(Path(folder) / SOURCE, "store")
        parts: dict[str, Any] = {"data": list[str], "task": str, "options": dict, "sha256": list[str]}
        for name in parts:
            if name not in document:
                raise InputError(f"store: {Path(folder) / SOURCE} lacks {name!r}")
        check_types(document, parts)
        options = {name: value for name, value in document["options"].items() if name in OPTIONS}
        if template := options.get("chat_template"):
            options["chat_template"] = _from_here(folder, template)
        self.data = [_from_here(folder, place) for place in document["data"]]
        self.settings = DataSettings.from_options(options)
        self.task: str = document["task"]
        self.sha256: list[str] = document["sha256"]


def remembered(folder: str | Path) -> Remembered | None:
    """The note in a store's folder; None without one, and of a store whose rows have changed since."""
    place = Path(folder)
    if not (place / SOURCE).exists() or "segments" in read_object(place / "manifest.json", "store"):
        return None
    return Remembered(folder)


def shown_rows(source: Any, known: Remembered | None) -> dict[str, tuple[str, str]]:
    """Text and label of each row of the data, by the row's id as text.

    Raises:
        InputError: data that cannot be read, or are not those that ``known`` was noted of.
    """
    settings = known.settings if known else DataSettings()
    if known and list(digests("data", source, settings.split).values()) != known.sha256:
        raise InputError(f"data: {source} is not what the store was built of; its rows may be others")
    table = read_table("data", source, settings.split, settings.limit, settings.skip_bad)
    form = _form(table, settings, known.task if known else None)
    named = "id" in table.columns
    out = {}
    for number, row in enumerate(table.rows):
        name = row.get("id") if named else number
        if form.name == TOKENISED:
            inputs, targets = ["text"], ["labels"] if isinstance(row.get("labels"), int | str) else []
        else:
            inputs, targets = [*([form.prompt] if form.prompt else []), *form.inputs], list(form.targets)
        out[str(name)] = (_cells(row, inputs), _cells(row, targets))
    return out


def _form(table: Table, settings: DataSettings, task: str | None) -> Form:
    if task is not None:
        return recognise("data", table.columns, table.rows[0], settings, task)
    # Without a note of the task: a text with a label is what has both, and anything else is for a language model.
    try:
        return recognise("data", table.columns, table.rows[0], settings, "classification")
    except InputError:
        return recognise("data", table.columns, table.rows[0], settings, "causal-lm")


def _cells(row: Mapping[str, Any], columns: list[str]) -> str:
    return " | ".join(_as_text(row[name]) for name in columns if not is_missing(row.get(name)))


def _as_text(value: Any) -> str:
    """A conversation as a line a turn, anything else as it is."""
    if not isinstance(value, list):
        return str(value)
    if not all(isinstance(part, Mapping) for part in value):
        return " ".join(map(str, value))
    turns = [(part.get("role", part.get("from")), part.get("content", part.get("value"))) for part in value]
    return "\n".join(f"{role}: {content}" for role, content in turns)


def _from_here(folder: str | Path, place: str) -> str:
    near = os.path.normpath(os.path.join(folder, place))
    return near if os.path.exists(near) else place
