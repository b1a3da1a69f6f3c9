"""Rows from every kind of source, each named by where it stands."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from audits import options, run, sentences, write_rows

import influence_fast as inf
from influence_fast.data.loading import describe, read_table


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_other_files(folder: Path, tmp_path: Path, kind: str) -> None:
    data = datasets.Dataset.from_list(sentences(12, 1))
    path = tmp_path / ("saved" if kind == "folder" else f"train.{kind}")
    {"csv": data.to_csv, "parquet": data.to_parquet, "folder": data.save_to_disk}[kind](str(path))
    code, _, err = run("audit", *options(folder, train=path), "--layers", "head", "--out", tmp_path / "a")
    assert code == 0, err


def test_several_files_and_globs(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(2)])
    found = read_table("train", str(tmp_path / "*.jsonl"))
    assert [row["text"] for row in found] == ["a0", "a1", "b0", "b1"]
    assert [found.where(i) for i in (0, 3)] == ["row 0 (a.jsonl, line 1)", "row 3 (b.jsonl, line 2)"]
    assert len(read_table("train", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], limit=3)) == 3
    with pytest.raises(inf.InputError, match="no file matches"):
        read_table("train", str(tmp_path / "*.csv"))


def test_splits_are_told_apart(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("validation", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(validation=parts["validation"]).save_to_disk(tmp_path / "one")
    assert read_table("train", tmp_path / "one").rows == [{"text": "validation"}]
    assert read_table("train", tmp_path / "two", "test").rows == [{"text": "test"}]
    assert read_table("train", f"{tmp_path / 'two'}:validation").rows == [{"text": "validation"}]
    assert read_table("train", datasets.DatasetDict(parts), "test").rows == [{"text": "test"}]
    with pytest.raises(inf.InputError, match="several splits and none is 'train'; there are validation, test"):
        read_table("train", tmp_path / "two")
    with pytest.raises(inf.InputError, match="no split 'train'; there are validation, test"):
        read_table("train", datasets.DatasetDict(parts), "train")
    for name in ("data-train-00000.jsonl", "data-train-00001.jsonl", "data-dev.jsonl"):
        (tmp_path / "files").mkdir(exist_ok=True)
        write_rows(tmp_path / "files" / name, [{"text": name}])
    assert [row["text"] for row in read_table("train", tmp_path / "files")] == [
        "data-train-00000.jsonl",
        "data-train-00001.jsonl",
    ]
    assert read_table("train", tmp_path / "files", "validation").rows == [{"text": "data-dev.jsonl"}]
    mixed = [tmp_path / "files" / "data-dev.jsonl", tmp_path / "files"]
    assert [row["text"] for row in read_table("train", mixed, "validation")] == ["data-dev.jsonl"] * 2


@pytest.mark.parametrize("kind", ["file", "named", "saved", "rows", "other"])
def test_a_split_that_nothing_has_is_refused(tmp_path: Path, kind: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "w1"}])
    data = datasets.Dataset.from_dict({"text": ["w1"]})
    data.save_to_disk(tmp_path / "saved")
    source, split = {
        "file": ([file, str(tmp_path / "*.jsonl")], "test"),
        "named": (f"{file}:test", None),
        "saved": (f"{tmp_path / 'saved'}:test", None),
        "rows": ([{"text": "w1"}], "test"),
        "other": (datasets.Dataset.from_dict({"text": ["w1"]}, split="train"), "test"),
    }[kind]
    with pytest.raises(inf.InputError, match=r"(no splits|no split|has none|'train' alone).*'test'"):
        read_table("train", source, split)


class Indexed(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        return {"text": "ab"[index], "label": torch.tensor(index)}


SOURCES = {
    "dicts": [{"text": "a", "label": np.int64(0)}, {"text": "b", "label": np.int32(1)}],
    "frame": pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}),
    "frame with gaps": pd.DataFrame({"text": ["a", "b", None], "label": [0, 1, None]}).head(2),
    "columns": {"text": ["a", "b"], "label": np.arange(2)},
    "data set": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}),
    "iterable": datasets.IterableDataset.from_generator(
        lambda: iter([{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    ),
    "generator": ({"text": text, "label": label} for label, text in enumerate("ab")),
    "torch": Indexed(),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_in_memory(kind: str) -> None:
    found = read_table("train", SOURCES[kind])
    assert found.rows == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert all(type(row["label"]) in (int, float) for row in found.rows)


def test_missing_values_are_none() -> None:
    frame = pd.DataFrame({"label": pd.array([1, None], dtype="Int64"), "when": pd.to_datetime(["2020-01-01", None])})
    assert read_table("train", frame).rows[1] == {"label": None, "when": None}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "has no rows"),
        ([1], "row 0 is a int, expected a dict"),
        (3, "got a int"),
        ({"a": [1], "b": []}, "columns of"),
    ],
)
def test_what_is_none_is_refused(source: object, message: str) -> None:
    with pytest.raises(inf.InputError, match=f"train: .*{message}"):
        read_table("train", source)


def test_lines_with_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{\n' + "[]\n" * 6 + '{"a": 2}\n')
    with pytest.raises(
        inf.InputError, match=r"train: 7 of 9 rows have a problem: cannot read a.jsonl, line 2.*and 2 more"
    ):
        read_table("train", tmp_path / "a.jsonl")
    found = read_table("train", tmp_path / "a.jsonl", skip_bad=True)
    assert [row["a"] for row in found] == [1, 2]
    assert found.where(1) == "row 1 (a.jsonl, line 9)"
    assert len(found.skipped) == 7


def test_sources_are_described() -> None:
    assert describe("a.csv") == "a.csv"
    assert describe(("a.csv", "b.csv")) == ["a.csv", "b.csv"]
    assert describe([{"a": 1}]) == "(list in memory)"
