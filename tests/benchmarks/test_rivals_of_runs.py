"""Rivals in the runs by the paper's protocol: the table says who wins, runs without them are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks import rivals


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(rivals.main, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def write(name: str, seed: int, kind: str, figures: dict[rivals.Key, float]) -> None:
        rows = [{"method": m, "group": g, "aggregation": a, "auc_ndr": value} for (m, g, a), value in figures.items()]
        run = {"task": "sst2", "seed": seed, "settings": {"kind": kind}, "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(run))

    usual = dict.fromkeys(rivals.NAMES, 0.7)
    write("a", 0, "uniform", {**usual, rivals.DEFAULT: 0.9, ("aum", "", ""): 0.8})
    write("b", 1, "uniform", {**usual, rivals.DEFAULT: 0.8, ("loss", "", ""): 0.82})
    write("c", 0, "boundary", {**usual, ("loss", "", ""): 0.75})
    write("of another pool", 2, "uniform", {key: value for key, value in usual.items() if key != ("aum", "", "")})
    return tmp_path


def test_the_page_names_the_best_and_the_differences(folder: Path) -> None:
    page = folder / "page.md"
    page.write_text("before\n<!-- rivals -->\nold\n<!-- end of rivals -->\nafter\n")
    assert invoke("--runs", folder, "--page", page).exit_code == 0
    text = page.read_text()
    assert "| sst2, uniform | 2 | the default (`pool`) | **0.850** | 0.760 | 0.750 |" in text
    assert "| sst2, boundary | 1 | training loss | 0.700 | **0.750** |" in text
    assert "| training loss | +0.090 |" in text
    assert "| the best rival of each run, known only afterwards | +0.040 | -0.722 to +0.802 | 1 of 2 |" in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- end of rivals -->\nafter\n")
    assert "old" not in text
    printed = invoke("--runs", folder).output
    assert printed.strip() in text
    page.write_text("nothing")
    assert "has no lines" in invoke("--runs", folder, "--page", page).stderr


def test_without_a_run_that_has_all_rankings_nothing_is_written(folder: Path) -> None:
    for name in "abc":
        (folder / f"{name}.json").unlink()
    result = invoke("--runs", folder)
    assert result.exit_code == 2
    assert "no finished run" in result.stderr
