"""Tables as CSV that every reader gives back: quoting, line ends, and cells that a spreadsheet would run.

RFC 4180: lines end in CR LF and a cell with a line end, comma or quote is quoted, so that Python's, pandas' and a
spreadsheet's readers agree on the rows, whatever the texts hold. What no reader keeps is written as text: NUL as U+2400, a
lone surrogate as its escape. A text that begins as a formula does gets an apostrophe before it, and so does one that begins
with apostrophes and then as a formula; :func:`original` takes it off again.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import IO, Any

# ASCII and full-width, as spreadsheets of East Asian locales take both.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def cell(value: Any) -> Any:
    """A value as it stands in a cell: numbers as they are, texts made safe."""
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\u2400")
    return f"'{text}" if _FORMULA.match(text) else text


def original(text: str) -> str:
    """The text that :func:`cell` made safe, but for NUL and lone surrogates."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def write_rows(file: IO[str], header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A header and rows to a file that was opened with ``newline=""`` and ``encoding="utf-8"``."""
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow([cell(name) for name in header])
    writer.writerows([cell(value) for value in row] for row in rows)


def as_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The whole file as text, line ends as they are to be written."""
    file = io.StringIO(newline="")
    write_rows(file, header, rows)
    return file.getvalue()
