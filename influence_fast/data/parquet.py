"""Parquet files: in batches, and no larger than the file's own size allows.

A column of one repeated text takes a few bytes on disk and gigabytes in memory, so what a file claims is compared with its
size before anything is read, and what comes out is counted while it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from influence_fast.errors import InputError

# What any file may take, and how many times its size beyond that.
_FREE_BYTES, _TIMES = 256 << 20, 100
_ROWS = 1024


def bounded_batches(argument: str, path: Path) -> Iterator[Any]:
    """The record batches of a Parquet file.

    Raises:
        InputError: what is no Parquet file, is damaged, or would take more than 256 MiB and 100 times its size.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    limit = max(_FREE_BYTES, _TIMES * path.stat().st_size)
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            _check(argument, path, sum(group.total_byte_size for group in groups), limit)
            held = 0
            for batch in file.iter_batches(batch_size=_ROWS):
                held += batch.nbytes
                _check(argument, path, held, limit)
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{argument}: cannot read {str(path)!r} ({str(error).strip().splitlines()[0]})") from None


def _check(argument: str, path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise InputError(
            f"{argument}: {str(path)!r} of {path.stat().st_size:,} bytes holds more than {limit:,} bytes, the most that a "
            "file of its size may take; write it anew in less compressed form (JSONL, say)"
        )
