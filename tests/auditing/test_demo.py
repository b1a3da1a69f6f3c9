"""The demo finds what it flipped."""

from __future__ import annotations

import json
from pathlib import Path

from audits import run

import influence_fast as inf

IDENTITY = inf.Projection("identity")


def test_demo(tmp_path: Path) -> None:
    code, out, err = run("demo", "--out", tmp_path / "demo", "--samples", 60, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["facts"]["samples"] == 60
    assert {row["group"] for row in document["evaluation"]} >= {"", "all", "embedding", "attention q1", "mlp", "head"}
    assert (tmp_path / "demo" / "report.html").exists()
