"""Rows from every kind of file."""

from __future__ import annotations

from pathlib import Path

import pytest
from audits import options, run, sentences

import influence_fast as inf

IDENTITY = inf.Projection("identity")


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_other_files(folder: Path, tmp_path: Path, kind: str) -> None:
    import datasets

    data = datasets.Dataset.from_list(sentences(12, 1))
    path = tmp_path / ("saved" if kind == "folder" else f"train.{kind}")
    {"csv": data.to_csv, "parquet": data.to_parquet, "folder": data.save_to_disk}[kind](str(path))
    code, _, err = run("audit", *options(folder, train=path), "--layers", "head", "--out", tmp_path / "a")
    assert code == 0, err
