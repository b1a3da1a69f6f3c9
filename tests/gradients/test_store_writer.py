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
