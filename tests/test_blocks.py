"""Files that are checked while they are read, held against whole hashes and against another library's checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from influence_fast._blocks import BLOCK, BlockFile, BlockSums, HashedFile, PlainFile, block_count, root_of
from influence_fast.errors import StoreError

DATA = np.random.default_rng(0).bytes(3 * BLOCK + 100)


def write(path: Path, data: bytes, piece: int) -> BlockFile:
    sums = BlockSums()
    for at in range(0, len(data), piece):
        sums.add(memoryview(data)[at : at + piece])
    path.write_bytes(data + sums.table())
    return BlockFile(path, path.stat().st_size, root_of(sums.table()))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 100])
@pytest.mark.parametrize("piece", [999, BLOCK, 50_000])
def test_the_table_is_of_every_block(tmp_path: Path, size: int, piece: int) -> None:
    file = write(tmp_path / "f", DATA[:size], piece)
    raw = (tmp_path / "f").read_bytes()
    expected = [xxhash.xxh3_64_intdigest(DATA[at : min(at + BLOCK, size)]) for at in range(0, size, BLOCK)]
    assert np.frombuffer(raw[size:], "<u8").tolist() == expected
    assert (file.covered, file.blocks, block_count(len(raw))) == (size, len(expected), len(expected))
    assert file.read(0, size) == DATA[:size]
    file.check_all()


@pytest.mark.parametrize("at", [0, 5, BLOCK - 1, BLOCK, 2 * BLOCK + 7, 3 * BLOCK + 99])
def test_a_flipped_bit_is_found_by_whoever_reads_its_block(tmp_path: Path, at: int) -> None:
    root, size = write(tmp_path / "f", DATA, BLOCK).root, (tmp_path / "f").stat().st_size
    with open(tmp_path / "f", "r+b") as out:
        os.pwrite(out.fileno(), bytes([DATA[at] ^ 4]), at)
    block = at // BLOCK
    for begin, end in [
        (at, at + 1),
        (block * BLOCK, min((block + 1) * BLOCK, len(DATA))),
        (0, len(DATA)),
        (at, len(DATA)),
    ]:
        for mapped in (False, True):
            file = BlockFile(tmp_path / "f", size, root)
            with pytest.raises(StoreError, match=f"the checksum of bytes {block * BLOCK} to"):
                file.ensure(begin, end) if mapped else file.read(begin, end - begin)
    file = BlockFile(tmp_path / "f", size, root)
    for other in {0, 1, 2, 3} - {block}:
        assert file.read(other * BLOCK, 50) == DATA[other * BLOCK : other * BLOCK + 50]
    assert PlainFile(tmp_path / "f", size).read(at, 1) != DATA[at : at + 1]


def test_each_block_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, hashed = write(tmp_path / "f", DATA, BLOCK), []
    one = xxhash.xxh3_64_intdigest
    monkeypatch.setattr(
        "influence_fast._blocks.xxh3_64_intdigest", lambda data: (hashed.append(len(data)), one(data))[1]
    )
    for at in range(0, len(DATA), 1000):
        file.read(at, min(1000, len(DATA) - at))
    file.ensure(0, len(DATA))
    assert sum(hashed) == len(DATA)


def test_a_damaged_table_and_other_sizes(tmp_path: Path) -> None:
    file = write(tmp_path / "f", DATA, BLOCK)
    raw = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(StoreError, match="its checksums are not those"):
        file.read(0, 1)
    (tmp_path / "f").write_bytes(raw[:-1])
    with pytest.raises(StoreError, match=f"damaged, {len(raw) - 1} bytes long where {len(raw)} were written"):
        file.check_size()
    for at, size in ((-1, 2), (len(raw), 1), (0, len(raw) + 1)):
        with pytest.raises(StoreError, match="are outside its"):
            file.read(at, size)
    (tmp_path / "f").unlink()
    with pytest.raises(StoreError, match="missing"):
        file.read(0, 1)
    with pytest.raises(StoreError, match="cannot hold its checksums"):
        BlockFile(tmp_path / "f", BLOCK + 12, "0" * 16)


def test_a_hash_of_the_whole(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(DATA)
    digest = hashlib.sha256(DATA).hexdigest()
    assert HashedFile(tmp_path / "f", len(DATA), digest).read(7, 9) == DATA[7:16]
    with pytest.raises(StoreError, match="its SHA-256 is"):
        HashedFile(tmp_path / "f", len(DATA), digest[::-1]).read(7, 9)
