"""Self-checks beside the truth: one tiny run, and what the table counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks import self_check_truth


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(self_check_truth.main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_run_stays_and_the_table_counts_intervals_that_hold_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check_truth, "TASKS", ("breast cancer",))
    monkeypatch.setattr(self_check_truth, "FLIPS", (0.2,))
    monkeypatch.setattr(self_check_truth, "EPOCHS", (5,))
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    given = ["--out", out, "--seeds", 1, "--samples", 120, "--trusted", 60, "--threads", 1]
    assert invoke(*given).exit_code == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert run["flips"] == 24
    assert set(run["truth"]) == set(run["planted"]) == {"default", "loss"}
    assert ("skipped" in run) != ("estimate" in run)
    before = out.read_text()
    assert invoke(*given).exit_code == 0
    assert json.loads(out.read_text())["runs"] == json.loads(before)["runs"]
    figures = {"auc_ndr": 0.8, "low": 0.7, "high": 0.9}
    made = {
        "run": "x, seed 0", "task": "x", "flips": 9, "estimated": 8.0, "truth": {"default": 0.75, "loss": 0.6},
        "planted": {"default": figures, "loss": figures},
    }  # fmt: skip
    runs = [{**made, "learned": 0.1, "estimate": made["planted"]}, {**made, "learned": 1.0, "skipped": "by heart"}]
    out.write_text(json.dumps({"benchmark": "self_check_truth", "runs": runs}))
    page.write_text("<!-- self_check_truth -->\n<!-- end of self_check_truth -->\n")
    assert invoke("--out", out, "--page", page).exit_code == 0
    text = page.read_text()
    assert "| the self-check's estimate | has not learned the flips | the default | 1 | 1 | +0.050 |" in text
    assert "| the self-check's estimate | has not learned the flips | the loss | 1 | 0 | +0.200 |" in text
    assert "the self-check's estimate | has learned them" not in text
    assert "| 0.600 | 0.800 (0.700 to 0.900) | - | - |" in text
