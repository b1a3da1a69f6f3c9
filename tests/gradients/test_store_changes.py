"""Rows are appended, deleted and taken out of the files; readers see the store before or after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stores import append, gradients, write_store
from torch import Tensor

import influence_fast as inf
from influence_fast import _records as records


def changed(path: Path, dtype: str = "float32") -> tuple[inf.GradientStore, dict[str, Tensor], list[str]]:
    """A store of 17 rows of three segments, of which four are deleted; what it should hold, and the names of all rows."""
    parts = [gradients(count, seed) for seed, count in enumerate((10, 4, 3))]
    names = [f"row {i}" for i in range(17)]
    loss = torch.arange(17.0)
    write_store(path, parts[0], {"loss": loss[:10]}, ids=names[:10], dtype=dtype)
    append(path, parts[1], names[10:14], columns={"loss": loss[10:14]}, dtype=dtype, shard_rows=3)
    store = inf.GradientStore.open(path)
    assert store.delete(["row 3", "row 9", "row 13"]) == 3
    append(path, parts[2], names[14:], columns={"loss": loss[14:]}, dtype=dtype)
    store = inf.GradientStore.open(path)
    assert store.delete(["row 15"]) == 1
    kept = [i for i in range(17) if i not in (3, 9, 13, 15)]
    whole = {name: torch.cat([part[name] for part in parts])[kept] for name in parts[0]}
    return store, whole, [names[i] for i in kept]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_readers_see_appended_rows_and_no_deleted_ones(tmp_path: Path, dtype: str) -> None:
    store, whole, names = changed(tmp_path / "s", dtype)
    before = {name: store.read(name) for name in whole}
    for compacted in (False, True):
        if compacted:
            store.compact()
        assert (len(store), list(store.ids)) == (13, names)
        assert [store.ids[i] for i in (0, 3, -1)] == [names[i] for i in (0, 3, -1)]
        assert store.ids[2:9] == names[2:9]
        for name, expected in whole.items():
            tolerance = {"float32": 0.0, "float16": 1e-3, "int8": 1e-2}[dtype]
            assert torch.equal(store.read(name), before[name]), "compacting keeps every bit"
            torch.testing.assert_close(store.read(name), expected, rtol=tolerance, atol=3 * tolerance)
            assert torch.equal(store.read(name, slice(2, 11)), before[name][2:11])
            assert torch.equal(store.read(name, [12, 0, 7, 7, -2]), before[name][[12, 0, 7, 7, -2]])
            torch.testing.assert_close(store.sqnorm(name), expected.double().square().sum(1))
        assert store.column("loss").tolist() == [float(name.split()[1]) for name in names]
        store.verify()
        again = inf.GradientStore.open(tmp_path / "s")
        assert again.digest == store.digest


def test_influence_aggregation_and_parquet_leave_deleted_rows_out(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    store, whole, names = changed(tmp_path / "s")
    queries = gradients(3, 7)
    matrix = inf.influence(store, queries, "cosine")
    alone = inf.influence(whole, queries, "cosine")
    torch.testing.assert_close(inf.aggregate(matrix, "rank"), inf.aggregate(alone, "rank"))
    store.to_parquet(tmp_path / "s.parquet")
    table = pq.read_table(tmp_path / "s.parquet")
    assert table["id"].to_pylist() == names
    assert np.array_equal(np.stack(table["a"].to_numpy()), whole["a"].numpy())


def test_the_bytes_of_a_deleted_row_are_gone(tmp_path: Path) -> None:
    values = gradients(10, 0)
    names = [f"person {i}" for i in range(10)]
    store = write_store(tmp_path / "s", values, ids=names)
    store.delete(["person 4"])
    secrets = [values["a"][4].numpy().tobytes(), values["b"][4].numpy().tobytes(), b"person 4"]

    def found() -> list[bool]:
        files = [file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()]
        return [any(secret in data for data in files) for secret in secrets]

    assert found() == [True, True, True]
    store.compact()
    assert found() == [False, False, False]
    assert [f"person {i}" for i in range(10) if i != 4] == list(store.ids)


def test_facts_of_single_rows_go_with_deleted_ones(tmp_path: Path) -> None:
    store = write_store(tmp_path, gradients(6, 0))
    raw = records.unseal("m", (tmp_path / "manifest.json").read_bytes())
    facts = {"probe": [{"row": 0, "loss": 1.5}], "verified": {"rows": [0]}, "trained": 3}
    (tmp_path / "manifest.json").write_bytes(records.seal({**raw, "facts": facts}))
    store = inf.GradientStore.open(tmp_path)
    store.delete([0])
    store.compact()
    assert store.meta["facts"] == {"trained": 3}


def test_numbers_stay_the_ids_of_rows(tmp_path: Path) -> None:
    store = write_store(tmp_path, gradients(6, 0))
    assert store.delete([1, 4]) == 2
    assert store.delete([4]) == 0, "deleted already"
    assert list(store.ids) == [0, 2, 3, 5]
    store.compact()
    assert list(store.ids) == [0, 2, 3, 5]
    store.compact()
    with pytest.raises(inf.InputError, match=r"no row of .* has the id 1; nothing was deleted"):
        store.delete([1, 2])
    assert len(store) == 4
    with pytest.raises(inf.InputError, match=r"no row of .* would be left"):
        store.delete([0, 2, 3, 5])


def test_a_reader_of_before_is_told(tmp_path: Path) -> None:
    store = write_store(tmp_path, gradients(6, 0))
    other = inf.GradientStore.open(tmp_path)
    store.delete([1])
    assert len(other) == 6
    assert len(other.read("a")) == 6
    store.compact()
    with pytest.raises(inf.StoreError, match="the store was compacted since it was opened: open it again"):
        other.read("a")


def test_who_opens_while_the_store_changes_sees_one_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the manifest and the files that it names another process compacts."""
    from influence_fast.gradients import store_records

    store = write_store(tmp_path, gradients(6, 0))
    store.delete([1])
    read, once = store_records.read_lines, []

    def slowly(*arguments):
        if not once:
            once.append(True)
            store.compact()
        return read(*arguments)

    monkeypatch.setattr(store_records, "read_lines", slowly)
    assert list(inf.GradientStore.open(tmp_path).ids) == [0, 2, 3, 4, 5]
    assert once


