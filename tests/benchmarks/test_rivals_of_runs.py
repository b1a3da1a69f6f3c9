"""Rivals on the splits of kept runs: a run of another split is refused, and the table says who wins."""

from __future__ import annotations

import json
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from audits import tokenizer, write_rows
from click.testing import CliRunner, Result

import influence_fast as inf
from benchmarks import rivals
from benchmarks.paper_tasks import make_split
from influence_fast.evaluation.rivals import NEIGHBOURS, PROBE


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(rivals.main, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rivals, "has_cleanlab", lambda: True)
    monkeypatch.setattr(
        rivals, "label_rivals", lambda labels, agreement, probe: {PROBE: agreement / 2, NEIGHBOURS: agreement}
    )
    random = np.random.default_rng(0)
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for name, count in (("train", 560), ("validation", 40)):
        words = [[f"w{w}" for w in random.integers(35, size=6)] for _ in range(count)]
        rows = [{"sentence": " ".join(w), "label": int(i % 2)} for i, w in enumerate(words)]
        write_rows(tmp_path / "data" / "sst2" / f"{name}.jsonl", rows)
    models.make("bert").bert.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    settings = {"samples": 60, "query_samples": 20, "flip": 0.2, "kind": "uniform"}
    split = make_split("sst2", 0, {**settings, "data": str(tmp_path / "data")})
    noise = torch.tensor([row["noise"] for row in split["train"]])
    scores = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = {("random", "", ""): scores, ("loss", "", ""): -noise.double(), rivals.DEFAULT: -noise.double()}
    rows = [
        {"method": m, "group": g, "aggregation": a, "auc_ndr": inf.ndr_auc(s, noise), "ndr@30": inf.ndr(s, noise, 0.3)}
        for (m, g, a), s in keys.items()
    ]
    rows.append({**rows[1], "method": "self-influence"})
    (tmp_path / "runs").mkdir()
    run = {"task": "sst2", "seed": 0, "settings": settings, "noisy": int(noise.sum()), "rows": rows}
    (tmp_path / "runs" / "sst2-seed0.json").write_text(json.dumps(run))
    (tmp_path / "runs" / "half.json").write_text(json.dumps({**run, "partial": True}))
    return tmp_path


def test_a_run_is_scored_once_and_the_page_names_the_best(folder: Path) -> None:
    out, page = folder / "out.json", folder / "page.md"
    given = ["--model", folder / "model", "--data", folder / "data", "--runs", folder / "runs", "--out", out]
    assert invoke(*given, "--threads", 1).exit_code == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert run["noisy"] == 12
    assert run["scores"]["loss"]["auc_ndr"] > 0.9
    assert run["scores"][PROBE] == run["scores"][NEIGHBOURS]
    assert "sst2-seed0" not in invoke(*given).stderr
    page.write_text("before\n<!-- rivals -->\nold\n<!-- end of rivals -->\nafter\n")
    assert invoke("--out", out, "--page", page).exit_code == 0
    text = page.read_text()
    assert "| sst2, uniform | 1 | the default (`pool`) |" in text
    assert "| training loss | +0.000 |" in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- end of rivals -->\nafter\n")
    assert "old" not in text
    page.write_text("nothing")
    assert "has no lines" in invoke("--out", out, "--page", page).stderr


def test_another_split_is_refused(folder: Path) -> None:
    file = folder / "runs" / "sst2-seed0.json"
    run = json.loads(file.read_text())
    run["rows"][0]["auc_ndr"] += 0.01
    file.write_text(json.dumps(run))
    given = [
        "--model",
        folder / "model",
        "--data",
        folder / "data",
        "--runs",
        folder / "runs",
        "--out",
        folder / "out.json",
    ]
    result = invoke(*given)
    assert result.exit_code == 1
    assert "another split" in result.stderr
