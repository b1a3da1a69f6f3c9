"""``influence-fast audit`` as somebody uses it who has read nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from audits import options, read_csv, run, sentences, write_rows
from click.testing import CliRunner

from influence_fast.auditing import disk
from influence_fast.cli import main


def test_all_missing_options_are_named() -> None:
    code, _, err = run("audit")
    assert code == 2
    assert "Missing options: --model, --train, --out." in err
    assert "Missing options: --model, --train (or --config)." in run("audit", "--out", "a")[2]
    code, _, err = run("build")
    assert code == 2
    assert "Missing options: --model, --data, --out." in err


def test_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    code, out, err = run("audit", *options(folder), "--dry-run", "--json", "--out", tmp_path / "a")
    assert code == 0, err
    found = json.loads(out)
    assert (found["samples"], found["queries"], found["projection"]) == (20, 9, "identity")
    assert found["recognised"] == "text and label: 'text', targets in 'label'"
    assert not (tmp_path / "a").exists()
    # Within a third of what it then takes.
    code, _, err = run("audit", *options(folder), "--out", tmp_path / "a")
    assert code == 0, err
    taken = sum(file.stat().st_size for file in (tmp_path / "a" / "stores").rglob("*.safetensors"))
    assert 0.66 * taken < found["disk_bytes"] < 1.5 * taken
    code, out, err = run("audit", *options(folder), "--dry-run", "--out", tmp_path / "b")
    assert code == 0, err
    assert "time for gradients" in out


def test_what_does_not_fit_is_not_begun(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*options(folder), "--out", tmp_path / "a"]
    code, _, err = run("audit", *given, "--max-disk", "10kB")
    assert code == 1
    assert re.search(r"take [\d.]+\wB \(identity, 26 layers\), more than 10kB. .*--max-disk", err)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(disk, "free_disk", lambda out: 10**6)
    code, _, err = run("audit", *given)
    assert code == 1
    assert "1MB are free" in err
    assert not (tmp_path / "a").exists()


def test_a_terminal_is_asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence_fast.cli.audit._somebody_is_there", lambda: True)
    given = ["audit", *options(folder), "--layers", "head", "--out", tmp_path / "a", "--max-disk", "1kB"]
    for answer, code in (("n\n", 1), ("y\n", 0)):
        result = CliRunner().invoke(main, [str(part) for part in given], input=answer)
        assert result.exit_code == code
        assert "Write it? [y/N]" in result.stderr
        assert (tmp_path / "a" / "scores.csv").exists() == (code == 0)


def test_without_queries_some_rows_stand_for_them(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", sentences(90, 1))
    code, out, err = run(
        "audit", "--model", folder / "model", "--train", data, "--layers", "head", "--out", tmp_path / "a"
    )
    assert code == 0, err
    said = re.search(
        r"No trusted set was given: 9 of the 90 training rows stand for one, drawn .*trust this ranking less", out
    )
    assert said, out
    ids = {int(row["id"]) for row in read_csv(tmp_path / "a" / "scores.csv")}
    assert len(ids) == 81
    assert "No trusted set was given" in (tmp_path / "a" / "report.html").read_text()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["queries"] is None
    replayed = run("audit", "--config", tmp_path / "a" / "config.json", "--out", tmp_path / "b")
    assert replayed[0] == 0, replayed[2]
    assert {int(row["id"]) for row in read_csv(tmp_path / "b" / "scores.csv")} == ids


def test_bad_rows_are_left_out_and_listed(folder: Path, tmp_path: Path) -> None:
    rows = sentences(20, 1)
    rows[3]["label"] = None
    data = write_rows(tmp_path / "train.jsonl", rows)
    given = [*options(folder, train=data), "--layers", "head", "--out", tmp_path / "a"]
    code, _, err = run("audit", *given)
    assert code == 1
    assert "row 3 (train.jsonl, line 4) has no label" in err
    code, out, err = run("audit", *given, "--skip-bad")
    assert code == 0, err
    assert "1 row was left out: row 3 (train.jsonl, line 4) has no label" in " ".join(out.split())
    assert "row 3 (train.jsonl, line 4) has no label" in (tmp_path / "a" / "skipped.txt").read_text()
    assert "3" not in {row["id"] for row in read_csv(tmp_path / "a" / "scores.csv")}


def test_names_of_classes_are_taken_and_shown(folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": ("bad", "fair", "good")[row["label"]]} for row in sentences(20, 1)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    given = [*options(folder, train=data, queries=data), "--layers", "head", "--out", tmp_path / "a"]
    code, _, err = run("audit", *given)
    assert code == 1
    assert "--label-names" in err
    code, _, err = run("audit", *given, "--label-names", "bad,fair,good")
    assert code == 0, err
    assert [row["label"] for row in read_csv(tmp_path / "a" / "scores.csv")] == [row["label"] for row in rows]


def test_one_list_of_methods() -> None:
    lists = []
    for command in ("audit", "score", "evaluate"):
        code, out, _ = run(command, "--help")
        assert code == 0
        text = " ".join(out.split()).replace("- ", "-")
        lists.append(
            {name for name in ("dot", "cosine", "trackstar", "ekfac", "pool", "fitted-cosine") if name in text}
        )
    assert lists[0] == lists[1] == lists[2] == {"dot", "cosine", "trackstar", "ekfac", "pool", "fitted-cosine"}


def test_methods_that_need_the_model_say_so(folder: Path, tmp_path: Path) -> None:
    code, _, err = run("score", "--train", tmp_path, "--queries", tmp_path, "--method", "pool", "--out", tmp_path / "s")
    assert code == 1
    assert "method: pool needs" in err
    assert "audit has all of it" in err
