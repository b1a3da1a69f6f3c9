"""Data files are written anew in their own format, and rows that stay keep what they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence_fast import InputError
from influence_fast.data.files import read_file
from influence_fast.data.rewriting import rewrite


def acts(number: int) -> dict | None:
    """Row 1 is dropped, row 2 gets another label."""
    return None if number == 1 else {"label": 'new, "label"'} if number == 2 else {}


def rows_of(path: Path) -> list:
    return [row for _, row in read_file("train", path)]


ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
TEXTS = ["plain", 'with "quotes"', "a\ttab, and comma", "two\nlines", "\u00e9\u4e16", ""]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "csv.bz2", "parquet"])
def test_rows_are_dropped_and_changed(tmp_path: Path, ending: str) -> None:
    rows = [{"id": f"00{i}", "text": text, "label": "old", "extra": "x"} for i, text in enumerate(TEXTS)]
    source, out = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    write(source, rows)
    assert rewrite("train", source, out, acts) == 6
    expected = [{**row, **found} for i, row in enumerate(rows) if (found := acts(i)) is not None]
    assert rows_of(out) == expected
    first = out.read_bytes()
    rewrite("train", source, out, acts)
    assert out.read_bytes() == first
    # Numbers go on over several files.
    assert rewrite("train", source, out, lambda number: None if number == 7 else {}, first=6) == 6
    assert rows_of(out) == rows[:1] + rows[2:]


def write(path: Path, rows: list[dict]) -> None:
    import csv
    import io

    kind = path.name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    if kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
        return
    text = io.StringIO(newline="")
    if kind == "csv":
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    else:
        text.write("".join(json.dumps(row) + "\n" for row in rows))
    data = text.getvalue().encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix in (".zst", ".bz2"):
        stream = pa.BufferOutputStream()
        with pa.CompressedOutputStream(stream, {".zst": "zstd", ".bz2": "bz2"}[path.suffix]) as compressed:
            compressed.write(data)
        data = stream.getvalue().to_pybytes()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'{"text": "a",  "label":1.50}\r\n\r\n{"text":"b","label":2}\r\n{"label": 3, "text": "\\u00e9"}'),
        ("a.csv", b'\xef\xbb\xbftext;label\r\n"a";1\r\nb;"2"\r\n\r\n"c ""d""";3\r\n'),
        ("a.tsv", b'text\tlabel\nan inch is 1" long\t1\n"half a quote\t2\nplain\t3\n'),
        ("b.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n'.encode("utf-16")),
    ],
)
def test_lines_that_stay_keep_their_bytes(tmp_path: Path, name: str, data: bytes) -> None:
    source, out = tmp_path / name, tmp_path / "out" / name
    out.parent.mkdir()
    source.write_bytes(data)
    rewrite("train", source, out, lambda number: {})
    assert out.read_bytes() == data
    rewrite("train", source, out, lambda number: None if number == 0 else {})
    assert rows_of(out) == rows_of(source)[1:]
    rewrite("train", source, out, lambda number: {"label": "9"} if number == 0 else {})
    assert rows_of(out) == [{**rows_of(source)[0], "label": "9"}, *rows_of(source)[1:]]


def test_lines_that_cannot_be_read_stay(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nnot json\n{"a": 2}\n[3]\n{"a": 4}\n')
    rewrite("train", tmp_path / "a.jsonl", tmp_path / "b.jsonl", lambda number: None if number == 1 else {})
    assert (tmp_path / "b.jsonl").read_text() == '{"a": 1}\nnot json\n[3]\n{"a": 4}\n'


def test_an_object_with_one_list_keeps_what_is_beside(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 2, "data": [{"a": 1}, {"a": 2}], "tags": ["x"]}))
    rewrite("train", tmp_path / "a.json", tmp_path / "b.json", lambda number: None if number == 0 else {})
    assert json.loads((tmp_path / "b.json").read_text()) == {"version": 2, "data": [{"a": 2}], "tags": ["x"]}


def test_types_of_parquet_stay(tmp_path: Path) -> None:
    schema = pa.schema([("n", pa.int32()), ("label", pa.dictionary(pa.int8(), pa.string()))], metadata={"by": "us"})
    table = pa.Table.from_pydict({"n": [1, 2, 3], "label": ["a", "b", "a"]}, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    rewrite("train", tmp_path / "a.parquet", tmp_path / "b.parquet", lambda n: {"label": "b"} if n == 2 else {})
    found = pq.read_table(tmp_path / "b.parquet")
    assert found.schema == schema
    assert found.schema.metadata[b"by"] == b"us"
    assert found["label"].to_pylist() == ["a", "b", "b"]
    with pytest.raises(InputError, match=r"column 'n' of a\.parquet cannot hold it"):
        rewrite("train", tmp_path / "a.parquet", tmp_path / "b.parquet", lambda n: {"n": "text"})


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "json"])
def test_what_is_wrong_is_named_and_leaves_nothing(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"a.{ending}", [{"text": "a", "label": "b"}])
    with pytest.raises(InputError, match=rf"out: expected a \.{ending} file"):
        rewrite("train", tmp_path / f"a.{ending}", tmp_path / "b.txt", lambda number: {})
    with pytest.raises(InputError, match=r"train: .*no column 'other'"):
        rewrite("train", tmp_path / f"a.{ending}", tmp_path / f"b.{ending}", lambda number: {"other": "x"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{ending}"]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, max_size=5),
    st.data(),
)
def test_any_text_survives_in_a_csv(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    write(folder / "a.csv", [{"text": text, "label": "old"} for text in texts])
    dropped = data.draw(st.integers(0, len(texts) - 1))
    rewrite("train", folder / "a.csv", folder / "b.csv", lambda n: None if n == dropped else {"label": texts[n]})
    kept = [text for n, text in enumerate(texts) if n != dropped]
    assert [(row["text"], row["label"]) for row in rows_of(folder / "b.csv")] == [(text, text) for text in kept]
