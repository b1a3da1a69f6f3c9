"""A pool with a cross-fitted model part: whose probabilities a row has, one tiny run, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import cross_fit


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cross_fit.main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_row_has_the_probabilities_of_a_network_that_did_not_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fit(rows: list, classes: int, seed: int, epochs: int):
        seen.append({cross_fit.key_of(row) for row in rows})
        place = float(len(seen))
        return lambda ids: type("Out", (), {"logits": torch.tensor([[0.0, place]]).expand(len(ids), 2)}), None

    monkeypatch.setattr(cross_fit, "fit", fit)
    given = [{"input_ids": [i, 1], "labels": i % 2} for i in range(12)]
    queries = [{"input_ids": [i, 2], "labels": 0} for i in range(7)]
    found = cross_fit.out_of_sample(given, queries, 2, 0, 1)
    assert len(seen) == 5
    for row in given:
        number = int((found[cross_fit.key_of(row)][1] - found[cross_fit.key_of(row)][0]).round())
        assert cross_fit.key_of(row) not in seen[number - 1]
    for j, row in enumerate(queries):
        log = found[cross_fit.key_of(row)]
        assert float(log[1] - log[0]) == pytest.approx(j % 5 + 1)


def test_a_run_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_fit, "TASKS", {"breast cancer": "chooses"})
    monkeypatch.setattr(cross_fit, "EPOCHS", (5,))
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    given = ["--out", out, "--seeds", 1, "--samples", 100, "--trusted", 40, "--threads", 1]
    assert invoke(*given).exit_code == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert set(run["auc_ndr"]) == {"loss", "default", "cross-fitted"}
    assert run["weights"]["default"] != run["weights"]["cross-fitted"]
    made = [{**run, "seed": seed, "auc_ndr": {"loss": 0.5, "default": 0.6, "cross-fitted": 0.6 + 0.01 * seed}}
            for seed in (1, 2)]  # fmt: skip
    out.write_text(json.dumps({"benchmark": "cross_fit", "runs": made}))
    page.write_text("<!-- cross_fit -->\n<!-- end of cross_fit -->\n")
    assert invoke("--out", out, "--page", page).exit_code == 0
    assert "| breast cancer (chooses) | 2 | +0.0150 |" in page.read_text()
    assert "| breast cancer | 5 | 2 | 0.500 | 0.600 | 0.615 | +0.015 |" in page.read_text()
