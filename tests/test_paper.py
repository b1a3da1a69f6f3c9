"""The benchmark of the paper's protocol, end to end at toy size, and the statistics of its tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats
from sklearn.metrics import roc_auc_score
from test_audit import tokenizer, write_rows

from benchmarks.paper import main, relevance
from benchmarks.paper_tables import interval, verdict


def test_interval_and_verdict() -> None:
    values = np.random.default_rng(0).normal(size=6)
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    assert interval([*values, math.nan]) == pytest.approx((values.mean(), low, high))
    assert interval([0.3]) == (0.3, -math.inf, math.inf)
    assert [verdict(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2))] == ["held", "not held", "undecided"]


def test_relevance() -> None:
    influence, same = torch.randint(9, (4, 50)).float(), torch.rand(4, 50) < 0.3
    found = relevance(influence + torch.rand(4, 50) / 2, same, k=10)
    random = relevance(influence, same, k=10)
    aucs = [roc_auc_score(s, v) for v, s in zip(influence, same, strict=True)]
    assert random["roc_auc"] == pytest.approx(np.mean(aucs))
    assert random["sd_roc_auc"] == pytest.approx(np.std(aucs))
    assert relevance(same.float(), same, k=50)["recall@50"] == 1
    assert 0 < found["recall@10"] < 1


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code in (0, 3), result.output
    return result.output


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, count in (("train", 560), ("validation", 40)):
        words = [[f"w{w}" for w in random.integers(35, size=6)] for _ in range(count)]
        rows = [{"sentence": " ".join(w), "label": int(i % 2)} for i, w in enumerate(words)]
        (tmp_path / "data" / "sst2").mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "data" / "sst2" / f"{name}.jsonl", rows)
    for name, count in (("train", 40), ("test", 4)):
        rows = [{"prompt": f"do {i % 4}: {i} -> ", "answer": f"{i % 4}", "class_id": i % 4} for i in range(count)]
        (tmp_path / "data" / "grammars").mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "data" / "grammars" / f"{name}.jsonl", rows)
    models.make("bert").bert.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_run_goes_on_where_it_stopped_and_ends_in_tables(data: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        "benchmarks.paper.METHODS", ("dot", "cosine", "datainf", "trackstar", "contrast-dot", "repsim", "pool")
    )
    folders = [part for name in ("model", "data", "work", "out") for part in (f"--{name}", data / name)]
    sizes = ["--samples", 60, "--query-samples", 20, "--epochs", 1, "--arms", "loss,pool"]
    given = ["--task", "sst2", *folders, *sizes]
    assert "out of time before the next epoch" in run(*given, "--seconds", 0)
    assert "wrote" in run(*given)
    (path,) = (data / "out").glob("*.json")
    assert path.name == "sst2-n60-e1-uniform-seed0.json"
    document = json.loads(path.read_text())
    assert document["sizes"] == {"train": 60, "selection": 500, "queries": 20, "test": 20}
    assert set(document["arms"]) == {"all", "loss", "pool", "random", "oracle"}
    assert document["arms"]["oracle"]["noise_left"] == 0
    assert document["arms"]["random"]["rows"] == 42
    cells = {(row["method"], row["group"], row["aggregation"]) for row in document["rows"]}
    assert {("tracincp", "attention middle", "vote-c"), ("cosine+loss", "all", "rank-c"), ("loss", "", "")} <= cells
    assert "is there" in run(*given)
    path.with_name("copy.json").write_text(json.dumps({**document, "seed": 1}))
    run(*["--task", "grammars", *given[2:]])
    assert "wrote" in run("--tables", "--out", data / "out")
    text = (data / "out" / "README.md").read_text()
    assert "Seeds 1, 0" in text
    assert "| pool all mean (default) |" in text
    assert "filtering by pool all mean beats random filtering (accuracy) | 2 |" in text
    assert "## grammars" in text
    assert "NaN" not in text
    (plot,) = (data / "out").glob("*.svg")
    assert plot.read_text().startswith("<svg")
