"""Files to rows: JSONL, CSV, TSV, Parquet, saved data sets, hub names."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from influence_fast.data.parquet import read_parquet
from influence_fast.errors import InputError


def read_table(argument: str, path: str) -> Any:
    """Rows of a JSONL, CSV or Parquet file, a saved data set, or a hub name: a ``datasets.Dataset``."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    file = Path(path)
    readers = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
    if file.is_dir():
        try:
            found = datasets.load_from_disk(path, keep_in_memory=True)
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"{argument}: {path!r} is no folder of a saved data set ({error})") from None
        return found["train"] if isinstance(found, datasets.DatasetDict) else found
    if not file.exists():
        if file.suffix or path.count("/") > 1:
            raise InputError(f"{argument}: no file {path!r}")
        name, _, split = path.partition(":")
        try:
            return datasets.load_dataset(name, split=split or "train", **_no_code(datasets.__version__))
        except Exception as error:
            raise InputError(f"{argument}: {path!r} is no file, and no data set on the hub ({error})") from None
    if file.suffix not in readers:
        raise InputError(f"{argument}: expected a file ending in {', '.join(readers)}, got {path!r}")
    if file.stat().st_size == 0:
        raise InputError(f"{argument}: {path!r} is empty")
    if file.suffix == ".parquet":
        return datasets.Dataset(read_parquet(argument, file))
    with tempfile.TemporaryDirectory() as cache:
        extra = {"sep": "\t"} if file.suffix == ".tsv" else {}
        try:
            return datasets.load_dataset(
                readers[file.suffix], data_files=path, split="train", cache_dir=cache, keep_in_memory=True, **extra
            )
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            reason = error.__cause__ or error
            raise InputError(f"{argument}: cannot read {path!r} ({str(reason).strip().splitlines()[0]})") from None


def _no_code(version: str) -> dict[str, bool]:
    """Versions below 4 may ask whether to run a data set's script; later ones run none, and refuse the argument."""
    return {"trust_remote_code": False} if int(version.split(".")[0]) < 4 else {}
