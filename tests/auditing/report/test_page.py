"""The report: one file that stands alone, escapes text, and says when a baseline wins."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from audits import options, run, sentences, write_rows

import influence_fast as inf
from influence_fast.auditing.report.page import findings
from influence_fast.auditing.result import AuditResult

IDENTITY = inf.Projection("identity")


def test_report_stands_alone_and_escapes_text(folder: Path, tmp_path: Path) -> None:
    rows = sentences(20, 1)
    for row in rows:
        row["text"] += " <script>alert(1)</script>"
    data = write_rows(tmp_path / "train.jsonl", rows)
    assert run("audit", *options(folder, train=data), "--out", tmp_path / "a")[0] == 0
    html = (tmp_path / "a" / "report.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert "not measured here" in html


def test_the_report_says_when_loss_wins(tmp_path: Path) -> None:
    noise = torch.arange(40) < 8
    perfect, useless = torch.arange(40.0).double(), torch.arange(40, 0, -1.0).double()
    facts = {"zero_gradients": 0, "queries": 10, "queries_correct": 9, "samples": 40}
    main, loss = inf.RankingKey("dot", "all", "rank"), inf.RankingKey("loss")
    rankings = {
        inf.RankingKey("random"): useless,
        loss: perfect,
        inf.RankingKey("self-influence"): useless,
        main: useless,
    }
    result = AuditResult(range(40), None, None, noise, {"all": ["l"]}, rankings, main, {}, facts)
    assert any("baseline loss wins" in line for line in findings(result, result.evaluate()))
    rankings[main], rankings[loss] = perfect + 0.001, useless
    assert not any("wins" in line for line in findings(result, result.evaluate()))
