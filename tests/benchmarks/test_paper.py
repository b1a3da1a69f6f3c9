"""The benchmark of the paper's protocol, end to end at toy size, and the statistics of its tables."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from audits import tokenizer, write_rows
from click.testing import CliRunner
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks import paper, paper_tables, protocol
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


def test_tables_of_the_committed_runs_are_the_committed_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for figures whose last digit turns on another machine's arithmetic."""
    monkeypatch.setattr(paper_tables, "_heat", lambda runs: "<svg/>")
    committed = protocol.RESULTS / "paper"
    for path in committed.glob("*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "begun.json").touch()
    (tmp_path / "partial.json").write_text(json.dumps({"partial": True, "rows": []}))
    result = CliRunner().invoke(paper_tables.main, ["--out", str(tmp_path)], catch_exceptions=False)
    assert "1 partial runs are left out" in result.stderr
    assert "claims: " in result.stderr
    assert {path.name for path in tmp_path.glob("*.svg")} == {path.name for path in committed.glob("*.svg")}
    made, there = ((folder / "README.md").read_text() for folder in (tmp_path, committed))
    figure = re.compile(r"-?\d+\.\d+")
    assert figure.sub("#", made).split("\n") == figure.sub("#", there).split("\n")
    values = [[float(value) for value in figure.findall(text)] for text in (made, there)]
    assert values[0] == pytest.approx(values[1], abs=0.0011)


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
    with monkeypatch.context() as stopped:
        stopped.setattr(paper, "kept_rows", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert CliRunner().invoke(main, [str(a) for a in given]).exit_code == 1
    (path,) = (data / "out").glob("*.json")
    partial = json.loads(path.read_text())
    assert partial["partial"] is True
    assert set(partial["arms"]) == {"all"}
    output = run(*given)
    assert "wrote" in output
    assert "fit-loss, epoch 1 of 1" in output
    assert "scores of dot" not in output
    assert torch.load(data / "work" / path.stem / "fit-loss.pt", weights_only=True).keys() == {
        "epochs", "weights", "seen", "seconds",
    }  # fmt: skip
    assert path.name == "sst2-n60-e1-uniform-seed0.json"
    document = json.loads(path.read_text())
    assert "partial" not in document
    assert partial["rows"] == document["rows"]
    assert document["sizes"] == {"train": 60, "selection": 500, "queries": 20, "test": 20}
    assert set(document["arms"]) == {"all", "loss", "pool", "random", "oracle"}
    assert document["arms"]["oracle"]["noise_left"] == 0
    assert document["arms"]["random"]["rows"] == 42
    cells = {(row["method"], row["group"], row["aggregation"]) for row in document["rows"]}
    assert {("tracincp", "attention middle", "vote-c"), ("cosine+loss", "all", "rank-c"), ("loss", "", "")} <= cells
    assert "is there" in run(*given)
    path.with_name("copy.json").write_text(json.dumps({**document, "seed": 1}))
    empty = data / "out" / "empty.json"
    empty.touch()
    grammars = ["--task", "grammars", *given[2:], "--out", empty]
    assert "relevance by repsim" in run(*grammars)
    assert "is there" in run(*grammars)
    for wrong in (["--first-seed", 1], ["--seeds", 2]):
        assert CliRunner().invoke(main, [str(a) for a in (*grammars, *wrong)]).exit_code == 2
    assert "wrote" in run("--tables", "--out", data / "out")
    text = (data / "out" / "README.md").read_text()
    assert "Seeds 1, 0" in text
    assert "| pool all mean (default) |" in text
    assert "filtering by pool all mean beats random filtering (accuracy) | 2 |" in text
    assert "## grammars" in text
    assert "NaN" not in text
    (plot,) = (data / "out").glob("*.svg")
    assert plot.read_text().startswith("<svg")
