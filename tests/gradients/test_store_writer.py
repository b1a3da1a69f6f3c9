"""Shards are written whole or not at all, by one writer at a time."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from stores import write_store, writer
from torch import Tensor

import influence_fast as inf


@pytest.fixture
def gradients() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {"a.b": torch.randn(10, 3, generator=random), "c": torch.randn(10, 5, generator=random)}


def test_a_full_disk_loses_nothing(tmp_path: Path, gradients: dict[str, Tensor], monkeypatch) -> None:
    gradients = {name: (8 * g).round() for name, g in gradients.items()}  # their norms are exact: the same bytes twice
    fsync = os.fsync

    def full(number: int) -> None:
        if "shard-00001" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        inf.InfluenceError, match=r"shard-00001.safetensors: the disk is full \([\d,]+ bytes are free\)"
    ):
        write_store(tmp_path / "s", gradients)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        ".lock",
        "journal",
        "manifest.json",
        "shard-00000.safetensors",
    ]
    monkeypatch.undo()
    write_store(tmp_path / "s", gradients).verify()
    write_store(tmp_path / "t", gradients)
    for file in (tmp_path / "t").iterdir():
        assert file.read_bytes() == (tmp_path / "s" / file.name).read_bytes()


def test_two_writers_do_not_mix(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    with writer(tmp_path, gradients), pytest.raises(inf.StoreError, match="another process"):
        writer(tmp_path, gradients).__enter__()


def test_what_is_there_is_never_overwritten(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    write_store(tmp_path / "s", gradients)
    with pytest.raises(inf.InputError, match="holds a store already"):
        write_store(tmp_path / "s", gradients, resume=False)
    with pytest.raises(inf.StoreError, match="another dtype: 'float32', not 'int8'"):
        write_store(tmp_path / "s", gradients, dtype="int8")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").touch()
    with pytest.raises(inf.InputError, match="holds no store"):
        write_store(tmp_path / "x", gradients)


def test_what_does_not_fit_the_dtype_is_named(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    gradients["c"][6, 2] = torch.finfo(torch.float32).max
    with pytest.raises(inf.InputError, match="layer 'c' for row 6 overflows bfloat16"):
        write_store(tmp_path / "h", gradients, dtype="bfloat16")
    gradients["c"][6, 2] = float("inf")
    with pytest.raises(inf.InputError, match="layer 'c' for row 6 is not finite"):
        write_store(tmp_path / "f", gradients)
    with pytest.raises(inf.InputError, match="dtype: expected one of float32, float16, bfloat16, int8"):
        write_store(tmp_path / "d", gradients, dtype="float8")


@pytest.mark.parametrize("power", [-60, -40, -20, 0, 20, 60])
def test_float16_and_int8_keep_rows_of_any_length(tmp_path: Path, gradients: dict[str, Tensor], power: int) -> None:
    """Rows that are learned well have gradients far below float16's smallest number; a few lie above its largest."""
    small = {name: torch.ldexp(g, torch.tensor(power)) for name, g in gradients.items()}
    small["a.b"][3] = 0
    for dtype, tolerance in (("float16", 2.0**-11), ("int8", 1 / 127)):
        store = write_store(tmp_path / dtype, small, dtype=dtype)
        for name, expected in small.items():
            largest = expected.abs().amax(1, keepdim=True)
            assert ((store.read(name) - expected).abs() <= tolerance * largest).all()
        assert torch.equal(store.read("a.b", [3]), torch.zeros(1, 3))


