"""The demo finds what it flipped, and leaves what its next commands need."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from audits import read_csv, run


def test_demo_and_the_commands_that_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("my demo")
    code, out, err = run("demo", "--out", folder, "--samples", 60, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["facts"]["samples"] == 60
    assert {row["group"] for row in document["evaluation"]} >= {"", "all", "embedding", "attention q1", "mlp", "head"}
    assert (folder / "report.html").exists()
    assert len((folder / "train.jsonl").read_text().splitlines()) == 60
    printed = {}
    for command in document["next"]:
        program, *words = shlex.split(command)
        assert program == "influence-fast"
        code, printed[words[0]], err = run(*words)
        assert code == 0, err
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    assert sum(" ".join(text.split()[:3]) in printed["search"] for text in texts) >= 5
    assert "helpful" in printed["search"]
    assert len((folder / "cleaned.jsonl").read_text().splitlines()) == 48
    # The replay ranks as the demo did.
    assert read_csv(folder / "again" / "scores.csv") == read_csv(folder / "scores.csv")
    code, _, err = run("demo", "--out", folder, "--samples", 60, "--seed", 1)
    assert (code, "holds another demo" in err) == (1, True)


def test_a_demo_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = run("demo", "--out", tmp_path, "--samples", 60)
    assert (code, "holds something else" in err) == (1, True)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
