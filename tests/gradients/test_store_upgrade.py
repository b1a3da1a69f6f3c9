"""Version 1 becomes version 2 with the same bits, whatever stops it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import influence_fast as inf
from influence_fast.gradients.store_upgrade import upgrade_store

FIXTURES = Path(__file__).parent.parent / "fixtures" / "store-0.1"


@pytest.fixture(params=["float32/train", "int8/train", "float32/queries"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES / request.param, tmp_path / "store")
    return tmp_path / "store"


def same(one: inf.GradientStore, other: inf.GradientStore) -> None:
    assert (one.layers, one.dims, one.shapes, one.columns) == (other.layers, other.dims, other.shapes, other.columns)
    assert list(one.ids) == list(other.ids)
    for name in one.layers:
        assert torch.equal(one.read(name), other.read(name))
        assert torch.equal(one.sqnorm(name), other.sqnorm(name))
    for name in one.columns:
        assert torch.equal(one.column(name), other.column(name))
    for key in ("model", "projection", "dtype", "loss", "shard_rows", "settings", "layers"):
        assert one.meta[key] == other.meta[key]


def test_the_same_bits(old: Path) -> None:
    shutil.copytree(old, old.parent / "copy")
    before = inf.GradientStore.open(old.parent / "copy")
    after = upgrade_store(old)
    assert after is not None
    assert (before.meta["version"], after.meta["version"]) == (1, 2)
    same(before, after)
    after.verify()
    assert sorted(path.name for path in old.parent.iterdir()) == ["copy", "store"]
    with pytest.raises(inf.InputError, match="of version 2 already"):
        upgrade_store(old)


@pytest.mark.parametrize("after", range(1, 12))
def test_killed_at_any_rename_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    shutil.copytree(FIXTURES / "float32" / "train", tmp_path / "store")
    left, rename, replace = [after], os.rename, os.replace

    def stopping(real):
        def call(*names, **more):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return real(*names, **more)

        return call

    monkeypatch.setattr(os, "rename", stopping(rename))
    monkeypatch.setattr(os, "replace", stopping(replace))
    try:
        upgrade_store(tmp_path / "store")
    except KeyboardInterrupt:
        monkeypatch.undo()
        upgrade_store(tmp_path / "store")
    store = inf.GradientStore.open(tmp_path / "store")
    store.verify()
    assert store.meta["version"] == 2
    same(inf.GradientStore.open(FIXTURES / "float32" / "train"), store)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_damaged_store_is_not_rewritten(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "float32" / "train", tmp_path / "store")
    shard = tmp_path / "store" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(inf.StoreError, match=r"shard-00001\.safetensors: damaged, its SHA-256"):
        inf.GradientStore.open(tmp_path / "store").read("classifier")
    with pytest.raises(inf.StoreError, match=r"shard-00001\.safetensors: damaged, its SHA-256"):
        upgrade_store(tmp_path / "store")
    assert shard.read_bytes() == data


def test_an_unfinished_store_keeps_its_shards(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "float32" / "train", tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    lost = manifest["shards"].pop(2)
    path.write_text(json.dumps(manifest))
    (tmp_path / "store" / lost["file"]).unlink()
    assert upgrade_store(tmp_path / "store") is None
    with pytest.raises(inf.StoreError, match="unfinished, 8 of 10 rows"):
        inf.GradientStore.open(tmp_path / "store")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rows", 3 * 10**8, "unfinished|ids for"),
        ("dtype", "float64", "dtype: expected 'float32' or"),
        ("layers", [], "layers: expected an object"),
        ("shards", {"a": 1}, "shards: expected a list"),
        ("ids", [True], r"ids\[0\]: expected a number or text"),
        ("rows", "10", "rows: expected a whole number"),
    ],
)
def test_types_of_a_manifest_of_version_1(tmp_path: Path, key: str, value: object, message: str) -> None:
    shutil.copytree(FIXTURES / "float32" / "train", tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(inf.StoreError, match=message):
        inf.GradientStore.open(tmp_path / "store")
