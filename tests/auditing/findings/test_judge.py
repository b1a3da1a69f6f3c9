"""Findings of whole audits: planted errors, duplicates, evidence, and nothing to calibrate on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import models
import pytest
import torch

import influence_fast as inf
from influence_fast.auditing.result import AuditResult
from influence_fast.gradients.layers import layer_groups

CLASSES = 3


def rows(count: int, seed: int) -> list[dict]:
    """The class is in the words, mostly."""
    random = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        label = i % CLASSES
        words = torch.randint(20, models.VOCAB, (4,), generator=random).tolist()
        own = (3 + 4 * label + torch.randint(4, (3,), generator=random)).tolist()
        out.append({"input_ids": [1, *words[:2], *own, *words[2:]], "labels": label, "id": f"r{i}"})
    return out


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[AuditResult, Path]:
    train, queries = rows(240, 0), rows(120, 1)
    for i in range(0, 48):
        train[i]["labels"] = (train[i]["labels"] + 1) % CLASSES
    # Rows 100 and 103 have one class of their own; a copy of 100 has another.
    train[103]["input_ids"] = train[101]["input_ids"] = train[100]["input_ids"]
    out = tmp_path_factory.mktemp("findings") / "audit"
    for i, row in enumerate(queries):
        row["region"] = "north" if i % 2 else "south"
    result = inf.audit(
        models.make("bert"), train, queries, out=out, layers="attention", progress=False, evidence=30,
        query_group="region", methods=["pool"],
    )  # fmt: skip
    return result, out


def test_labels_are_calibrated_and_counted(audited: tuple[AuditResult, Path]) -> None:
    result, _ = audited
    about = result.facts["wrong_labels"]
    assert about["low"] <= 49 <= about["high"]
    assert about["low"] <= about["estimate"] <= about["high"]
    assert about["estimate"] == pytest.approx(240 * about["share"])
    assert "120 trusted rows" in about["calibrated_on"]
    assert result.wrong_probability is not None
    assert result.label_probability is not None
    torch.testing.assert_close(result.label_probability, 1 - result.wrong_probability)
    assert float(result.wrong_probability[:48].mean()) > 3 * float(result.wrong_probability[48:].mean())
    assert sum(one["count"] for one in result.facts["reliability"]) == 120 * CLASSES
    kinds = [finding.kind for finding in result.findings]
    assert kinds[:48].count("wrong label") > 24
    assert kinds[100] in ("conflicting duplicate", "wrong label")


def test_duplicates_name_those_with_another_label_first(audited: tuple[AuditResult, Path]) -> None:
    findings = audited[0].findings
    assert findings[100].duplicates == ["r101", "r103"]
    assert findings[103].duplicates == ["r101", "r100"]
    assert findings[101].duplicates == ["r100", "r103"]


def test_evidence_is_there_for_the_most_harmful(audited: tuple[AuditResult, Path]) -> None:
    result, out = audited
    worst = result.ranking[:30].tolist()
    assert [i for i in range(240) if result.findings[i].tokens] == sorted(worst)
    stores = [inf.GradientStore.open(out / "stores" / name) for name in ("train", "queries")]
    cosine = torch.stack([values for _, _, values in inf.influence(*stores, "cosine")]).double().mean(0)
    labels = result.labels or []
    for i in worst:
        one = result.findings[i]
        assert one.hurts[0]["influence"] == pytest.approx(float(cosine[:, i].min()), rel=1e-3, abs=1e-5)
        assert one.hurts[0]["id"] == stores[1].ids[int(cosine[:, i].argmin())]
        assert one.helps[0]["influence"] == pytest.approx(float(cosine[:, i].max()), rel=1e-3, abs=1e-5)
        assert all(near["label"] != labels[i] for near in one.neighbours)
        assert len(one.tokens) == 8
        assert all(math.isfinite(token["influence"]) for token in one.tokens)
    assert result.facts["tokens"] in layer_groups(models.make("bert"), [result.facts["tokens"]])["all"]


def test_the_file_has_one_object_a_row_most_harmful_first(audited: tuple[AuditResult, Path]) -> None:
    result, out = audited
    lines = [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [result.ids[i] for i in result.ranking.tolist()]
    assert lines[0] == result.findings[int(result.ranking[0])].document()
    assert all(list(line) == list(lines[0]) for line in lines)
    header = (out / "scores.csv").read_text().splitlines()[0].split(",")
    assert {"label_probability", "wrong_probability", "kind"} <= set(header)


def test_without_trusted_rows_nothing_is_calibrated() -> None:
    train, model = rows(120, 0), models.make("bert")
    given = {"layers": "attention", "progress": False, "evidence": 0}
    held_out = inf.audit(model, train, **given)
    assert "held-out" in held_out.facts["not_calibrated"]
    few = inf.audit(model, train, rows(20, 1), methods=["cosine"], **given)
    assert "20 trusted rows are too few" in few.facts["not_calibrated"]
    for result in (held_out, few):
        assert result.wrong_probability is None
        assert "reliability" not in result.facts
        assert not any(finding.tokens or finding.hurts for finding in result.findings)
    assert (held_out.facts["wrong_labels"]["low"], held_out.facts["wrong_labels"]["calibrated_on"]) == (None, None)
    assert "wrong_labels" not in few.facts


def test_a_group_column_that_is_not_there() -> None:
    model, train = models.make("bert"), rows(30, 0)
    with pytest.raises(inf.InputError, match="query_group: queries have no column 'region'"):
        inf.audit(model, train, rows(20, 1), query_group="region", progress=False)
    with pytest.raises(inf.InputError, match="query_group: no queries"):
        inf.audit(model, rows(120, 0), query_group="region", progress=False)
    with pytest.raises(inf.InputError, match="evidence: expected"):
        inf.audit(model, train, rows(20, 1), evidence=-1, progress=False)
