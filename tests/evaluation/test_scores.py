"""Files of scores give back what was written, ids of any kind among it."""

from __future__ import annotations

from pathlib import Path

import pytest

import influence_fast as inf
from influence_fast.evaluation.scores import write_scores

IDS = {
    "numbers": [3, -1, 2**62],
    "texts": ["a,b", "=1+1", "'x"],
    "texts that look like numbers": ["007", "1.5", "1e3"],
    "missing values by name": ["NA", "", "nan"],
    "both": ["7", 7, "x"],
    "half of a pair": ["\ud800", "ä", "b"],
    "large numbers": [2**70, 1, 2],
}


@pytest.mark.parametrize("kind", list(IDS))
def test_parquet_gives_back_ids_of_any_kind(tmp_path: Path, kind: str) -> None:
    scores = [0.1 + 0.2, -1e-300, float("inf")]
    write_scores(tmp_path / "s.parquet", IDS[kind], scores, [1, 0, 2])
    frame = inf.read_scores(tmp_path / "s.parquet")
    assert frame["id"].tolist() == IDS[kind]
    assert [type(name) for name in frame["id"].tolist()] == [type(name) for name in IDS[kind]]
    assert frame["score"].tolist() == scores
    assert frame["rank"].tolist() == [1, 0, 2]


@pytest.mark.parametrize("kind", ["numbers", "texts", "texts that look like numbers", "missing values by name"])
def test_csv_gives_back_ids_of_one_kind(tmp_path: Path, kind: str) -> None:
    write_scores(tmp_path / "s.csv", IDS[kind], [0.1 + 0.2, 1.0, 2.0], [0, 1, 2])
    frame = inf.read_scores(tmp_path / "s.csv")
    assert frame["id"].tolist() == IDS[kind]
    assert frame["score"].tolist() == [0.1 + 0.2, 1.0, 2.0]


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(inf.InputError, match="there is no file"):
        inf.read_scores(tmp_path / "none.csv")
    for name in ("s.csv", "s.parquet"):
        (tmp_path / name).write_bytes(b"\xff\x00")
        with pytest.raises(inf.InputError, match="is no table of scores"):
            inf.read_scores(tmp_path / name)
