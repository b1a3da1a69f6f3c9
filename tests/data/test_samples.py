"""Texts become tokens and targets."""

from __future__ import annotations

import json
from pathlib import Path

from audits import options, run, sentences, write_rows

import influence_fast as inf

IDENTITY = inf.Projection("identity")


def test_causal_models_with_prompt_and_answer(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "w1 w2", "answer": f" w{i % 7} w{i}"} for i in range(12)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    changed = options(folder, model=folder / "causal", train=data, queries=data, answer_column="answer")
    code, _, err = run("audit", *changed, "--layers", "attention[1]", "--out", tmp_path / "a")
    assert code == 0, err
    assert json.loads((tmp_path / "a" / "stores" / "train" / "manifest.json").read_text())["loss"] == "causal-lm"


def test_truncation_when_told(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "long.jsonl", [*sentences(20, 1), {"text": "w1 " * 50, "label": 0, "noise": False}])
    code, _, err = run("audit", *options(folder, train=data), "--truncate", "--layers", "head", "--out", tmp_path / "a")
    assert code == 0, err
