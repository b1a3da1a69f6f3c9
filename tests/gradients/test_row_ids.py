"""Names of rows: any Unicode, numbers, both, written once and read where they are asked."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store

import influence_fast as inf
from influence_fast._blocks import PlainFile
from influence_fast.gradients.row_ids import RowIds, encoded

NAMES = st.text(st.characters(codec=None), max_size=8)


def back(folder: Path, ids: list[int | str]) -> RowIds:
    about, pieces = encoded(ids)
    assert about is not None
    (folder / "ids.bin").write_bytes(b"".join(pieces()))
    file = PlainFile(folder / "ids.bin", about["bytes"])
    return RowIds(file, len(ids), about["type"], about["width"], about["bytes"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(NAMES, st.integers(), st.integers(-5, 5)), min_size=1, max_size=12))
def test_any_names_come_back(tmp_path_factory: pytest.TempPathFactory, ids: list[int | str]) -> None:
    if ids == list(range(len(ids))):
        assert encoded(ids)[0] is None
        return
    found = back(tmp_path_factory.mktemp("i"), ids)
    assert list(found) == ids
    assert [found[row] for row in range(len(ids))] == ids
    assert found[-1] == ids[-1]
    assert found[1:5] == ids[1:5]
    assert found[::-2] == ids[::-2]
    assert [type(name) for name in found] == [type(name) for name in ids]


@pytest.mark.parametrize(
    ("ids", "kind", "width"),
    [
        ([5, 7, -(2**63)], "int64", 8),
        ([2**63, 1], "json", None),
        (["ab", "cd"], "utf8", 2),
        (["ab", "é"], "utf8", 2),
        (["a", "bc", "\r\n\0"], "utf8", None),
        (["a", 1], "json", None),
        (["", ""], "utf8", 0),
    ],
)
def test_how_they_are_kept(tmp_path: Path, ids: list[int | str], kind: str, width: int | None) -> None:
    about, _ = encoded(ids)
    assert about is not None
    assert (about["type"], about["width"]) == (kind, width)
    assert list(back(tmp_path, ids)) == ids


def test_many_names_are_read_where_they_are_asked(tmp_path: Path) -> None:
    ids = [f"{'x' * random.Random(row).randrange(9)}{row}" for row in range(50_000)]
    found = back(tmp_path, ids)
    assert found[40_000] == ids[40_000]
    assert found[16_000:17_000] == ids[16_000:17_000]
    assert list(found) == ids
    assert "x1" not in found.__dict__
    with pytest.raises(IndexError):
        found[50_000]


def test_a_store_checks_and_mends_them(tmp_path: Path) -> None:
    import torch

    data, ids = {"a": torch.ones(6, 2)}, ["one", "two", "\ud800", "3", "", "è"]
    store = write_store(tmp_path, data, ids=ids)
    assert list(store.ids) == ids
    before = (tmp_path / "ids.bin").read_bytes()
    (tmp_path / "ids.bin").write_bytes(before.replace(b"two", b"twa"))
    damaged = inf.GradientStore.open(tmp_path)
    with pytest.raises(inf.StoreError, match=r"ids\.bin: damaged, .* \(names of rows\)"):
        damaged.ids[1]
    with pytest.raises(inf.StoreError, match=r"ids\.bin: damaged"):
        damaged.verify()
    write_store(tmp_path, data, ids=ids)
    assert (tmp_path / "ids.bin").read_bytes() == before
    with pytest.raises(inf.StoreError, match="another ids"):
        write_store(tmp_path, data, ids=[*ids[:5], "e"])
