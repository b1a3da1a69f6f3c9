"""Rows of any text come back from every reader of CSV, and no cell is a formula."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from influence_fast._csv import as_text, cell, original

# All of Unicode, lone surrogates too, and more often what readers stumble over.
ODD = st.sampled_from([*"\r\n\0\"',;\t=+-@ \\\x1a\u2028\ufeff\x85\x0b\x0c", "\r\n", "\ud800", "NA", "null", "''="])
TEXTS = st.lists(ODD | st.text(st.characters(), max_size=4), max_size=6).map("".join)


def written(text: str) -> str:
    """What the file is to give back."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\u2400")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
@example([("a\rb", "c"), ("", "\r"), ('"', "\n"), ("-1", "=A1")])
def test_rows_survive_every_reader(rows: list[tuple[str, str]]) -> None:
    data = as_text(["id", "score", "text"], [(a, 0.1 * i, b) for i, (a, b) in enumerate(rows)]).encode()
    expected = [(written(a), written(b)) for a, b in rows]
    text = data.decode()
    of_python = list(csv.DictReader(io.StringIO(text, newline="")))
    frames = [
        pd.read_csv(io.BytesIO(data), dtype={"id": str, "text": str}, keep_default_na=False, **engine)
        for engine in ({"engine": "c", "float_precision": "round_trip"}, {"engine": "python"})
    ]
    arrow = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types={"id": pa.string(), "text": pa.string()}),
    )
    for found in (of_python, *(frame.to_dict("records") for frame in frames), arrow.to_pylist(), of_spreadsheet(text)):
        assert [(original(row["id"]), original(row["text"])) for row in found] == expected
        # Readers of their own; not all of them are right to the last digit.
        assert [float(row["score"]) for row in found] == pytest.approx([0.1 * i for i in range(len(rows))], rel=1e-15)


def of_spreadsheet(text: str) -> list[dict[str, str]]:
    """RFC 4180 read one character at a time, with any of the three line ends between rows, as spreadsheets do."""
    rows, row, value, quoted, place = [], [], "", False, 0
    while place < len(text):
        character = text[place]
        if quoted and text[place : place + 2] == '""':
            value, place = value + '"', place + 1
        elif character == '"':
            quoted = not quoted
        elif not quoted and character == ",":
            row, value = [*row, value], ""
        elif not quoted and character in "\r\n":
            place += text[place : place + 2] == "\r\n"
            rows.append([*row, value])
            row, value = [], ""
        else:
            value += character
        place += 1
    header, *rest = rows
    return [dict(zip(header, row, strict=True)) for row in rest]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@A", "\t=1", "\r=1", "\n=1", "\uff1d1", "'=1", "''-1"])
def test_no_text_is_a_formula(text: str) -> None:
    assert cell(text) == f"'{text}"
    assert original(cell(text)) == text


def test_numbers_and_plain_texts_are_as_they_are() -> None:
    for value in (-1, -0.5, 1e-30, True, "a", "'tis", "", "a=b", "1-2"):
        assert cell(value) is value or cell(value) == value
        assert original(str(value)) == str(value)


def test_a_file_on_disk(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(as_text(["=id"], [["a\rb"], ["c"]]).encode())
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["'=id"], ["a\rb"], ["c"]]
