"""One file to rows, each with the line that it begins at: JSON lines, JSON, CSV, TSV, Parquet, compressed or not.

A cell of a CSV is text and stays as it is written: what a class, a number or nothing is, the column's use decides. A line
that cannot be read comes as :class:`BadLine` in its place, so that every one of them can be named.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from influence_fast.data.parquet import bounded_batches
from influence_fast.errors import InputError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst", ".bz2")
_QUOTE = '"'


class WrittenNumber(float):
    """A number that keeps how the file writes it, for where it is used as text."""

    written: str

    def __new__(cls, written: str) -> WrittenNumber:
        number = super().__new__(cls, written)
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written

    def __reduce__(self) -> tuple[Any, ...]:
        return WrittenNumber, (self.written,)


@dataclass(frozen=True)
class BadLine:
    """Why a line gave no row."""

    reason: str


Row = dict[str, Any]
NumberedRows = Iterator[tuple[int, Row | BadLine]]


def format_of(name: str) -> str | None:
    """The ending that says how a file is read, without that of a compression; None for any other file."""
    path = Path(name.lower())
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
    return path.suffix if path.suffix in FORMATS else None


def read_file(argument: str, path: Path) -> NumberedRows:
    """``(line, row)`` of each row, lines counted from 1; of a Parquet file or a JSON list, the number of the row.

    Raises:
        InputError: a file that is no such file at all; names ``argument``.
    """
    kind = format_of(path.name)
    if kind is None:
        raise InputError(f"{argument}: expected a file ending in {', '.join(FORMATS)}, got {str(path)!r}")
    readers: dict[str, Callable[[str, Path], NumberedRows]] = {
        ".parquet": _parquet,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _tsv,
    }
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{argument}: {str(path)!r} is empty")
        yield from readers.get(kind, _json_lines)(argument, path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{argument}: cannot read {str(path)!r}: it is not UTF-8 (byte {error.object[error.start]:#04x})"
        ) from None
    except (OSError, EOFError) as error:
        raise InputError(f"{argument}: cannot read {str(path)!r} ({error})") from None


def class_names(path: Path) -> dict[str, list[str]]:
    """Names of the classes by column, where a Parquet file that ``datasets`` wrote knows them."""
    if format_of(path.name) != ".parquet":
        return {}
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return feature_names(_features(parquet.read_schema(path)))
    except (pa.ArrowException, OSError):
        # Whoever reads the rows says what is wrong.
        return {}


def feature_names(features: Any) -> dict[str, list[str]]:
    """Names of the classes by column, of the features of a ``datasets.Dataset``; those of a list's entries too."""
    out = {}
    for name, feature in (features or {}).items():
        while not hasattr(feature, "names") and hasattr(feature, "feature"):
            feature = feature.feature
        if getattr(feature, "names", None):
            out[name] = list(feature.names)
    return out


