"""A terminal is sent plain text: no markup, no control characters, whatever a user's texts hold."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from audits import options, run, sentences, write_rows
from hypothesis import given
from hypothesis import strategies as st
from stores import gradients, write_store

from influence_fast.cli.options import print_table
from influence_fast.cli.text import PlainFormatter, visible

HOSTILE = [
    "[INST] hello [/INST]",
    "[red]w1[/red] [/]",
    "\x1b[31mw2\x1b[0m \x1b]0;title\x07",
    "w3\rw4\x08\x9b2J",
    "w5\u202ew6 \u2066\x00\x7f",
    "=w1 \ud7ff [bold",
]


@given(st.text(st.characters()))
def test_nothing_that_a_terminal_obeys(text: str) -> None:
    shown = visible(text)
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u2028\u2029")
    assert visible(shown) == shown
    assert len(shown) >= len(text)


def test_what_is_seen_instead() -> None:
    assert visible("a\r\n\x1b[0m\x7f\x9b\u202e") == "a\u240d\u240a\u241b[0m\u2421\\x9b\\u202e"
    assert visible("[red]\u00e9\u4e16 \U0001f600 \u200d") == "[red]\u00e9\u4e16 \U0001f600 \u200d"


def test_tables_print_every_cell_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["[b]column[/b]", ["two", "lines"]], [[text, 0.5] for text in HOSTILE], "[i]title[/]")
    shown = capsys.readouterr().out
    assert "[b]column[/b]" in shown
    assert "[i]title[/]" in shown
    for text in HOSTILE:
        assert visible(text) in shown
    assert "\x1b" not in shown.replace("\x1b[", "") or "\x1b[31m" not in shown


def test_log_lines() -> None:
    record = logging.LogRecord("a", logging.WARNING, "", 0, "row %s", ("\x1b[2J\n",), None)
    assert PlainFormatter().format(record) == "row \u241b[2J\n"


def test_hostile_texts_go_through_every_command(folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "id": f"{HOSTILE[i % len(HOSTILE)]} {i}"} for i, row in enumerate(sentences(20, 1))]
    rows = [{**row, "text": f"{row['text']} {HOSTILE[i % len(HOSTILE)]}"} for i, row in enumerate(rows)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    given = [*options(folder, train=train), "--noise-column", "noise", "--methods", "dot", "--layers", "head"]
    code, out, err = run("audit", *given, "--out", tmp_path / "a")
    assert code == 0, err
    assert "[INST]" in out
    stores = [tmp_path / "a" / "stores" / name for name in ("train", "queries")]
    assert run("index", stores[0], "--out", tmp_path / "i")[0] == 0
    for command in (
        ["search", tmp_path / "i", "--queries", stores[1], "-k", 20],
        ["score", "--train", stores[0], "--queries", stores[1], "--out", tmp_path / "s.csv"],
        ["evaluate", tmp_path / "a" / "scores.csv"],
    ):
        code, found, err = run(*command)
        assert code == 0, err
        out += found
    assert not {c for c in out if ord(c) < 32 and c != "\n"} | (set(out) & {"\x7f", "\x9b", "\u202e"})


def test_an_ascii_locale_loses_nothing(tmp_path: Path) -> None:
    """Text files have a named encoding, and what a terminal cannot show is escaped."""
    for seed, name in enumerate(("train", "queries")):
        ids = [f"\u00e9\u4e16 {i}" for i in range(6)]
        write_store(tmp_path / name, gradients(6, seed), ids=ids)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment.pop("PYTHONIOENCODING", None)
    command = [sys.executable, "-X", "warn_default_encoding", "-m", "influence_fast", "score"]
    command += [
        "--train",
        str(tmp_path / "train"),
        "--queries",
        str(tmp_path / "queries"),
        "--out",
        str(tmp_path / "s\u00e9.csv"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [written] = tmp_path.glob("*.csv")
    assert "\u00e9\u4e16 3," in written.read_text(encoding="utf-8")
    own = [line for line in done.stderr.decode().splitlines() if "EncodingWarning" in line and "influence_fast" in line]
    assert own == []


def test_json_stays_json(folder: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "t", gradients(6, 0), ids=[*HOSTILE])
    write_store(tmp_path / "q", gradients(6, 1))
    code, out, _ = run(
        "score", "--train", tmp_path / "t", "--queries", tmp_path / "q", "--out", tmp_path / "s", "--json"
    )
    assert code == 0
    assert sorted(json.loads(out)["most_harmful"]) == sorted(HOSTILE)
