"""The report: one file that stands alone, runs no script but its own, and says when a baseline wins."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import torch
from audit_results import audit_result, with_findings
from audits import options, run, sentences, write_rows

import influence_fast as inf
from influence_fast.auditing.report.page import findings, write_report
from influence_fast.auditing.result import AuditResult

IDENTITY = inf.Projection("identity")


def test_report_stands_alone_and_escapes_text(folder: Path, tmp_path: Path) -> None:
    rows = sentences(20, 1)
    for row in rows:
        row["text"] += " <script>alert(1)</script>"
    data = write_rows(tmp_path / "train.jsonl", rows)
    assert run("audit", *options(folder, train=data), "--out", tmp_path / "a")[0] == 0
    html = (tmp_path / "a" / "report.html").read_text()
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)
    assert [kind for kind, _ in scripts] == [' id="data" type="application/json"', ""]
    assert html.count("<script") == 2
    assert "\\u003cscript\\u003ealert(1)" in scripts[0][1]
    assert {row["text"] for row in json.loads(scripts[0][1])["rows"]} == {row["text"] for row in rows}
    # The browser runs the script of this digest and no other.
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}';" in html
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert "not measured here" in html


def test_the_same_audit_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_report(tmp_path / name, with_findings(audit_result(["one", "two"], ["x", "y"])))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_how_many_labels_are_wrong_is_said_with_what_is_known() -> None:
    def said(wrong: object) -> str:
        found = findings(audit_result(["one", "two", "three", "four"], list("xyxy"), wrong_labels=wrong), [])
        return next(line for line in found if "labels are wrong" in line)

    assert said(0.25).startswith("By the pool's estimate 25.0% of the labels are wrong, about 1.")
    estimate = {"estimate": 1.2, "low": 0.6, "high": 3, "share": 0.3, "calibrated_on": "40 trusted rows", "method": "m"}
    assert said(estimate).startswith(
        "About 1 of 4 labels are wrong, 1 to 3; calibrated on 40 trusted rows. Any row counts"
    )
    assert "nothing to calibrate" in said({**estimate, "low": None, "high": None, "calibrated_on": None})


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
