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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from influence_fast.data.parquet import most_bytes, read_parquet
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
        ".csv": _cells,
        ".tsv": _cells,
    }
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{argument}: {str(path)!r} is empty")
        yield from readers.get(kind, _json_lines)(argument, path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{argument}: cannot read {str(path)!r}: it is not UTF-8 (byte {error.object[error.start]:#04x}); "
            "save it as UTF-8"
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
        return {}  # What is wrong with the file is said when its rows are read.


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


class _Bounded(io.RawIOBase):
    """What a compressed file holds, as far as a file of its size may: a few bytes can stand for any amount."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._left = stream, most_bytes(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise OSError("it holds more than a file of its size may; unpack it first")
        buffer[: len(data)] = data
        return len(data)


def encoding_of(path: Path) -> str:
    """Of a text file, by its byte order mark."""
    import pyarrow as pa

    with pa.input_stream(str(path), compression="detect") as stream:
        start = stream.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return "utf-8-sig" if start.startswith(b"\xef\xbb\xbf") else "utf-8"


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """The text of a file as it is: no line end translated, a byte order mark left out."""
    import pyarrow as pa

    with (
        pa.input_stream(str(path), compression="detect") as stream,
        io.BufferedReader(_Bounded(stream, path), 1 << 20) as bounded,
        io.TextIOWrapper(bounded, encoding=encoding_of(path), newline="") as text,
    ):
        yield text


def _lines(text: TextIO) -> Iterator[tuple[int, str]]:
    """Lines without their ends, whether of Unix, Windows or of both."""
    return ((number, line.rstrip("\r\n")) for number, line in enumerate(text, 1))


def _json_lines(argument: str, path: Path) -> NumberedRows:
    with opened(path) as text:
        first = True
        for number, line in _lines(text):
            if not line.strip():
                continue
            if first and _begins_list(line):
                raise InputError(
                    f"{argument}: {str(path)!r} holds one JSON list, and not an object a line; rename it so that it ends in "
                    ".json"
                )
            first = False
            yield number, _object(line)


def _begins_list(line: str) -> bool:
    """Whether a line is a list of objects, or its beginning."""
    if not line.lstrip().startswith("["):
        return False
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return bool(found) and all(isinstance(row, dict) for row in found)


def _object(text: str) -> Row | BadLine:
    try:
        found = json.loads(text, parse_float=WrittenNumber)
    except (ValueError, RecursionError) as error:
        return BadLine(f"is no JSON ({error})")
    return found if isinstance(found, dict) else BadLine(f"holds a {type(found).__name__}, expected an object")


def _json(argument: str, path: Path) -> NumberedRows:
    """A list of objects, an object with one such list, or lines of objects."""
    with opened(path) as text:
        whole = text.read()
    try:
        found = json.loads(whole, parse_float=WrittenNumber)
    except (ValueError, RecursionError) as error:
        if _begins_list(whole):
            raise InputError(f"{argument}: cannot read {str(path)!r}: it is no JSON ({error})") from None
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
    for batch in read_parquet(argument, path):
        yield from ((next(number), row) for row in batch.to_pylist())


@dataclass(frozen=True)
class TableFormat:
    """How a CSV or TSV file separates its cells, and what its header says."""

    separator: str
    quoted: bool
    header: list[str]

    def reader(self, text: Iterable[str]) -> Any:
        """Rows of cells, as ``csv.reader`` gives them."""
        quoting = {"strict": True} if self.quoted else {"quoting": csv.QUOTE_NONE}
        return csv.reader(text, delimiter=self.separator, **quoting)

    def writer(self, text: TextIO) -> Any:
        """What writes a row."""
        quoting: Any = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        quote = _QUOTE if self.quoted else None
        return csv.writer(text, delimiter=self.separator, quoting=quoting, quotechar=quote)


def table_format(path: Path) -> TableFormat:
    """The format of a CSV or TSV file, found in all of it."""
    csv.field_size_limit(sys.maxsize)
    if format_of(path.name) == ".tsv":
        separator, quoted = "\t", _quotes_cells(path)
    else:
        separator, quoted = _csv_quotes(path)
    form = TableFormat(separator, quoted, [])
    with opened(path) as text:
        return TableFormat(separator, quoted, next(form.reader(text), []))


def _csv_quotes(path: Path) -> tuple[str, bool]:
    with opened(path) as text:
        header = text.readline()
    # A header without a comma is that of a table that something else separates.
    separator = "," if "," in header else max(",;\t|", key=header.count)
    with opened(path) as text:
        try:
            for _ in csv.reader(text, delimiter=separator, strict=True):
                pass
            return separator, True
        except csv.Error:
            # Quotes that do not close, or do not end a cell, quote nothing, if every line has its cells without them.
            return separator, _widths(path, separator) > 1


def _widths(path: Path, separator: str) -> int:
    """How many different numbers of cells lines have where quotes mean nothing."""
    with opened(path) as text:
        return len({line.count(separator) for _, line in _lines(text) if line})


def _quotes_cells(path: Path) -> bool:
    """Whether the quotes of a TSV stand around cells, as writers of CSV put them, or are part of its texts.

    Texts of this format often hold a lone quote, which swallows lines where it is taken for the beginning of a cell. So
    where every line has as many cells as the header, quotes count as such only if each that occurs stands around a whole
    cell that needs it, or around all cells of a column.
    """
    with opened(path) as text:
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


def _cells(argument: str, path: Path) -> NumberedRows:
    """Rows of a table by its header's names, every cell as text."""
    begin = 1
    try:
        form = table_format(path)
        doubled = sorted({name for name in form.header if form.header.count(name) > 1})
        if doubled:
            raise InputError(f"{argument}: {str(path)!r} has more than one column {doubled[0]!r}")
        with opened(path) as text:
            reader = form.reader(text)
            next(reader, None)
            begin = reader.line_num + 1
            for cells in reader:
                if cells:
                    fits = len(cells) == len(form.header)
                    yield (
                        begin,
                        dict(zip(form.header, cells, strict=True))
                        if fits
                        else BadLine(f"has {len(cells)} cells, the header {len(form.header)}"),
                    )
                begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{argument}: cannot read {str(path)!r}, line {begin} ({error})") from None
