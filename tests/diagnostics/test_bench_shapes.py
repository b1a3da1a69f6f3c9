"""Shapes of one's own for the benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from influence_fast import InputError
from influence_fast.diagnostics.bench_shapes import OuterShape, SketchShape, described, read_shapes


def test_shapes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    given = {
        "outer": {"a": {"n": 8, "t": 16, "i": 64, "o": 32}},
        "sketch": {"b": {"n": 1, "d": 9, "k": 2, "kind": "sjlt"}},
    }
    path.write_text(json.dumps(given))
    found = read_shapes(path)
    assert found == {"outer": {"a": OuterShape(8, 16, 64, 32)}, "sketch": {"b": SketchShape(1, 9, 2, "sjlt")}}
    assert described(found["sketch"]["b"]) == given["sketch"]["b"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "shapes: .*: expected a JSON object, got"),
        ({}, "holds no shape"),
        ({"outer": {}}, "holds no shape"),
        ({"matmul": {}}, "expected some of project_outer, .*, got 'matmul'"),
        ({"rank": {"a": {"m": 3}}}, "shapes: rank a: n is missing"),
        ({"rank": {"a": {"m": 3, "n": 4, "k": 1}}}, "expected fields m, n, got 'k'"),
        ({"rank": {"a": {"m": 0, "n": 4}}}, "m: expected a whole number from 1"),
        ({"rank": {"a": {"m": True, "n": 4}}}, "m: expected a whole number from 1"),
        ({"vote": {"a": {"m": 1, "n": 4}}}, "n: expected at least 5"),
        ({"sketch": {"a": {"n": 1, "d": 2, "k": 1, "kind": "fft"}}}, "kind: expected one of rademacher"),
    ],
)
def test_what_is_no_shape(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        read_shapes(path)
    with pytest.raises(InputError, match="expected a JSON file"):
        read_shapes(tmp_path / "none.json")
