"""One store of several keeps every bit, and refuses what does not belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stores import append, gradients, write_store

import influence_fast as inf


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_of_both_without_deleted_ones(tmp_path: Path, dtype: str) -> None:
    one = write_store(tmp_path / "one", gradients(7, 0), ids=range(7), dtype=dtype)
    two = write_store(tmp_path / "two", gradients(5, 1), ids=[f"b{i}" for i in range(5)], dtype=dtype, shard_rows=3)
    two = append(tmp_path / "two", gradients(2, 2), ["c0", "c1"], dtype=dtype)
    one.delete([2, 6])
    two.delete(["b1"])
    merged = inf.merge_stores([one, two], tmp_path / "out")
    assert list(merged.ids) == [0, 1, 3, 4, 5, "b0", "b2", "b3", "b4", "c0", "c1"]
    for name in merged.layers:
        assert torch.equal(merged.read(name), torch.cat([one.read(name), two.read(name)]))
        assert torch.equal(merged.sqnorm(name), torch.cat([one.sqnorm(name), two.sqnorm(name)]))
    merged.verify()
    assert len(inf.merge_stores([one, two], tmp_path / "out")) == 11, "again"


def test_numbered_rows_are_numbered_anew(tmp_path: Path) -> None:
    stores = [write_store(tmp_path / str(seed), gradients(3, seed)) for seed in (0, 1)]
    assert inf.merge_stores(stores, tmp_path / "out").ids == range(6)


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", gradients(3, 0), ids=["a", "b", "c"])
    for key, value in (("model", "other"), ("projection", "sjlt:16"), ("dtype", "int8")):
        other = write_store(tmp_path / key, gradients(3, 1), **{key: value})
        with pytest.raises(inf.StoreError, match=f"has another {key} than"):
            inf.merge_stores([one, other], tmp_path / "out")
    column = write_store(tmp_path / "column", gradients(3, 1), {"loss": torch.zeros(3)}, ids=["d", "e", "f"])
    with pytest.raises(inf.StoreError, match="has the columns"):
        inf.merge_stores([one, column], tmp_path / "out")
    same = write_store(tmp_path / "same", gradients(3, 1), ids=["d", "b", "f"])
    with pytest.raises(inf.InputError, match="rows of two have the id 'b'"):
        inf.merge_stores([one, same], tmp_path / "out")
    with pytest.raises(inf.InputError, match="is one of the stores"):
        inf.merge_stores([one], tmp_path / "one")
    with pytest.raises(inf.InputError, match="at least one"):
        inf.merge_stores([], tmp_path / "out")
    assert not (tmp_path / "out").exists()
