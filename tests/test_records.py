"""Sealed documents, chained lines and the types of what is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from influence_fast import _records as records
from influence_fast.errors import StoreError

DOCUMENT = {"a": 1, "b": {"seal": "x", "c": ["\ud800", "é"]}, "last": None}


def test_every_byte_of_a_sealed_document_is_covered() -> None:
    raw = records.seal(DOCUMENT)
    assert records.unseal("f", raw) == DOCUMENT
    assert json.loads(raw)["b"] == DOCUMENT["b"]
    for at in range(len(raw)):
        for bit in (1, 32):
            changed = bytearray(raw)
            changed[at] ^= bit
            with pytest.raises(StoreError, match="f is damaged"):
                records.unseal("f", bytes(changed))
    for changed in (raw[:-1], raw + b"\n", b" " + raw, b"", raw[:40]):
        with pytest.raises(StoreError, match="f is damaged"):
            records.unseal("f", changed)


def chain(count: int) -> list[bytes]:
    lines, before = [], "start"
    for number in range(count):
        line, before = records.chained(before, {"n": number})
        lines.append(line)
    return lines


def test_lines_that_were_moved_doubled_changed_or_taken_out_are_seen() -> None:
    lines = chain(4)
    whole = records.unchain("f", b"".join(lines), "start")
    assert ([entry["n"] for entry in whole.entries], whole.torn, whole.damage) == ([0, 1, 2, 3], False, None)
    assert whole.last == records.last_seal(lines[-1], "start")
    assert records.last_seal(b"", "start") == "start"
    for broken in (
        [lines[0], lines[2], lines[1], lines[3]],
        [*lines[:2], lines[1], *lines[2:]],
        [lines[0], *lines[2:]],
        lines[1:],
        [lines[0], lines[1].replace(b"1", b"7", 1), *lines[2:]],
        [*lines, b"\n"],
    ):
        assert records.unchain("f", b"".join(broken), "start").damage is not None
    assert records.unchain("f", b"".join(lines), "another").damage == "f: line 1 does not follow the line before it"


def test_a_torn_last_line_is_dropped() -> None:
    lines = chain(3)
    for cut in range(1, len(lines[2])):
        found = records.unchain("f", b"".join(lines)[:-cut], "start")
        assert (len(found.entries), found.torn, found.damage) == (2, True, None), cut


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "is damaged"),
        (b'{"a": 1, "a": 2}', "a key stands there twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "is damaged"),
    ],
)
def test_json_that_is_no_document(raw: bytes, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        records.parse("f", raw)


class Layer(TypedDict):
    dim: records.Positive


class Document(TypedDict):
    count: Annotated[int, Field(ge=1, le=9)]
    name: records.Text
    sides: records.Pair
    layers: Annotated[dict[str, Layer], Field(min_length=1)]
    share: records.Number
    flag: bool
    kind: Annotated[Any, records.one_of("x", "y.")]
    maybe: NotRequired[records.Text | None]


SCHEMA = records.Schema(Document)
GOOD = {
    "count": 3, "name": "n", "sides": [1, 2], "layers": {"l": {"dim": 4}}, "share": 0.5, "flag": True, "kind": "y.",
    "more": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": True}, "f is damaged: count: expected a whole number, got True"),
        ({"count": 10}, "count: expected at most 9, got 10"),
        ({"count": 10**400}, "count: expected at most 9, got 1000.*[.]{3}$"),
        ({"count": 1.0}, "got 1.0"),
        ({"name": None}, "name: expected text, got None"),
        ({"name": 7}, "name: expected text, got 7"),
        ({"sides": [1]}, r"sides: expected .* at least 2 items .*, got \[1\]"),
        ({"sides": [1, "2"]}, r"sides\[1\]: expected a whole number, got '2'"),
        ({"sides": [1, -1]}, r"sides\[1\]: expected at least 0, got -1"),
        ({"layers": {}}, "layers: expected .* at least 1 item"),
        ({"layers": []}, "layers: expected an object"),
        ({"layers": {"l": {}}}, "it lacks layers.l.dim"),
        ({"layers": {"l": {"dim": "4"}}}, "layers.l.dim: expected a whole number, got '4'"),
        ({"share": "a"}, "share: expected a number"),
        ({"share": float("inf")}, "share: expected a finite number"),
        ({"flag": "no"}, "flag: expected true or false, got 'no'"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
        ({"kind": "yy"}, "kind: expected 'x' or 'y[.]', got 'yy'"),
        ({"kind": 2.0}, "kind: expected 'x' or 'y[.]', got 2.0"),
        ({"maybe": 3}, "maybe: expected text, got 3"),
    ],
)
def test_types_are_named_with_file_key_and_value(change: dict, message: str) -> None:
    SCHEMA.check("f", GOOD)
    SCHEMA.check("f", {**GOOD, "name": "\ud800", "share": 3, "maybe": None})
    with pytest.raises(StoreError, match=message):
        SCHEMA.check("f", {**GOOD, **change})
    with pytest.raises(StoreError, match="f is damaged: content: expected an object, got 3"):
        SCHEMA.check("f", 3)


def test_files_stay_inside_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "plain").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "near").symlink_to("plain")
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    assert records.inside(folder, "plain") == folder / "plain"
    assert records.inside(folder, "near") == folder / "near"
    for name in ("../secret", "/etc/hosts", "sub/../../secret", "..", "", "a\0b", ".hidden", "a/b"):
        with pytest.raises(StoreError, match="expected one inside this folder"):
            records.inside(folder, name)
    with pytest.raises(StoreError, match="leads out of its folder"):
        records.inside(folder, "link")
    for name in ("sub", "pipe"):
        with pytest.raises(StoreError, match="expected a file"):
            records.inside(folder, name)
