"""Every command: its example, its errors and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from audits import options, run

import influence_fast as inf
from influence_fast.cli import main

IDENTITY = inf.Projection("identity")


def test_other_errors_of_the_command_line(folder: Path, tmp_path: Path) -> None:
    assert run("audit", "--out", tmp_path / "x")[0] == 2
    assert run("nope")[0] == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, _, err = run("audit", *options(folder), "--out", tmp_path / "full")
    assert (code, "holds something else" in err) == (1, True)
    for arguments, message in (
        (("index", tmp_path / "none", "--out", tmp_path / "i"), "no gradient store"),
        (("search", tmp_path / "none", "--queries", tmp_path / "none"), "no index"),
        (("evaluate", folder / "train.jsonl"), "no column 'score'"),
        (("audit", "--config", tmp_path / "none.json", "--out", tmp_path / "y"), "config: cannot read"),
    ):
        code, _, err = run(*arguments)
        assert code == 1, arguments
        assert message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object, got a list"),
        ("{", "no valid JSON"),
        ('{"model": "m", "train": "t"}', "'queries' is missing"),
        ('{"model": 3, "train": "t", "queries": "q"}', "model: expected a text, got 3"),
        (
            '{"model": "m", "train": "t", "queries": "q", "truncate": "no"}',
            "truncate: expected true or false, got 'no'",
        ),
        ('{"model": "m", "train": "t", "queries": "q", "nope": 1}', "no setting is called 'nope'"),
    ],
)
def test_settings_that_are_replayed_are_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    code, out, err = run("audit", "--config", tmp_path / "c.json", "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "c.json" in err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_every_command_has_an_example() -> None:
    for name in main.commands:
        code, out, _ = run(name, "--help")
        assert code == 0
        assert f"influence-fast {name}" in out
