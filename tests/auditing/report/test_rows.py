"""What the page holds: every sample as ``scores.csv`` names it, cut to a page's size, and nothing that ends a script."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from audit_results import audit_result, with_findings

import influence_fast._csv as tables
from influence_fast.auditing.report import rows
from influence_fast.auditing.report.rows import as_script, page_data


def test_a_script_is_never_ended_and_is_what_went_in() -> None:
    data = {"a": ["</script><script>", "<!--", "\u2028", "\ud800", "&amp;", "\u05d0"], "__proto__": 1}
    text = as_script(data)
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == data


def test_ids_and_labels_are_those_of_the_scores() -> None:
    names = ["=1+1", "-3", "'=x", "'x", "a\0b", "\ud800", "a\nb", "", 7]
    result = audit_result([""] * len(names), names, names)
    # Two columns: a line of one empty cell is no row.
    table = tables.as_text(["id", "n"], [[name, 0] for name in names])
    read = [tables.original(line["id"]) for line in csv.DictReader(io.StringIO(table, newline=""))]
    data = page_data(result)
    assert [row["id"] for row in data["rows"]] == read
    assert set(data["labels"]) == set(read)


@pytest.mark.parametrize("found", [False, True])
def test_unknown_values_are_left_out(found: bool) -> None:
    result = audit_result(["a", "b", "c"], ["x", "y", "x"])
    if found:
        result = with_findings(result)
        result.findings[0] = {"id": 0, "wrong_probability": None, "kind": "wrong label", "tokens": None}  # type: ignore[attr-defined]
    result.label_probability[1] = float("nan")  # type: ignore[index]
    first, second, _ = page_data(result)["rows"]
    assert (first["wrong"], first.get("calibrated")) == (pytest.approx(0.98), None)
    assert first.get("kind") == ("wrong label" if found else None)
    assert ("wrong" in second, "calibrated" in second) == (found, found)
    assert as_script(page_data(result))
    result.texts = result.labels = result.predicted = result.suggested = result.label_probability = None
    result.rankings[result.main][2] = torch.nan
    assert as_script(page_data(result))


def test_the_page_holds_the_most_harmful_and_whom_they_point_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SHOWN", 2)
    result = with_findings(audit_result(["a", "b", "c", "d" * 9000], ["x", "y", "x", "y"]))
    data = page_data(result)
    assert [row["id"] for row in data["rows"]] == ["0", "1"]
    assert data["total"] == 4
    assert data["others"] == [["3", "y", "d" * 400]]
    monkeypatch.setattr(rows, "SHOWN", 9)
    assert page_data(result)["rows"][3]["more"] == 5000
    assert page_data(result)["others"] == []


def test_decisions_belong_to_samples_labels_and_settings() -> None:
    def identity(**changes: object) -> str:
        result = audit_result(["a", "b"], changes.get("labels", ["x", "y"]), changes.get("ids"))  # type: ignore[arg-type]
        result.config = changes.get("config", {"model": "m"})  # type: ignore[assignment]
        return page_data(result)["audit"]

    other = [identity(labels=["x", "x"]), identity(ids=["a", "b"]), identity(config={"model": "n"})]
    assert len({identity(), identity(), *other}) == 4


@pytest.mark.parametrize(
    ("labels", "task", "form", "expected"),
    [
        (["x", "y"], "classification", "", "label"),
        (None, "causal-lm", "prompt and answer: 'q', targets in 'a'", "text"),
        (None, "causal-lm", "chat: 'messages'", None),
        (None, "preference", "preferences: 'chosen' and 'rejected'", None),
        (None, "token-classification", "words: 'tokens', targets in 'tags'", None),
    ],
)
def test_what_a_label_can_be_replaced_by(labels: list | None, task: str, form: str, expected: str | None) -> None:
    assert page_data(audit_result(["a", "b"], labels, task=task, form=form))["relabel"] == expected
