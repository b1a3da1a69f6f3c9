"""An audit, what ``clean`` makes of it, and training again, at toy size; and the page that comes of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from audits import tokenizer, write_rows
from click.testing import CliRunner, Result

from benchmarks import audit_sst2
from influence_fast.cli import main as cli


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(audit_sst2.main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for name, count in (("train", 570), ("validation", 80)):
        labels = random.integers(2, size=count)
        # Words of the two classes differ, so that there is something to learn.
        words = [" ".join(f"w{17 * y + w}" for w in random.integers(17, size=6)) for y in labels.tolist()]
        rows = [{"sentence": text, "label": int(y)} for text, y in zip(words, labels, strict=True)]
        write_rows(tmp_path / "data" / "sst2" / f"{name}.jsonl", rows)
    models.make("bert").bert.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def test_seeds_are_run_once_and_the_page_is_of_their_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, page = folder / "audit.json", folder / "page.md"
    given = ["--model", folder / "model", "--data", folder / "data", "--work", folder / "work", "--out", out]
    sizes = ["--samples", 70, "--query-samples", 40, "--epochs", 1, "--seeds", 1, "--batch", 32, "--threads", 1]
    assert invoke(*given, *sizes, "--seconds", 0).exit_code == 3
    assert not out.exists()
    assert "wrote" in invoke(*given, *sizes).output
    document = json.loads(out.read_text())
    (run,) = document["runs"]
    assert run["wrong"] == 14
    assert set(run["arms"]) == set(audit_sst2.ARMS)
    assert run["arms"]["nothing"]["wrong_left"] == 14
    assert run["arms"]["oracle drop"]["rows"] == 56
    assert run["arms"]["oracle drop"]["wrong_left"] == 0
    assert run["arms"]["drop"]["rows"] == run["arms"]["random drop"]["rows"] < 70
    assert run["arms"]["relabel"]["rows"] == 70
    assert "seed 0" not in invoke(*given, *sizes).stderr
    assert json.loads(out.read_text()) == document
    assert invoke(*given, *sizes, "--epochs", 2).exit_code == 2
    start = subprocess.Popen

    def in_this_process(command: list[str], *others: Any, **streams: Any) -> subprocess.Popen:
        if not {"audit", "build"} & set(command):
            return start(command, *others, **streams)
        assert CliRunner().invoke(cli, command[3:], catch_exceptions=False).exit_code == 0
        return start(["true"])

    monkeypatch.setattr(subprocess, "Popen", in_this_process)
    for count in (150, 120):
        assert invoke(*given, *sizes, "--whole", "--rows", count).exit_code == 0
    measured = json.loads(out.read_text())["whole"]
    assert [(one["rows"], one["wrong"]) for one in measured] == [(120, 24), (150, 30)]
    assert all(one["store_gib"] > 0 and one["gradient_seconds"] > 0 for one in measured)
    assert "wrote" in invoke("--out", out, "--page", page).output
    text = page.read_text()
    assert "(14 rows)" in text
    assert f"{run['arms']['drop']['accuracy']:.3f}" in text
    assert "| 150 | 1 |" in text
    assert "nan" not in text


def test_arms_that_are_told_apart_by_the_flips() -> None:
    kept = audit_sst2.left([True, False, False, False])
    assert kept == {"wrong_left": 1, "noise_left": 0.25}
    arms = {name: {"accuracy": 0.5 + 0.1 * (name == "relabel") - 0.1 * (name == "below")} for name in audit_sst2.ARMS}
    runs = [{"arms": {n: {"accuracy": a["accuracy"] + shift} for n, a in arms.items()}} for shift in (0.0, 0.01, 0.03)]
    (text,) = audit_sst2.verdicts(runs)
    assert "`relabel` gives most: +0.100 over nothing" in text
    assert "(interval above 0): relabel; clearly below: below." in text


def test_a_row_of_the_audit_does_not_tell_its_flip() -> None:
    assert audit_sst2.row_of({"text": ["fine"], "label": 1, "noise": True}) == {"sentence": "fine", "label": 1}


def test_the_committed_page_is_that_of_the_committed_figures(tmp_path: Path) -> None:
    assert "wrote" in invoke("--page", tmp_path / "page.md").output
    assert (tmp_path / "page.md").read_text() == Path("docs/audit_sst2.md").read_text()