def test_a_power_of_two_changes_no_bit_of_float16(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    exact = {name: g.half().float() for name, g in gradients.items()}
    store = write_store(tmp_path / "s", exact, dtype="float16")
    for name, expected in exact.items():
        assert torch.equal(store.read(name), expected)


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "swapped", "torn line", "lost line", "moved lines"])
def test_building_again_mends_what_is_damaged_and_nothing_else(
    tmp_path: Path, gradients: dict[str, Tensor], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    write_store(tmp_path, gradients)
    whole = files(tmp_path)
    shard, journal = tmp_path / "shard-00001.safetensors", tmp_path / "journal"
    again = [1]
    if how == "flipped":
        shard.write_bytes(whole[shard.name][:-30] + b"x" + whole[shard.name][-29:])
    elif how == "truncated":
        shard.write_bytes(whole[shard.name][:-1])
    elif how == "missing":
        shard.unlink()
    elif how == "swapped":
        shard.write_bytes(whole["shard-00000.safetensors"])
        (tmp_path / "shard-00000.safetensors").write_bytes(whole[shard.name])
        again = [0, 1]
    elif how == "torn line":
        journal.write_bytes(whole["journal"][:-9])
        again = [2]
    elif how == "lost line":
        journal.write_bytes(b"".join(whole["journal"].splitlines(keepends=True)[::2]))
    else:
        journal.write_bytes(b"".join(whole["journal"].splitlines(keepends=True)[::-1]))
        again = []
    with pytest.raises(inf.StoreError, match=r"shard-0000|journal|unfinished"):
        inf.GradientStore.open(tmp_path).verify()
    with writer(tmp_path, gradients) as out:
        assert out.missing == again
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (len(again) if "line" not in how else 0)
        assert all("it is computed again" in line and "rows" in line for line in said)
    write_store(tmp_path, gradients).verify()
    assert files(tmp_path) == whole


@pytest.mark.parametrize(
    "left", [[], [".lock"], [".lock", "ids.bin"], [".lock", "ids.bin", "journal", "manifest.json.part"]]
)
def test_a_build_that_was_killed_before_its_manifest_goes_on(
    tmp_path: Path, gradients: dict[str, Tensor], left: list[str]
) -> None:
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    names = [f"r{row}" for row in range(10)]
    store = write_store(tmp_path, gradients, ids=names)
    store.verify()
    assert list(store.ids) == names
    assert not (tmp_path / "manifest.json.part").exists()


def test_adding_a_shard_writes_as_much_however_many_there_are(tmp_path: Path) -> None:
    rows = 300
    gradients = {"a": torch.arange(2.0 * rows).reshape(rows, 2)}
    sizes, stamps = [], []
    with writer(tmp_path, gradients, shard_rows=1) as out:
        manifest = (tmp_path / "manifest.json").stat().st_mtime_ns
        before = os.stat(tmp_path / "journal").st_ino, os.stat(tmp_path / "journal").st_size
        for shard in out.missing:
            out.write(shard, {"a": gradients["a"][shard : shard + 1]}, {})
            now = os.stat(tmp_path / "journal")
            assert now.st_ino == before[0], "it only grows"
            sizes.append(now.st_size - before[1])
            before = now.st_ino, now.st_size
        stamps.append((tmp_path / "manifest.json").stat().st_mtime_ns)
    assert max(sizes) - min(sizes) <= 10, "digits of numbers alone"
    assert stamps == [manifest]
    inf.GradientStore.open(tmp_path).verify()


@pytest.mark.parametrize("name", ["no-permission", "file", "x" * 300, "file/below"])
def test_where_nothing_can_be_written(tmp_path: Path, gradients: dict[str, Tensor], name: str) -> None:
    (tmp_path / "file").write_text("mine")
    if name == "no-permission":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        (tmp_path / name).mkdir(mode=0o500)
        name += "/store"
    with pytest.raises(inf.InfluenceError, match=r"cannot be written \("):
        write_store(tmp_path / name, gradients)
    assert (tmp_path / "file").read_text() == "mine"


def test_ranks_that_finish_in_any_order_give_the_same_bytes(tmp_path: Path, gradients: dict[str, Tensor]) -> None:
    write_store(tmp_path / "one", gradients)
    with writer(tmp_path / "two", gradients) as out:
        for shard in (2, 0, 1):
            rows = slice(out.span(shard).start, out.span(shard).stop)
            out.write(shard, {name: tensor[rows] for name, tensor in gradients.items()}, {})
    assert files(tmp_path / "one") == files(tmp_path / "two")
