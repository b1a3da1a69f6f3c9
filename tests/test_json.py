"""JSON of other hands: one sentence that names the file, the key, what came and what was expected."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence_fast import InputError
from influence_fast._json import check_types, fits, in_words, read_object


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("[1]", "expected a JSON object, got a list"),
        ("null", "expected a JSON object, got null"),
        ("3", "expected a JSON object, got a number"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        ("9" * 5000, "no valid JSON"),
    ],
)
def test_what_is_no_object(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"config: cannot read .*a.json .{reason}"):
        read_object(path, "config")
    path.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InputError, match="config: cannot read"):
        read_object(path, "config")
    with pytest.raises(InputError, match="No such file"):
        read_object(tmp_path / "none", "config")
    with pytest.raises(InputError, match="Is a directory"):
        read_object(tmp_path, "config")


def test_an_object_in_any_unicode_encoding(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a").write_bytes('{"\u00e9": 1}'.encode(encoding))
        assert read_object(tmp_path / "a", "config") == {"\u00e9": 1}


HINTS = {
    "flag": bool,
    "count": int,
    "share": float | None,
    "name": str,
    "names": Sequence[str] | None,
    "kind": Literal["a", 1],
    "map": Mapping[str, int],
    "any": Any,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flag", "no", "flag: expected true or false, got 'no'"),
        ("flag", 1, "flag: expected true or false, got 1"),
        ("count", True, "count: expected a whole number, got True"),
        ("count", 1.5, "count: expected a whole number, got 1.5"),
        ("share", float("nan"), "share: expected a number or null, got nan"),
        ("share", "1", "share: expected a number or null, got '1'"),
        ("name", None, "name: expected a text, got None"),
        ("names", "abc", "names: expected a list of texts or null, got 'abc'"),
        ("names", ["a", 1], r"names: expected a list of texts or null, got \['a', 1\]"),
        ("kind", True, "kind: expected one of 'a', 1, got True"),
        ("map", {"a": "b"}, "map: expected an object, got {'a': 'b'}"),
    ],
)
def test_types(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        check_types({name: value}, HINTS)


def test_what_is_allowed() -> None:
    check_types(
        {"flag": True, "count": np.int64(3), "share": 1, "name": "", "names": ("a",), "kind": 1, "map": {}}, HINTS
    )
    check_types({"share": None, "names": [], "any": object(), "unknown": object()}, HINTS)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_any_value_is_said_in_words(value: Any) -> None:
    for hint in HINTS.values():
        assert isinstance(fits(value, hint), bool)
        assert in_words(hint)
        assert fits(json.loads(json.dumps(value)), hint) == fits(value, hint) or value != value