def test_a_change_that_was_given_up_is_removed(tmp_path: Path) -> None:
    values = gradients(6, 0)
    store = write_store(tmp_path, values)
    write_store(tmp_path / "segment-00001", values, ids=range(6, 12))
    write_store(tmp_path / "segment-00007", values)
    (tmp_path / "deleted-00009.bin").write_bytes(b"x")
    assert len(inf.GradientStore.open(tmp_path)) == 6
    store.delete([2])
    names = {path.name for path in tmp_path.iterdir()}
    assert "segment-00001" in names, "it may still be finished"
    assert not names & {"segment-00007", "deleted-00009.bin"}
    assert (tmp_path / "deleted-00001.bin").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requires": []}, "it requires"),
        ({"requires": ["segments"]}, "it requires"),
        ({"next": "1"}, "next: expected a whole number"),
        ({"segments": [{"folder": "../other", "rows": 6, "settings": "0" * 64}]}, "the folder of a segment"),
        ({"segments": [{"folder": "", "rows": 6, "settings": "0" * 64}]}, "is not the one that the store names"),
        ({"segments": [{"folder": "segment-00001", "rows": 6, "settings": "0" * 64}]}, "no gradient store"),
        ({"tombstones": {"file": "deleted-00001.bin", "rows": 2, "bytes": 9, "blocks": "0" * 16}}, "checksums"),
        (
            {"tombstones": {"file": "deleted-00001.bin", "rows": 6, "bytes": 9, "blocks": "0" * 16}},
            "cannot delete 6 of 6",
        ),
        ({"tombstones": {"file": "deleted-00001.bin", "rows": 1, "bytes": 2**40, "blocks": "0" * 16}}, "cannot delete"),
        ({"tombstones": {"file": "manifest.json", "rows": 1, "bytes": 9, "blocks": "0" * 16}}, "a file of tombstones"),
    ],
)
def test_what_a_manifest_claims_of_changes(tmp_path: Path, change: dict, message: str) -> None:
    write_store(tmp_path, gradients(6, 0)).delete([1])
    manifest = records.unseal("m", (tmp_path / "manifest.json").read_bytes())
    (tmp_path / "manifest.json").write_bytes(records.seal({**manifest, **change}))
    with pytest.raises(inf.StoreError, match=message):
        inf.GradientStore.open(tmp_path)


def test_a_store_of_version_1_is_not_changed() -> None:
    old = Path(__file__).parents[1] / "fixtures" / "store-0.1" / "float32" / "train"
    store = inf.GradientStore.open(old)
    with pytest.raises(inf.StoreError, match="of version 1 cannot be changed"):
        store.delete([store.ids[0]])


def test_a_store_that_was_changed_is_not_built_over(tmp_path: Path) -> None:
    values = gradients(6, 0)
    write_store(tmp_path, values).delete([1])
    with pytest.raises(inf.StoreError, match="rows were appended to this store or deleted"):
        write_store(tmp_path, values)
