"""Parquet files are read in batches, and none takes far more memory than its size."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influence_fast import InputError
from influence_fast.data import parquet
from influence_fast.data.loading import read_table


def test_a_table_comes_back(tmp_path: Path) -> None:
    table = pa.table({"text": [f"t{i}" for i in range(3000)], "label": list(range(3000)), "none": [None] * 3000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert parquet.read_parquet("train", tmp_path / "a.parquet") == table
    rows = read_table("train", str(tmp_path / "a.parquet"))
    assert rows[2999] == {"text": "t2999", "label": 2999, "none": None}
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    assert len(read_table("train", str(tmp_path / "empty.parquet"))) == 0


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_small_file_of_much_memory_is_refused(
    tmp_path: Path, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text for every row is kept once: in batches it is seen before it fills the memory."""
    monkeypatch.setattr(parquet, "_FREE_BYTES", 1 << 20)
    taken: list[int] = []
    check = parquet._check
    monkeypatch.setattr(parquet, "_check", lambda *given: (taken.append(given[2]), check(*given)))
    table = pa.table({"text": ["x" * 1000] * 200_000})
    pq.write_table(table, tmp_path / "a.parquet", compression=compression)
    size = (tmp_path / "a.parquet").stat().st_size
    assert size < 100_000
    with pytest.raises(InputError, match=rf"train: .* of {size:,} bytes holds more than [\d,]+ bytes"):
        parquet.read_parquet("train", tmp_path / "a.parquet")
    assert max(taken) < 3 * max(1 << 20, 100 * size)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_damaged_files_are_one_sentence(tmp_path: Path, length: int) -> None:
    pq.write_table(pa.table({"a": list(range(100))}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:length])
    with pytest.raises(InputError, match=r"train: (cannot read|.* is empty)") as caught:
        read_table("train", str(tmp_path / "a.parquet"))
    assert "\n" not in str(caught.value)
