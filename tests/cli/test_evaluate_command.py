"""Score and evaluate on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from audits import options, run

import influence_fast as inf

IDENTITY = inf.Projection("identity")


def test_the_whole_table_from_stores(folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("audit", *options(folder), "--noise-column", "noise", "--out", tmp_path / "a", "--json")
    audited = {(r["method"], r["group"], r["aggregation"]): r for r in json.loads(out)["evaluation"]}
    given = [
        tmp_path / "a" / "scores.csv",
        "--train",
        tmp_path / "a/stores/train",
        "--queries",
        tmp_path / "a/stores/queries",
    ]
    code, out, err = run("evaluate", *given, "--json")
    assert code == 0, err
    document = json.loads(out)
    for row in document["rows"]:
        key = row["method"], row["group"], row["aggregation"]
        if key in audited:
            for name in ("auc_ndr", "low", "high", "over_loss"):
                assert row[name] == pytest.approx(audited[key][name]), (key, name)
    assert ("datainf", "block 1", "vote-c") in {(r["method"], r["group"], r["aggregation"]) for r in document["rows"]}
    assert len(document["wins"]) == len(document["rows"])
    assert "neighbours agree" in {row["method"] for row in document["rows"]}, "a column of the audit's scores"
    code, out, _ = run("evaluate", *given)
    assert code == 0
    assert out.startswith(document["winner"][:20])
    assert "Share of resamples" in out
    assert run("evaluate", given[0], "--train", tmp_path)[0] == 2


def test_scores_beside_rivals(tmp_path: Path) -> None:
    lines = [f"{i},{i},{-i},{int(i < 5)}" for i in range(20)]
    (tmp_path / "scores.csv").write_text("\n".join(["id,score,mine,noise", *lines]))
    code, out, err = run("evaluate", tmp_path / "scores.csv", "--rivals", "mine", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["rivals"]["mine"] < 0.5 < document["auc_ndr"]
    assert document["winner"].startswith("scores all has the highest AUC_NDR")
    code, out, _ = run("evaluate", tmp_path / "scores.csv", "--rivals", "mine")
    assert "above the best baseline, mine" in out
    assert "winner" not in json.loads(run("evaluate", tmp_path / "scores.csv", "--json")[1])
    assert run("evaluate", tmp_path / "scores.csv", "--rivals", "yours")[0] == 1
