"""An index is the old one or the new one, in a folder of its own, and its files are those that it names."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from stores import gradients, write_store

import influence_fast as inf
from influence_fast import _records as records
from influence_fast.search.index_files import describe, find_damage

pytest.importorskip("influence_fast_cpu")


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name != ".lock"}


def reseal(path: Path, **changes: object) -> None:
    document = {**records.unseal("index", (path / "index.json").read_bytes()), **changes}
    (path / "index.json").write_bytes(records.seal(document))


def test_a_foreign_folder_is_refused(tmp_path: Path, store: inf.GradientStore) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(inf.InputError, match="is not empty and holds no index"):
        inf.InfluenceIndex.build(store, path=tmp_path / "mine")
    with pytest.raises(inf.InputError, match="is not empty and holds no index"):
        inf.InfluenceIndex.build(store, path=store.path)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    for place in (tmp_path / "mine" / "thesis.tex", tmp_path / ("x" * 300)):
        with pytest.raises(inf.InfluenceError, match=r"cannot be written \("):
            inf.InfluenceIndex.build(store, path=place)


@pytest.mark.parametrize("factory", ["Flat", "SQ8"])
def test_what_was_there_stays_until_the_new_one_is_whole(
    tmp_path: Path, store: inf.GradientStore, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = gradients(3, 5)
    built = inf.InfluenceIndex.build(store, factory, path=tmp_path / "i")
    expected, before = built.search(queries, 4), files(tmp_path / "i")
    fsync = os.fsync
    for stop in range(1, 4):
        left = [stop]

        def full(number: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(number)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(inf.InfluenceError, match="the disk is full"):
            inf.InfluenceIndex.build(store, factory, "cosine", path=tmp_path / "i")
        monkeypatch.undo()
        assert files(tmp_path / "i") == before
        for one, other in zip(inf.InfluenceIndex.load(tmp_path / "i").search(queries, 4), expected, strict=True):
            assert torch.equal(one, other)
    inf.InfluenceIndex.build(store, factory, "cosine", path=tmp_path / "i")
    assert inf.InfluenceIndex.load(tmp_path / "i").metric == "cosine"
    named = {entry["file"] for entry in _entries(tmp_path / "i")}
    assert set(files(tmp_path / "i")) == {"index.json", *named}, "what is no longer named is gone"


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, store: inf.GradientStore) -> None:
    inf.InfluenceIndex.build(store, path=tmp_path / "i")
    expected = files(tmp_path / "i")
    (tmp_path / "j").mkdir()
    for name in ("scan-00000.bin", "scan-00007.bin", "scan-00001.bin.part", "index.json.part"):
        (tmp_path / "j" / name).write_bytes(b"half")
    inf.InfluenceIndex.build(store, path=tmp_path / "j")
    assert files(tmp_path / "j") == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "l2"}, "metric: expected 'dot' or 'cosine'"),
        ({"factory": 3}, "factory: expected text"),
        ({"layers": "ab"}, "layers: expected a list"),
        ({"layers": ["a"]}, "its layers are not those of its stores"),
        ({"dims": {"a": 6, "b": 2**40}}, "its layers are not those of its stores"),
        ({"model": "x"}, "its model is not that of its stores"),
        ({"projection": "sjlt:4"}, "its projection is not that of its stores"),
        ({"stores": []}, "its layers are not those of its stores"),
        ({"partitions": 1}, "partitions: expected a list"),
        ({"segments": []}, "0 vectors where 300 are named"),
        ({"breadth": 2**62}, "breadth: expected at most 2147483648"),
    ],
)
def test_what_an_index_says_is_held_against_its_stores(
    tmp_path: Path, store: inf.GradientStore, change: dict, message: str
) -> None:
    inf.InfluenceIndex.build(store, path=tmp_path / "i")
    reseal(tmp_path / "i", **change)
    with pytest.raises(inf.StoreError, match=message):
        inf.InfluenceIndex.load(tmp_path / "i", verify=False)


def test_files_and_rows_stay_within_bounds_without_checks_too(tmp_path: Path, store: inf.GradientStore) -> None:
    inf.InfluenceIndex.build(store, path=tmp_path / "i")
    document = records.unseal("index", (tmp_path / "i" / "index.json").read_bytes())
    [segment], [source] = document["segments"], document["stores"]
    for name in ("../i/scan-00000.bin", "/etc/hosts", "scan-0.bin/x"):
        reseal(tmp_path / "i", segments=[{**segment, "data": {**segment["data"], "file": name}}])
        with pytest.raises(inf.StoreError, match="expected a file of an index"):
            inf.InfluenceIndex.load(tmp_path / "i", verify=False)
    reseal(tmp_path / "i", segments=[{**segment, "rows": 3 * 10**8}])
    with pytest.raises(inf.StoreError, match="bytes long where"):
        inf.InfluenceIndex.load(tmp_path / "i", verify=False)
    reseal(tmp_path / "i", segments=[segment], stores=[{**source, "rows": [0, 2**40]}])
    with pytest.raises(inf.StoreError, match="of the 300 of"):
        inf.InfluenceIndex.load(tmp_path / "i", verify=False)
    reseal(tmp_path / "i", stores=[{**source, "path": "/etc"}])
    with pytest.raises(inf.StoreError, match="a path that begins at the index"):
        inf.InfluenceIndex.load(tmp_path / "i", verify=False)
    reseal(tmp_path / "i", stores=[source])
    path = tmp_path / "i" / "scan-00000.bin"
    raw = path.read_bytes()
    order = inf.InfluenceIndex.load(tmp_path / "i", verify=False)._scan.segments[0].arrays["order"].tobytes()
    for place in (b"\xff\xff\xff\xff", b"\x2c\x01\x00\x00", b"\xff\xff\xff\x7f"):
        path.write_bytes(raw.replace(order, place + order[4:]))
        for only in (None, torch.arange(300) < 290):
            with pytest.raises(inf.StoreError, match="it places rows outside its 300"):
                inf.InfluenceIndex.load(tmp_path / "i", verify=False).search(gradients(3, 5), 4, only=only)


def test_an_index_of_an_earlier_version_is_to_be_built_again(tmp_path: Path, store: inf.GradientStore) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "index.json").write_text(json.dumps({"version": 2, "factory": "Flat"}))
    with pytest.raises(inf.StoreError, match="index version 2, this library reads 3 and 4; build it again"):
        inf.InfluenceIndex.load(tmp_path / "i")
    inf.InfluenceIndex.build(store, path=tmp_path / "i")
    assert list(find_damage(tmp_path / "i")) == []


def test_an_index_of_version_3_is_checked_as_a_whole(tmp_path: Path, store: inf.GradientStore) -> None:
    expected = inf.InfluenceIndex.build(store, path=tmp_path / "i").search(gradients(3, 5), 4)
    path = tmp_path / "i" / "scan-00000.bin"
    document = records.unseal("index", (tmp_path / "i" / "index.json").read_bytes())
    [segment] = document["segments"]
    # Without the checksums of blocks.
    path.write_bytes(path.read_bytes()[: -8 * -(-path.stat().st_size // (2**14 + 8))])
    reseal(tmp_path / "i", version=3, segments=[{**segment, "data": describe(path)}])
    old = inf.InfluenceIndex.load(tmp_path / "i")
    for found, value in zip(old.search(gradients(3, 5), 4), expected, strict=True):
        assert torch.equal(found, value)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(inf.StoreError, match=r"scan-00000\.bin: damaged index, its checksum"):
        inf.InfluenceIndex.load(tmp_path / "i")


def test_only_rows_that_an_answer_follows_from_are_checked(tmp_path: Path) -> None:
    """A search reads few rows of the store: those alone are hashed, and damage to them is named."""
    data = {"a": torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)) * 0.01}
    data["a"][17], data["a"][3990] = 1.0, -1.0
    store = write_store(tmp_path / "s", data, shard_rows=4000)
    inf.InfluenceIndex.build(store, path=tmp_path / "i")
    asked = {"a": torch.ones(1, 64)}
    shard = tmp_path / "s" / "shard-00000.safetensors"
    raw = shard.read_bytes()
    for row, name in ((17, "helpful"), (3990, "harmful")):
        changed = bytearray(raw)
        changed[changed.index(data["a"][row].numpy().tobytes())] ^= 1  # the last bit of one number
        shard.write_bytes(changed)
        index = inf.InfluenceIndex.load(tmp_path / "i")
        index.search(asked, 1, harmful=name == "helpful")
        with pytest.raises(inf.StoreError, match=r"the checksum .* \(layer 'a' rows \d+ to \d+"):
            index.search(asked, 1, harmful=name == "harmful")
        unchecked = inf.InfluenceIndex.load(tmp_path / "i", verify=False).search(asked, 1, harmful=name == "harmful")
        assert unchecked[1].item() == row


def _entries(path: Path) -> list[dict]:
    document = json.loads((path / "index.json").read_text())
    parts = [part[key] for part in document["partitions"] for key in ("index", "rows")]
    return [*(segment["data"] for segment in document["segments"]), *parts]
