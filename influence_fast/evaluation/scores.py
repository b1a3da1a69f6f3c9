"""Files of scores: CSV, or Parquet, which keeps numbers to the bit and ids of any kind."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from influence_fast._csv import original, write_rows
from influence_fast._files import atomic_path
from influence_fast.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_JSON_IDS = b"influence_fast.ids"
_WHOLE = re.compile(r"0|-?[1-9][0-9]*")


def write_scores(
    path: str | os.PathLike[str], ids: Sequence[int | str], scores: Sequence[float], ranks: Sequence[int]
) -> None:
    """Write ``id``, ``score`` and ``rank`` of each row: Parquet where the name ends in ``.parquet``, else CSV."""
    target = Path(path)
    if target.suffix.lower() != ".parquet":
        with atomic_path(target) as part, open(part, "w", newline="", encoding="utf-8") as file:
            write_rows(file, ["id", "score", "rank"], zip(ids, scores, ranks, strict=True))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(ids)
    # Parquet has neither columns of two types nor halves of surrogate pairs.
    plain = all(type(name) is int and -(2**63) <= name < 2**63 for name in names) or all(
        isinstance(name, str) and not any("\ud800" <= letter <= "\udfff" for letter in name) for name in names
    )
    column = names if plain else [json.dumps(name) for name in names]
    table = pa.table(
        {
            "id": pa.array(column, None if plain else pa.string()),
            "score": pa.array(np.asarray(scores, np.float64)),
            "rank": pa.array(np.asarray(ranks, np.int64)),
        }
    )
    if not plain:
        table = table.replace_schema_metadata({_JSON_IDS: b"json"})
    with atomic_path(target) as part:
        pq.write_table(table, part)


def read_scores(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The table of ``influence-fast score``, or any other with these columns: a frame in the file's order.

    Parquet gives back ids as they were. Of CSV, where numbers and text look the same, ids are whole numbers where all
    are written as such, else text; formulas that were made safe are as before.

    Raises:
        InputError: there is no such file, or it is no table.
    """
    import pandas as pd

    source = Path(path)
    try:
        if source.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(source)
            frame = table.to_pandas()
            if (table.schema.metadata or {}).get(_JSON_IDS) == b"json":
                frame["id"] = pd.Series([json.loads(name) for name in frame["id"]], dtype=object)
            return frame
        # Before pandas 3 the last digit may be another by default.
        frame = pd.read_csv(
            source,
            dtype={"id": str},
            keep_default_na=False,
            na_values={"score": ["nan", ""]},
            float_precision="round_trip",
        )
    except FileNotFoundError:
        raise InputError(f"path: there is no file {source}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"path: {source} is no table of scores ({error})") from None
    if "id" in frame:
        frame["id"] = _as_written(frame["id"].tolist())
    return frame


def _as_written(names: list[str]) -> Any:
    numbers = [int(name) for name in names if _WHOLE.fullmatch(name)]
    if len(numbers) == len(names) and all(abs(number) < 2**63 for number in numbers):
        return numbers
    return [original(name) for name in names]
