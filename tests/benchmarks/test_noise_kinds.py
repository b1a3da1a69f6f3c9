"""Kinds of wrong labels on small tables: what is planted, one cell, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import noise_kinds
from benchmarks.noise_kinds import KINDS, fit, spoil, table_rows


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(noise_kinds.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("task", noise_kinds.TASKS)
def test_columns_are_whole_numbers_in_range(task: str) -> None:
    x, y = table_rows(task)
    assert x.min() == 0
    assert x.max() == 16
    assert len(x) == len(y)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_labels_are_where_the_mask_says(kind: str) -> None:
    x, y = table_rows("wine")
    labels = y.tolist()
    columns, found, wrong = spoil(x, labels, kind, 0.2, 3, 0)
    assert int(wrong.sum()) == round(0.2 * len(y))
    assert len(columns) == len(found) == len(wrong)
    assert [a != b for a, b in zip(found, labels, strict=False)] == wrong[: len(y)].tolist()
    if kind == "duplicates":
        assert np.array_equal(columns[: len(y)], x)
        near = [np.abs(x - row).sum(1).argmin() for row in columns[len(y) :]]
        assert all(labels[i] != label for i, label in zip(near, found[len(y) :], strict=True))
    assert 0 <= min(found) <= max(found) <= 2


def test_states_of_the_network_end_in_its_logits() -> None:
    x, y = table_rows("wine")
    rows = [{"input_ids": row.tolist(), "labels": int(label)} for row, label in zip(x, y, strict=True)]
    model = fit(rows, 3, 0, 20)
    with torch.no_grad():
        out = model(torch.from_numpy(x), output_hidden_states=True)
        torch.testing.assert_close(model.head(out.hidden_states[-1].mean(1)), out.logits)
    assert (out.logits.argmax(1).numpy() == y).mean() > 0.9
    assert len(out.hidden_states) == 3


def test_cells_are_run_once_and_the_page_says_where_the_default_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise_kinds, "TASKS", ("wine",))
    monkeypatch.setattr(noise_kinds, "KINDS", ("uniform",))
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    given = ["--out", out, "--seeds", 1, "--samples", 90, "--trusted", 30, "--epochs", 5, "--threads", 1]
    assert invoke(*given).exit_code == 0
    cells = json.loads(out.read_text())["cells"]
    assert [(cell["trusted rows"], cell["rows"]) for cell in cells] == [(True, 90), (False, 81)]
    assert cells[0]["wrong"] == 18
    assert all("pool" in cell["main"] for cell in cells)
    assert "uniform" not in invoke(*given).stderr
    assert invoke(*given[:-2], "--epochs", 6).exit_code == 2
    for shift in (-0.2, 0.2):
        page.write_text("<!-- noise_kinds -->\n<!-- end of noise_kinds -->\n")
        changed = [dict(cell, auc_ndr=dict(cell["auc_ndr"], default=0.7 + shift, loss=0.7)) for cell in cells]
        for cell in changed:
            cell["auc_ndr"] |= {
                name: min(value, 0.6) for name, value in cell["auc_ndr"].items() if name not in ("default", "loss")
            }
        out.write_text(json.dumps({"benchmark": "noise_kinds", "cells": changed}))
        assert invoke("--out", out, "--page", page).exit_code == 0
        text = page.read_text()
        assert f"| loss | yes | {shift:+.3f} | - | {int(shift > 0)} of 1 |" in text
        assert ("wine, uniform, with trusted rows: loss 0.700" in text) == (shift < 0)
