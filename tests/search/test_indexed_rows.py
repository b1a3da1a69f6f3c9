"""Which rows an index is of: ranges as the shards number them, and whether the same rows are left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from definitions import draw
from stores import write_store

import influence_fast as inf
from influence_fast.search.indexed_rows import as_written, digest_of_rows, first_number, row_name, row_names, same_rows
from influence_fast.search.stored_rows import Rows


def test_rows_of_a_store_with_deleted_ones(tmp_path: Path) -> None:
    write_store(tmp_path / "s", draw(12, {"a": 4}, 0), shard_rows=5).delete([0, 4, 11])
    store = inf.GradientStore.open(tmp_path / "s")
    assert as_written(store, range(9)) == range(12)
    assert as_written(store, range(1, 4)) == range(2, 6)
    rows = Rows([(store, range(12))], ["a"])
    assert row_names(rows) == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert [row_name(rows, row) for row in range(9)] == row_names(rows)
    assert first_number(rows) is None
    whole = Rows([(store.with_deleted, range(3, 12))], ["a"])
    assert first_number(whole) == 3
    assert digest_of_rows(rows, [12]) != digest_of_rows(whole, [12])


def test_names_go_on_from_store_to_store(tmp_path: Path) -> None:
    parts = [write_store(tmp_path / name, draw(3, {"a": 4}, 0)) for name in "xy"]
    rows = Rows([(store, range(3)) for store in parts], ["a"])
    assert (row_names(rows), row_name(rows, 4), first_number(rows)) == (range(6), 4, 0)


def test_same_rows() -> None:
    left = np.array([0, 2, 3])
    assert same_rows(None, None, 4)
    assert same_rows(left, np.array([0, 2, 3, 5]), 4)
    assert not same_rows(None, left, 4)
    assert not same_rows(left, np.array([0, 3, 5]), 4)
