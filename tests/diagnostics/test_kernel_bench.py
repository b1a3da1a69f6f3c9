"""The benchmark harness on tiny shapes: it measures every operation, and refuses a wrong kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import influence_fast as inf
from benchmarks import run
from influence_fast import ops
from influence_fast.cli import main
from influence_fast.diagnostics import kernel_bench as bench


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: next(iter(shapes.values())).kind for name, shapes in bench.OUTER_SHAPES.items()}
    shapes = {name: {"tiny": bench.Shape(2, 3, 8, 6, k=4, kind=kind)} for name, kind in kinds.items()}
    monkeypatch.setattr(bench, "OUTER_SHAPES", shapes)
    monkeypatch.setattr(bench, "SKETCH_SHAPES", {"d": (2, 300, 8, "rademacher"), "s": (2, 300, 8, "sjlt")})
    monkeypatch.setattr(bench, "RANK_SHAPES", {"tiny": (3, 40)})
    monkeypatch.setattr(bench, "ceilings", lambda *args: {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e9})


@pytest.mark.parametrize("op", bench.OPS)
def test_every_operation_is_measured(op: str) -> None:
    for case in bench.cases(op):
        found = bench.measure(case, repeats=3)
        assert found["error"] < 1e-5
        assert found["times"]["ours"]["p20"] <= found["times"]["ours"]["p50"] <= found["times"]["ours"]["p80"]
        assert set(found["ratios"]) == set(case.baselines)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = ops.vote
    monkeypatch.setattr(ops, "vote", lambda values, k, backend="auto": right(values, k, backend=backend) * 1.001)
    (case,) = bench.cases("vote", backend="cpu")
    case.truth = lambda: right(torch.arange(40.0).expand(3, 40), 8)
    with pytest.raises(inf.InfluenceError, match="vote tiny: wrong by"):
        bench.measure(case)


def test_both_commands_print_the_same_document(tmp_path: Path) -> None:
    arguments = ["--op", "rank", "--repeats", "2", "--json"]
    from_package = json.loads(CliRunner().invoke(main, ["bench", *arguments]).stdout)
    result = CliRunner().invoke(run.main, [*arguments, "--no-compile", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.iterdir()
    written = json.loads(file.read_text())
    assert written == json.loads(result.stdout)
    assert [r["case"] for r in written["results"]] == [r["case"] for r in from_package["results"]] == ["tiny"]
    assert CliRunner().invoke(main, ["bench", "--op", "rank", "--repeats", "2"]).exit_code == 0
    assert CliRunner().invoke(main, ["bench", "--op", "nope"]).exit_code == 1
