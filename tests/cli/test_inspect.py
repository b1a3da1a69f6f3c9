"""``influence-fast inspect``."""

from __future__ import annotations

import json
from pathlib import Path

from audits import run, sentences, write_rows


def test_rows_counts_and_problems(folder: Path, tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "a.jsonl", [*sentences(6, 1), {"text": "w1 " * 50, "label": 0}, {"text": None, "label": 1}]
    )
    code, out, err = run("inspect", data, "--model", folder / "model")
    assert code == 0, err
    assert "recognised: text and label: 'text', targets in 'label' (task classification)" in out
    assert out.count("« → ") == 3
    assert "row 0, " in out
    assert "(a.jsonl, line 1)" in out
    assert "row 6 (a.jsonl, line 7) has 50 tokens, the model takes 40" in out
    assert "row 7 (a.jsonl, line 8) has no text in 'text'" in out
    code, out, err = run("inspect", data, "--model", folder / "model", "--truncate", "--rows", 0, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["rows"], found["counts"]["truncated"], found["counts"]["left out"]) == ([], 1, 1)
    assert sum(found["labels"].values()) == found["counts"]["rows"] == 7


def test_what_is_missing_is_named_at_once() -> None:
    code, _, err = run("inspect")
    assert code == 2
    assert "--model" in err
    assert "DATA" in err
