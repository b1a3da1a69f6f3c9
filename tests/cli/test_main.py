"""Every command: its example, its errors and exit codes."""

from __future__ import annotations

from pathlib import Path

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


def test_every_command_has_an_example() -> None:
    for name in main.commands:
        code, out, _ = run(name, "--help")
        assert code == 0
        assert f"influence-fast {name}" in out
