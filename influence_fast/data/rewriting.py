"""The same data with fewer rows, or other values in some cells: in the input's own format, columns and order.

A row that stays as it is keeps its bytes where the format has lines (JSON lines, CSV, TSV); in JSON and Parquet its values,
their types and the schema.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from influence_fast._files import atomic_path
from influence_fast.data.files import BadLine, encoding_of, format_of, opened, read_file, table_format
from influence_fast.errors import InputError

_ARROW = {".zst": "zstd", ".bz2": "bz2"}

Change = Callable[[int], Mapping[str, Any] | None]
"""What becomes of row ``i``: None where it is left out, else the cells that change."""


def rewrite(argument: str, source: Path, out: Path, change: Change, first: int = 0) -> int:
    """Write a data file anew; how many rows it had.

    Args:
        argument: what messages call the source.
        source: a file that ``read_table`` reads; compressed ones too.
        out: where to write; of the same format, compressed as its own name says. Written whole or not at all.
        change: what becomes of each row, by number.
        first: number of the file's first row.

    Raises:
        InputError: ``out`` of another format, a column that the file lacks, a file that cannot be read.
    """
    kind = format_of(source.name)
    if format_of(out.name) != kind:
        raise InputError(f"out: expected a {kind} file, as {source.name} is one, got {str(out)!r}")
    write = {".parquet": _parquet, ".json": _json, ".csv": _csv, ".tsv": _csv}.get(str(kind), _json_lines)
    with atomic_path(out) as part:
        return write(argument, source, part, change, first, out.suffix.lower())


def _json_lines(argument: str, source: Path, part: Path, change: Change, first: int, ending: str) -> int:
    def changed(text: str, cells: Mapping[str, Any]) -> str:
        row = json.loads(text)
        _check(argument, source, row, cells)
        return json.dumps({**row, **cells}, ensure_ascii=False)

    return _by_line(argument, source, part, change, first, ending, changed)


def _csv(argument: str, source: Path, part: Path, change: Change, first: int, ending: str) -> int:
    form = table_format(source)

    def changed(text: str, cells: Mapping[str, Any]) -> str:
        values = next(form.reader(io.StringIO(text, newline="")))
        row = dict(zip(form.header, values, strict=True))
        _check(argument, source, row, cells)
        row |= {name: "" if value is None else str(value) for name, value in cells.items()}
        line = io.StringIO(newline="")
        try:
            form.writer(line).writerow(row.values())
        except csv.Error as error:
            raise InputError(f"{argument}: {source.name} cannot hold {list(cells.values())} ({error})") from None
        return line.getvalue().removesuffix("\r\n")

    return _by_line(argument, source, part, change, first, ending, changed)


def _by_line(
    argument: str,
    source: Path,
    part: Path,
    change: Change,
    first: int,
    ending: str,
    changed: Callable[[str, Mapping[str, Any]], str],
) -> int:
    """Rows that begin at a line each; what stands between two rows belongs to the one before."""
    rows = list(read_file(argument, source))
    starts = [line for line, _ in rows]
    number = first
    with opened(source) as text, _written(part, encoding_of(source), ending) as out:
        lines = iter(text)
        at = 1

        def until(line: int | None) -> str:
            nonlocal at
            found = []
            while line is None or at < line:
                piece = next(lines, None)
                if piece is None:
                    break
                found.append(piece)
                at += 1
            return "".join(found)

        out.write(until(starts[0] if starts else None))
        for (_, row), following in zip(rows, [*starts[1:], None], strict=True):
            raw = until(following)
            if isinstance(row, BadLine):
                out.write(raw)
                continue
            cells = change(number)
            number += 1
            if cells is None:
                continue
            if cells:
                body = raw.rstrip("\r\n")
                raw = changed(body, cells) + raw[len(body) :]
            out.write(raw)
    return number - first


def _json(argument: str, source: Path, part: Path, change: Change, first: int, ending: str) -> int:
    rows = list(read_file(argument, source))
    with opened(source) as text:
        whole = text.read()
    try:
        document = json.loads(whole)
    except ValueError:
        # Lines of objects under this name.
        return _json_lines(argument, source, part, change, first, ending)
    number, kept = first, []
    for _, row in rows:
        if isinstance(row, BadLine):
            continue
        cells = change(number)
        number += 1
        if cells is not None:
            _check(argument, source, row, cells)
            kept.append({**row, **cells})
    if isinstance(document, dict):
        document = {name: kept if _is_table(value) else value for name, value in document.items()}
    else:
        document = kept
    with _written(part, encoding_of(source), ending) as out:
        json.dump(document, out, ensure_ascii=False, indent=1 if whole.lstrip()[1:2].isspace() else None)
        out.write("\n")
    return number - first


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _parquet(argument: str, source: Path, part: Path, change: Change, first: int, ending: str) -> int:
    import pyarrow.parquet as parquet

    number = first
    with parquet.ParquetFile(source) as file, parquet.ParquetWriter(part, file.schema_arrow) as out:
        for batch in file.iter_batches():
            kept, cells = [], {}
            for place in range(batch.num_rows):
                found = change(number + place)
                if found is not None:
                    kept.append(place)
                    cells[place] = found
            number += batch.num_rows
            for name in {name for found in cells.values() for name in found}:
                if name not in batch.schema.names:
                    raise InputError(f"{argument}: {source.name} has no column {name!r}")
                at = batch.schema.get_field_index(name)
                values = batch.column(at).to_pylist()
                for place, found in cells.items():
                    values[place] = found.get(name, values[place])
                try:
                    column = pa.array(values, batch.schema.field(at).type)
                except (pa.ArrowException, TypeError) as error:
                    raise InputError(f"{argument}: column {name!r} of {source.name} cannot hold it ({error})") from None
                batch = batch.set_column(at, batch.schema.field(at), column)
            out.write_batch(batch.take(pa.array(kept, pa.int64())))
    return number - first


def _check(argument: str, source: Path, row: Mapping[str, Any], cells: Mapping[str, Any]) -> None:
    for name in cells:
        if name not in row:
            raise InputError(f"{argument}: a row of {source.name} has no column {name!r}")


@contextmanager
def _written(path: Path, encoding: str, ending: str) -> Iterator[TextIO]:
    """A text file to write, compressed as an ending says; the same text gives the same bytes."""
    with ExitStack() as stack:
        binary: Any = stack.enter_context(open(path, "wb"))
        if ending == ".gz":
            binary = stack.enter_context(gzip.GzipFile("", "wb", fileobj=binary, mtime=0))
        elif ending in _ARROW:
            binary = stack.enter_context(pa.CompressedOutputStream(pa.PythonFile(binary, "w"), _ARROW[ending]))
        with io.TextIOWrapper(binary, encoding=encoding, newline="") as text:
            yield text
