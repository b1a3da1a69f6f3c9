"""The store on disk: bytes, reads, damage, full disks, two writers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from stores import append, write_store, writer
from torch import Tensor

import influence_fast as inf
from influence_fast.gradients import store_format


@pytest.fixture
def gradients() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {"a.b": torch.randn(10, 3, generator=random), "c": torch.randn(10, 5, generator=random)}


def damage(path: Path, how: str) -> None:
    shard = path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    if how == "truncated":
        shard.write_bytes(data[:-5])
    elif how == "longer":
        shard.write_bytes(data + b"x")
    elif how == "flipped":
        data[-3] ^= 1
        shard.write_bytes(data)
    elif how == "missing":
        shard.unlink()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 0), ("float16", 2**-10), ("bfloat16", 2**-8), ("int8", 1 / 127)]
)
def test_dtypes(tmp_path: Path, gradients: dict[str, Tensor], dtype: str, tolerance: float) -> None:
    store = write_store(tmp_path, gradients, dtype=dtype)
    store.verify()
    for name, expected in gradients.items():
        largest = expected.abs().amax(1, keepdim=True)
        assert ((store.read(name) - expected).abs() <= tolerance * largest).all()
        assert store.read(name).dtype == torch.float32
        torch.testing.assert_close(store.sqnorm(name), expected.double().square().sum(1), rtol=1e-14, atol=0)


def test_the_reader_in_the_documentation(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    code = re.search(r"plain NumPy::\n\n(.*)\Z", store_format.__doc__, re.S)[1]
    names: dict = {}
    exec("\n".join(line[4:] for line in code.splitlines()), names)
    for dtype in ("float32", "float16", "bfloat16"):
        store = write_store(tmp_path / dtype, gradients, dtype=dtype)
        got = torch.from_numpy(names["read_store"](tmp_path / dtype, "c")).float()
        assert torch.equal(got, store.read("c"))
        append(tmp_path / dtype, gradients, range(10, 20), dtype=dtype)
        store = inf.GradientStore.open(tmp_path / dtype)
        store.delete([1, 12])
        append(tmp_path / dtype, gradients, range(20, 30), dtype=dtype)
        for compacted in (False, True):
            store = inf.GradientStore.open(tmp_path / dtype)
            if compacted:
                store.compact()
            assert len(store) == 28
            assert torch.equal(torch.from_numpy(names["read_store"](tmp_path / dtype, "c")).float(), store.read("c"))


def test_reads(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    store, expected = write_store(tmp_path, gradients), gradients["c"]
    mask = torch.arange(10) % 3 == 0
    for rows, wanted in [
        (None, expected),
        (slice(3, 9), expected[3:9]),
        (slice(8, 2, -2), expected[[8, 6, 4]]),
        (slice(4, 4), expected[:0]),
        ([7, 0, 7, -1], expected[[7, 0, 7, 9]]),
        (torch.tensor([5, 1]), expected[[5, 1]]),
        (mask, expected[mask]),
        (range(2, 4), expected[2:4]),
        ([], expected[:0]),
    ]:
        assert torch.equal(store.read("c", rows), wanted), rows
    for rows in ([10], [-11], [1.5], [True] * 3):
        with pytest.raises(inf.InputError, match="rows: "):
            store.read("c", rows)
    with pytest.raises(inf.InputError, match=r"no 'x'; it has a\.b, c"):
        store.read("x")


def test_columns_ids_and_repr(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    loss = torch.rand(10)
    store = write_store(tmp_path, gradients, {"loss": loss, "correct": loss > 0.5}, ids=[f"r{i}" for i in range(10)])
    assert torch.equal(store.column("loss"), loss)
    assert torch.equal(store.column("correct"), loss > 0.5)
    assert list(store.ids) == [f"r{i}" for i in range(10)]
    assert "10 rows, 2 layers, identity, float32" in repr(store)
    with pytest.raises(inf.InputError, match=r"it has (loss, correct|correct, loss)"):
        store.column("nope")


@pytest.mark.parametrize("how", ["truncated", "longer", "flipped", "missing"])
def test_a_damaged_shard_is_named(tmp_path: Path, gradients: dict[str, Tensor], how: str) -> None:
    store = write_store(tmp_path, gradients)
    damage(tmp_path, how)
    with pytest.raises(inf.StoreError, match=r"shard-00001\.safetensors: (damaged|missing)"):
        store.verify()
    if how != "flipped":
        with pytest.raises(inf.StoreError, match="shard-00001"):
            inf.GradientStore.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[" * 99999, "nested too deeply"),
        ("[]", "not that of"),
        ('{"format": "influence_fast.gradients", "version": 99}', "version 99"),
        ('{"format": "influence_fast.gradients", "version": true}', "version True"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, gradients: dict[str, Tensor], text: str, message: str) -> None:
    write_store(tmp_path, gradients)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(inf.StoreError, match=message):
        inf.GradientStore.open(tmp_path)
    with pytest.raises(inf.StoreError, match="no gradient store"):
        inf.GradientStore.open(tmp_path / "nowhere")


def test_an_unfinished_store_does_not_open(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    with writer(tmp_path, gradients) as out:
        out.write(1, {name: g[4:8] for name, g in gradients.items()}, {})
    with pytest.raises(inf.StoreError, match="unfinished, 4 of 10 rows"):
        inf.GradientStore.open(tmp_path)
    assert writer(tmp_path, gradients).missing == [0, 2]


def test_the_manifest_says_what_is_in_the_shards(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    write_store(tmp_path, gradients)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    assert [(line["first"], line["rows"]) for line in lines] == [(0, 4), (4, 4), (8, 2)]
    assert manifest["layers"]["c"] == {"shape": [1, 5], "dim": 5, "matrices": {}}


def test_shards_are_verified_when_first_read(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    write_store(tmp_path, gradients)
    damage(tmp_path, "flipped")
    store = inf.GradientStore.open(tmp_path)
    assert torch.equal(store.read("c", slice(0, 4)), gradients["c"][:4])
    for rows in (slice(3, 6), [5]):
        with pytest.raises(inf.StoreError, match=r"shard-00001\.safetensors: damaged, .* \(all layers, rows 4 to 7\)"):
            store.read("c", rows)
    assert len(inf.GradientStore.open(tmp_path, verify=False).read("c", slice(3, 6))) == 3


def test_a_shard_that_becomes_shorter_while_it_is_read_is_named(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    store = write_store(tmp_path, gradients)
    store.read("c")
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(inf.StoreError, match=r"shard-00001\.safetensors: damaged, it ends"):
        [store.read(name) for name in store.layers], store.sqnorm("a.b"), store.sqnorm("c"), store.column("loss")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_to_parquet(tmp_path: Path, gradients: dict[str, Tensor], dtype: str) -> None:
    import pyarrow.parquet as pq

    loss, names = torch.rand(10), [f"r{i}" for i in range(10)]
    store = write_store(tmp_path / "s", gradients, {"loss": loss}, ids=names, dtype=dtype)
    store.to_parquet(tmp_path / "out" / "all.parquet")
    file = pq.ParquetFile(tmp_path / "out" / "all.parquet")
    assert file.num_row_groups == 3
    table = file.read()
    assert table["id"].to_pylist() == names
    for name in store.layers:
        assert torch.equal(torch.tensor(table[name].to_pylist()), store.read(name))
        assert table[f"sqnorm/{name}"].to_pylist() == store.sqnorm(name).tolist()
    assert torch.equal(torch.tensor(table["loss"].to_pylist()), loss)
    store.to_parquet(tmp_path / "one.parquet", layers=["c"])
    assert pq.read_schema(tmp_path / "one.parquet").names == ["id", "c", "sqnorm/c", "loss"]
    with pytest.raises(inf.InputError, match="no 'x'"):
        store.to_parquet(tmp_path / "two.parquet", layers=["x"])
    assert not list(tmp_path.glob("two*"))


def test_what_a_store_claims_is_held_against_its_files(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    """Hundreds of millions of rows in a few hundred bytes are refused before anything of their size is allocated."""
    import tracemalloc

    from influence_fast import _records as records
    from influence_fast.gradients.store_records import fingerprint

    write_store(tmp_path, gradients)
    manifest = records.unseal("m", (tmp_path / "manifest.json").read_bytes())
    first = json.loads((tmp_path / "journal").read_text().splitlines()[0])
    manifest["rows"] = manifest["shard_rows"] = first["rows"] = 3 * 10**8
    first["settings"] = fingerprint(manifest)
    line, _ = records.chained(first["settings"], {key: first[key] for key in first if key not in ("before", "seal")})
    (tmp_path / "manifest.json").write_bytes(records.seal(manifest))
    (tmp_path / "journal").write_bytes(line)
    old = {**manifest, "version": 1, "shards": [first]}
    for content in (None, json.dumps(old)):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        tracemalloc.start()
        with pytest.raises(inf.StoreError, match=r"is damaged: shard-00000\.safetensors cannot hold rows 0 and on"):
            inf.GradientStore.open(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["manifest.json", "journal", "ids.bin", "shard-00001.safetensors"])
def test_files_that_lead_out_of_the_folder_are_not_read(
    tmp_path: Path, gradients: dict[str, Tensor], name: str
) -> None:
    store = write_store(tmp_path / "s", gradients, ids=[f"r{row}" for row in range(10)])
    outside = tmp_path / f"outside-{name}"
    (store.path / name).rename(outside)
    (store.path / name).symlink_to(outside)
    with pytest.raises(inf.StoreError, match=f"{name}: is a link that leads out of its folder"):
        inf.GradientStore.open(store.path)


def test_a_store_that_needs_a_later_version(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    from influence_fast import _records as records

    write_store(tmp_path, gradients)
    manifest = records.unseal("m", (tmp_path / "manifest.json").read_bytes())
    (tmp_path / "manifest.json").write_bytes(records.seal({**manifest, "requires": ["blocks"]}))
    with pytest.raises(inf.StoreError, match="needs a later version of this library, which knows 'blocks'"):
        inf.GradientStore.open(tmp_path)
    (tmp_path / "manifest.json").write_bytes(records.seal({**manifest, "later": 1}))
    with pytest.raises(inf.StoreError, match=r"belongs to another store|does not follow"):
        inf.GradientStore.open(tmp_path)