def _features(schema: Any) -> Any:
    import datasets

    try:
        return datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError):
        # Types that datasets has no name for hold no class names either.
        return {}


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The text of a file as it is: no line end translated, a byte order mark left out."""
    import pyarrow as pa

    with pa.input_stream(str(path), compression="detect") as stream:
        start = stream.read(4)
    wide = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    with (
        pa.input_stream(str(path), compression="detect") as stream,
        io.TextIOWrapper(stream, "utf-16" if wide else "utf-8-sig", newline="") as text,
    ):
        yield text


def _lines(text: TextIO) -> Iterator[tuple[int, str]]:
    """Lines without their ends, whether of Unix, Windows or of both."""
    return ((number, line.rstrip("\r\n")) for number, line in enumerate(text, 1))


def _json_lines(argument: str, path: Path) -> NumberedRows:
    with _opened(path) as text:
        for number, line in _lines(text):
            if not line.strip():
                continue
            yield number, _object(line)


def _object(text: str) -> Row | BadLine:
    try:
        found = json.loads(text, parse_float=WrittenNumber)
    except (ValueError, RecursionError) as error:
        return BadLine(f"is no JSON ({error})")
    return found if isinstance(found, dict) else BadLine(f"holds a {type(found).__name__}, expected an object")


def _json(argument: str, path: Path) -> NumberedRows:
    """A list of objects, an object with one such list, or lines of objects."""
    with _opened(path) as text:
        whole = text.read()
    try:
        found = json.loads(whole, parse_float=WrittenNumber)
    except (ValueError, RecursionError):
        yield from _json_lines(argument, path)
        return
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        found = lists[0] if len(lists) == 1 else [found]
    if not isinstance(found, list):
        raise InputError(f"{argument}: {str(path)!r} holds a {type(found).__name__}, expected a list of objects")
    for number, row in enumerate(found, 1):
        yield number, row if isinstance(row, dict) else BadLine(f"is a {type(row).__name__}, expected an object")


def _parquet(argument: str, path: Path) -> NumberedRows:
    number = itertools.count(1)
    for batch in bounded_batches(argument, path):
        yield from ((next(number), row) for row in batch.to_pylist())


def _csv(argument: str, path: Path) -> NumberedRows:
    with _opened(path) as text:
        header = text.readline()
    # A header without a comma is that of a table that something else separates.
    separator = "," if "," in header else max(",;\t|", key=header.count)
    with _opened(path) as text:
        try:
            for _ in csv.reader(text, delimiter=separator, strict=True):
                pass
            quoted = True
        except csv.Error:
            # Quotes that do not close, or do not end a cell, quote nothing, if every line has its cells without them.
            quoted = _widths(path, separator) > 1
    yield from _cells(argument, path, separator, quoted)


def _widths(path: Path, separator: str) -> int:
    """How many different numbers of cells lines have where quotes mean nothing."""
    with _opened(path) as text:
        return len({line.count(separator) for _, line in _lines(text) if line})


def _tsv(argument: str, path: Path) -> NumberedRows:
    yield from _cells(argument, path, "\t", _quotes_cells(path))


def _quotes_cells(path: Path) -> bool:
    """Whether the quotes of a TSV stand around cells, as writers of CSV put them, or are part of its texts.

    Texts of this format often hold a lone quote, which swallows lines where it is taken for the beginning of a cell. So
    where every line has as many cells as the header, quotes count as such only if each that occurs stands around a whole
    cell that needs it, or around all cells of a column.
    """
    with _opened(path) as text:
        rows = [line.split("\t") for _, line in _lines(text) if line]
    if not any(_QUOTE in cell for row in rows for cell in row):
        return False
    width = len(rows[0])
    if any(len(row) != width for row in rows):
        return True
    with_quotes = [cell for row in rows for cell in row if _QUOTE in cell]
    if not all(_is_quoted(cell) for cell in with_quotes):
        return False
    columns = [[row[place] for row in rows[1:]] for place in range(width)]
    whole = any(column and all(map(_is_quoted, column)) for column in columns)
    return whole or all(_QUOTE in cell[1:-1] for cell in with_quotes)


def _is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == _QUOTE and _QUOTE not in cell[1:-1].replace('""', "")


def _cells(argument: str, path: Path, separator: str, quoted: bool) -> NumberedRows:
    """Rows of a table by its header's names, every cell as text."""
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as text:
        reader = (
            csv.reader(text, delimiter=separator, strict=True)
            if quoted
            else csv.reader(text, delimiter=separator, quoting=csv.QUOTE_NONE)
        )
        begin = 1
        try:
            header = next(reader, [])
            doubled = sorted({name for name in header if header.count(name) > 1})
            if doubled:
                raise InputError(f"{argument}: {str(path)!r} has more than one column {doubled[0]!r}")
            begin = reader.line_num + 1
            for cells in reader:
                if cells:
                    fits = len(cells) == len(header)
                    yield (
                        begin,
                        dict(zip(header, cells, strict=True))
                        if fits
                        else BadLine(f"has {len(cells)} cells, the header {len(header)}"),
                    )
                begin = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{argument}: cannot read {str(path)!r}, line {begin} ({error})") from None
