"""Kinds of wrong labels: what is planted, what a model of a task is, one noise from model to cells, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import noise_kinds, noise_tasks
from benchmarks.noise_tasks import KINDS, TARGET, Part, spoil, table_rows, table_task
from influence_fast.evaluation.rivals import has_cleanlab


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(noise_kinds.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["digits", "wine", "breast cancer"])
def test_columns_are_whole_numbers_in_range(name: str) -> None:
    x, y = table_rows(name)
    assert x.min() == 0
    assert x.max() == 16
    assert len(x) == len(y)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_labels_are_where_the_mask_says(kind: str) -> None:
    task = table_task("wine", 1)
    x, y = table_rows("wine")
    clean = Part(list(x), y.tolist())
    given, wrong = spoil(task, clean, kind, 0.2, 0)
    again, _ = spoil(task, clean, kind, 0.2, 0)
    assert again.labels == given.labels
    assert len(given) == len(wrong)
    # An annotator errs as often as it does.
    assert 0 < int(wrong.sum()) <= round(0.2 * len(y))
    assert kind == "annotator" or int(wrong.sum()) == round(0.2 * len(y))
    assert [a != b for a, b in zip(given.labels, clean.labels, strict=False)] == wrong[: len(y)].tolist()
    changed = [not np.array_equal(a, b) for a, b in zip(given.items, clean.items, strict=False)]
    if kind == "backdoor":
        assert changed == wrong.tolist()
        assert {label for label, bad in zip(given.labels, wrong.tolist(), strict=True) if bad} == {TARGET}
    else:
        assert not any(changed)
    if kind == "duplicates":
        near = [np.abs(x - row).sum(1).argmin() for row in given.items[len(y) :]]
        assert all(clean.labels[i] != label for i, label in zip(near, given.labels[len(y) :], strict=True))
    assert 0 <= min(given.labels) <= max(given.labels) <= 2


def test_a_split_has_no_row_twice_and_a_trusted_set_grows_by_its_end() -> None:
    task = table_task("digits", 1)
    small, large = task.split(3, 200, 20), task.split(3, 200, 300)
    assert [len(part) for part in (large.train, large.trusted, large.test)] == [200, 300, 359]
    assert np.array_equal(small.trusted.items, large.trusted.items[:20])
    rows = [*large.train.items, *large.trusted.items, *large.test.items]
    every = [tuple(row) for row in table_rows("digits")[0].tolist()]
    distinct = len(set(map(tuple, np.array(rows).tolist())))
    assert distinct >= len(rows) - (len(every) - len(set(every)))


def test_states_of_the_network_end_in_its_logits() -> None:
    task = table_task("wine", 20)
    x, y = table_rows("wine")
    model, history = task.fit(Part(list(x), y.tolist()), 0)
    with torch.no_grad():
        out = model(torch.from_numpy(x), output_hidden_states=True)
        torch.testing.assert_close(model.head(out.hidden_states[-1].mean(1)), out.logits)
    assert (out.logits.argmax(1).numpy() == y).mean() > 0.9
    assert len(out.hidden_states) == 3
    assert history.shape == (20, len(y), 3)
    torch.testing.assert_close(history[-1], out.logits)


def test_margins_and_folds_are_of_models_that_the_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    task = table_task("wine", 3)
    given = task.split(0, 60, 10).train
    seen: list[int] = []
    fit = noise_tasks.fit

    def watched(rows: list[dict[str, Any]], *how: Any) -> Any:
        seen.append(len(rows))
        return fit(rows, *how)

    monkeypatch.setattr(noise_tasks, "fit", watched)
    _, history = task.fit(given, 0)
    found = noise_kinds.rivals_of(task, given, history, 0, folds=True)
    assert seen == [60, *([48] * 5 if has_cleanlab() else [])]
    assert ("cleanlab folds" in found) == has_cleanlab()
    for i, label in enumerate(given.labels):
        others = [max(row[c] for c in range(3) if c != label) for row in history[:, i].tolist()]
        margin = np.mean([row[label] - other for row, other in zip(history[:, i].tolist(), others, strict=True)])
        assert float(found["aum"][i]) == pytest.approx(margin, abs=1e-5)


def test_noises_are_run_once_and_the_page_says_where_the_default_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise_kinds, "NOISES", (("uniform", 0.2), ("backdoor", 0.2)))
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    given = ["--out", out, "--tasks", "wine", "--seeds", 1, "--samples", 90, "--epochs", 5, "--threads", 1]
    assert invoke(*given).exit_code == 0
    cells = json.loads(out.read_text())["cells"]
    assert [(cell["kind"], cell["trusted"], cell["trusted rows"]) for cell in cells] == [
        ("uniform", 100, 44), ("uniform", 0, 0), ("uniform", 20, 20), ("backdoor", 100, 44), ("backdoor", 0, 0),
    ]  # fmt: skip
    assert [cell["rows"] for cell in cells] == [90, 81, 90, 90, 81]
    assert cells[0]["wrong"] == 18
    assert all("pool" in cell["main"] for cell in cells)
    arms = cells[0]["accuracy"]
    assert {"nothing", "default, drop", "loss, relabel", "random, drop", "oracle, relabel"} <= set(arms)
    assert all(0 <= value <= 1 for value in arms.values())
    assert "accuracy" not in cells[1]
    assert "wine" not in invoke(*given).stderr
    assert invoke(*given[:-4], "--epochs", 6).exit_code == 2
    assert "not 'iris'" in invoke("--out", out, "--tasks", "iris").stderr
    for shift in (-0.2, 0.2):
        page.write_text("<!-- noise_kinds -->\n<!-- end of noise_kinds -->\n")
        changed = []
        for cell, seed in ((cell, seed) for cell in cells for seed in (0, 1)):
            scores = {name: min(value, 0.6) for name, value in cell["auc_ndr"].items()}
            scores |= {"default": 0.7 + shift + seed / 500, "loss": 0.7}
            changed.append({**cell, "seed": seed, "auc_ndr": scores})
        out.write_text(json.dumps({"benchmark": "noise_kinds", "cells": changed}))
        assert invoke("--out", out, "--page", page).exit_code == 0
        text = page.read_text()
        assert f"| loss | 100 | all | {shift + 0.001:+.3f} | - | {4 * (shift > 0)} of 4 |" in text
        below = f"- wine, 20% uniform, 100 trusted rows: {shift + 0.001:+.3f}"
        assert (below in text) == (shift < 0)
        assert f"The default is the best of all in {2 * (shift > 0)} of 2 data sets with a noise where 100" in text
