"""Files read as they say: what is written stays, what cannot be read is named by its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import influence_fast as inf
from influence_fast.data.files import BadLine, class_names, read_file


def rows(path: Path) -> list:
    return [row for _, row in read_file("data", path)]


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_lone_quotes_of_a_tsv_are_text(tmp_path: Path) -> None:
    text = 'text\tlabel\n"good film\t1\nbad\t0\nvery "good" plot\t1\nnice story"\t1\n5" disk\t0\n'
    found = rows(written(tmp_path, "a.tsv", text))
    assert [row["text"] for row in found] == ['"good film', "bad", 'very "good" plot', 'nice story"', '5" disk']
    # Without the quotes inside, a reader of quoted cells finds rows that fit, and swallows a line in one of them.
    found = rows(written(tmp_path, "b.tsv", 'text\tlabel\n"good film\t1\nbad\t0\nnice story"\t1\n'))
    assert [row["text"] for row in found] == ['"good film', "bad", 'nice story"']
    found = rows(written(tmp_path, "c.tsv", 'text\tlabel\n"hello"\t1\nbad\t0\n'))
    assert [row["text"] for row in found] == ['"hello"', "bad"]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_quoted_cells_come_back(tmp_path: Path, quoting: int, separator: str) -> None:
    cells = [["text", "label"], ['say "no"', "1"], ["one\nand two", "0"], [f"a{separator}b", "1"], ["", "0"]]
    text = io.StringIO()
    csv.writer(text, delimiter=separator, quoting=quoting).writerows(cells)
    path = written(tmp_path, "a.tsv" if separator == "\t" else "a.csv", text.getvalue())
    assert [list(row.values()) for row in rows(path)] == cells[1:]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00")), st.text("01"))))
def test_any_table_that_python_writes_comes_back(tmp_path_factory: pytest.TempPathFactory, cells: list) -> None:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *cells])
    path = written(tmp_path_factory.mktemp("csv"), "a.csv", text.getvalue())
    assert [tuple(row.values()) for row in rows(path)] == cells


def test_cells_are_text(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "\ufeffid,text,label\r\n007,null,NA\r\n1e3,NaN,1.0\r\n,,\r\n")
    assert rows(path) == [
        {"id": "007", "text": "null", "label": "NA"},
        {"id": "1e3", "text": "NaN", "label": "1.0"},
        {"id": "", "text": "", "label": ""},
    ]


def test_numbers_of_json_keep_how_they_are_written(tmp_path: Path) -> None:
    (row,) = rows(written(tmp_path, "a.jsonl", '{"a": 1.50, "b": -121, "c": "007", "d": null, "e": 1e2}\r\n\r\n'))
    assert [str(value) for value in row.values()] == ["1.50", "-121", "007", "None", "1e2"]
    assert (row["a"], row["e"]) == (1.5, 100)


def test_lines_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    found = dict(read_file("data", written(tmp_path, "a.jsonl", '{"a": 1}\n{"a":\n[1]\n\n{"a": 2}\n')))
    assert (found[1], found[5]) == ({"a": 1}, {"a": 2})
    assert "is no JSON" in found[2].reason
    assert found[3] == BadLine("holds a list, expected an object")
    found = dict(read_file("data", written(tmp_path, "a.csv", 'a,b\n1,2\n"x\ny",3\n4\n5,6,7\n8,9\n')))
    assert list(found) == [2, 3, 5, 6, 7]
    assert (found[5].reason, found[6].reason) == ("has 1 cells, the header 2", "has 3 cells, the header 2")
    assert found[7] == {"a": "8", "b": "9"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b"x", "expected a file ending in .jsonl"),
        ("a.csv", b'a,b\n"x,1\ny,"z, w"\n', "line 2"),
        ("a.csv", b"a,a\n1,2\n", "more than one column 'a'"),
        ("a.csv", "a\nü\n".encode("latin-1"), r"not UTF-8 \(byte 0xfc\); save it as UTF-8"),
        ("a.parquet", b"PAR1 but not really", "cannot read"),
        ("a.jsonl.gz", b"no gzip at all", "cannot read"),
        ("a.json", b"3", "holds a int"),
        ("a.json", b'[{"a": 1},\n]', r"a.json': it is no JSON \("),
        ("a.jsonl", b'[{"a": 1}]', "holds one JSON list, and not an object a line; rename it so that it ends in .json"),
        ("a.jsonl", b'\n[\n {"a": 1}\n]', "holds one JSON list"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, name: str, text: bytes, message: str) -> None:
    with pytest.raises(inf.InputError, match=message):
        rows(written(tmp_path, name, text))


def test_compressed_and_other_encodings(tmp_path: Path) -> None:
    import pyarrow as pa

    plain = b'{"a": "\xc3\xbc\xe2\x80\xa8 x"}\n{"a": "y"}\n'
    files = {
        "a.jsonl.gz": gzip.compress(plain),
        "a.jsonl.zst": pa.compress(plain, "zstd", asbytes=True),
        "b.jsonl": plain.decode().encode("utf-16"),
        "c.jsonl": b"\xef\xbb\xbf" + plain,
    }
    for name, text in files.items():
        assert rows(written(tmp_path, name, text)) == [{"a": "ü\u2028 x"}, {"a": "y"}], name


def test_json_lists(tmp_path: Path) -> None:
    listed = [{"a": 1}, {"a": 2}]
    for name, whole in (("a.json", listed), ("b.json", {"version": "1", "data": listed})):
        assert rows(written(tmp_path, name, json.dumps(whole, indent=1))) == listed
    assert rows(written(tmp_path, "c.json", '{"a": 1}\n{"a": 2}\n')) == listed


def test_parquet_knows_names_of_classes(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert class_names(tmp_path / "a.parquet") == {"label": ["no", "yes"]}


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.csv.zst", "a.parquet"])
def test_a_few_bytes_do_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import pandas as pd
    import pyarrow as pa

    monkeypatch.setattr("influence_fast.data.parquet._FREE_BYTES", 1 << 16)
    if name.endswith("parquet"):
        pd.DataFrame({"text": ["x" * 999] * 9999}).to_parquet(tmp_path / name)
    else:
        line = '{"text": "x"}\n' if "jsonl" in name else "text,label\n"
        (tmp_path / name).write_bytes(pa.compress((line * 99999).encode(), "zstd", asbytes=True))
    with pytest.raises(inf.InputError, match="holds more than"):
        rows(tmp_path / name)
