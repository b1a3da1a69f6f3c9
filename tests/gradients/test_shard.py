"""Headers are held against the store, entry by entry; other readers of safetensors read shards too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stores import write_store

import influence_fast as inf
from influence_fast._blocks import PlainFile
from influence_fast.gradients.shard import Shard


@pytest.fixture
def path(tmp_path: Path) -> Path:
    data = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(4, 5)}
    write_store(tmp_path, data, {"correct": torch.tensor([True, False, True, True])})
    return tmp_path / "shard-00000.safetensors"


def opened(path: Path, **settings: Any) -> Shard:
    given = {"first": 0, "rows": 4, "dims": {"a": 3, "b": 5}, "dtype": "float32", **settings}
    return Shard(PlainFile(path, path.stat().st_size), **given)


def rewrite(path: Path, header: dict[str, Any]) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def test_safetensors_reads_a_shard(path: Path) -> None:
    found = load_file(path)
    assert set(found) == {"a", "b", "@sqnorm/a", "@sqnorm/b", "@column/correct", "@blocks"}
    assert torch.equal(found["a"], torch.arange(12.0).reshape(4, 3))
    assert header(path)["__metadata__"]["first"] == "0"
    assert opened(path).places["@blocks"].end == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a", {"dtype": "F64"}, "does not fit bytes"),
        ("a", {"dtype": "X9"}, "dtype: expected one of F64"),
        ("a", {"dtype": "I32"}, r"'a': expected F32 \[4, 3\], got I32"),
        ("a", {"shape": [3, 4]}, r"'a': expected F32 \[4, 3\], got F32 \[3, 4\]"),
        ("a", {"shape": [4, 10**9]}, "shape: expected numbers within the file"),
        ("a", {"shape": [4, True]}, "shape: expected numbers within the file"),
        ("a", {"shape": []}, "shape: expected numbers within the file"),
        ("a", {"data_offsets": [10**9, 10**9 + 48]}, "data_offsets: expected numbers within the file"),
        ("a", {"data_offsets": [-48, 0]}, "data_offsets: expected numbers within the file"),
        ("a", {"data_offsets": [0, 48]}, "begins at byte"),
        ("a", {"data_offsets": [48, 0]}, "does not fit bytes"),
        ("a", {"more": 1}, "expected dtype, shape and data_offsets"),
        ("@sqnorm/a", {"shape": [2], "data_offsets": [0, 16]}, "begins at byte|expected F64"),
        ("@column/correct", {"shape": [2, 2]}, "expected 4 rows, got"),
    ],
)
def test_a_header_that_says_something_else(path: Path, name: str, change: dict, message: str) -> None:
    changed = header(path)
    changed[name] = {**changed[name], **change}
    rewrite(path, changed)
    with pytest.raises(inf.StoreError, match=rf"shard-00000\.safetensors: damaged header .*({message}).*rows 0 to 3"):
        opened(path).tensor("a")


def test_other_names_dtypes_and_shards(path: Path) -> None:
    whole = header(path)
    for old, new, message in [("b", "c", "lacks 'b'"), ("@column/correct", "@other", "is no layer")]:
        rewrite(path, {new if name == old else name: entry for name, entry in whole.items()})
        with pytest.raises(inf.StoreError, match=message):
            opened(path).tensor("a")
    rewrite(path, whole)
    with pytest.raises(inf.StoreError, match=r"expected BF16|does not fit"):
        opened(path, dtype="bfloat16").tensor("a")
    with pytest.raises(inf.StoreError, match=r"lacks '@scale/a'|expected I8"):
        opened(path, dtype="int8").tensor("a")
    with pytest.raises(inf.StoreError, match=r"expected that of .*shard-00001"):
        opened(path, named={"file": "shard-00001.safetensors"}).tensor("a")


@pytest.mark.parametrize("size", [0, 4, 10**6, 2**63])
def test_a_length_that_is_no_length(path: Path, size: int) -> None:
    raw = path.read_bytes()
    path.write_bytes(size.to_bytes(8, "little") + raw[8:])
    with pytest.raises(inf.StoreError, match="damaged header"):
        opened(path).tensor("a")


def test_what_a_file_claims_is_held_against_its_size(path: Path) -> None:
    """A header that claims gigabytes, in a file that is as long and holds nothing, is refused before it is read."""
    import tracemalloc

    with open(path, "wb") as file:
        file.write((3 << 30).to_bytes(8, "little"))
        file.truncate(4 << 30)
    tracemalloc.start()
    with pytest.raises(inf.StoreError, match=f"its length is {3 << 30} bytes"):
        opened(path).tensor("a")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
