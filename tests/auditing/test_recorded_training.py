"""An audit beside a recorded training: rankings, table, files, and rows that are not the recorded ones."""

from __future__ import annotations

import json

import pytest
import torch
from audits import options, read_csv, run

import influence_fast as inf
from influence_fast.training.recorded import Epoch, write_epoch


def record(folder, labels, epochs=2):
    random = torch.Generator().manual_seed(0)
    count = len(labels)
    for number in range(epochs):
        losses, margins = torch.rand(2, count, generator=random)
        epoch = Epoch.empty(count)
        epoch.losses, epoch.margins, epoch.labels, epoch.steps = (
            losses,
            margins,
            torch.tensor(labels),
            torch.zeros(count),
        )
        write_epoch(folder, number, epoch)
    return inf.read_training(folder)


def test_dynamics_stand_beside_the_loss(folder, tmp_path):
    found = record(tmp_path / "recorded", [i % 3 for i in range(20)])
    given = [*options(folder, out=tmp_path / "audit", training=tmp_path / "recorded"), "--noise-column", "noise"]
    code, out, _ = run("audit", *given, "--methods", "dot", "--json")
    assert code == 0
    document = json.loads(out)
    measured = {row["method"]: row["auc_ndr"] for row in document["evaluation"]}
    noise = torch.tensor([i % 5 == 0 for i in range(20)])
    assert measured["aum"] == pytest.approx(inf.ndr_auc(found.margins.double().mean(0), noise))
    assert measured["mean_loss"] == pytest.approx(inf.ndr_auc(-found.losses.double().mean(0), noise))
    rows = {int(row["id"]): row for row in read_csv(tmp_path / "audit" / "scores.csv")}
    assert [float(rows[i]["aum"]) for i in range(20)] == pytest.approx(found.aum().tolist())
    assert [float(rows[i]["mean_loss"]) for i in range(20)] == pytest.approx(found.mean_loss().tolist())
    report = (tmp_path / "audit" / "report.html").read_text(encoding="utf-8")
    assert "margins of 2 epochs of training were recorded" in report
    assert json.loads((tmp_path / "audit" / "config.json").read_text())["training"] == str(tmp_path / "recorded")
    code, out, _ = run("evaluate", tmp_path / "audit" / "scores.csv", "--json")
    assert json.loads(out)["rivals"]["aum"] == pytest.approx(measured["aum"])


def test_held_out_rows_take_theirs_along(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()] * 4
    found = record(tmp_path / "recorded", [row["label"] for row in rows], 1)
    result = inf.audit(str(folder / "model"), rows, methods=["dot"], training=tmp_path / "recorded", progress=False)
    assert len(result.ids) == 72
    torch.testing.assert_close(result.baselines["aum"], found.aum()[torch.tensor(result.ids)])


def test_other_rows_are_refused(folder, tmp_path):
    record(tmp_path / "few", [i % 3 for i in range(19)])
    record(tmp_path / "other", [*(i % 3 for i in range(19)), 0])
    for name, words in (("few", "recorded 19 rows, and the training set has 20"), ("other", "row 19 with class 0")):
        code, _, err = run("audit", *options(folder, out=tmp_path / "audit", training=tmp_path / name))
        assert code != 0
        assert words in err
