"""The benchmark harness on tiny shapes: it measures every operation, and refuses a wrong kernel."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import influence_fast as inf
from benchmarks import run
from influence_fast import ops
from influence_fast.cli import main
from influence_fast.diagnostics import kernel_bench as bench
from influence_fast.diagnostics.bench_shapes import SHAPES, OuterShape, RankShape, SketchShape

TINY = {
    name: {"tiny": OuterShape(2, 3, 8, 6, k=4, kind=next(iter(shapes.values())).kind)}
    for name, shapes in SHAPES.items()
    if name not in ("sketch", "rank", "vote")
} | {
    "sketch": {"d": SketchShape(2, 300, 8), "s": SketchShape(2, 300, 8, "sjlt")},
    "rank": {"tiny": RankShape(3, 40)},
    "vote": {"tiny": RankShape(3, 40)},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", TINY)
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
    arguments = ["--op", "rank", "--repeats", "2", "--passes", "2", "--json"]
    from_package = json.loads(CliRunner().invoke(main, ["bench", *arguments]).stdout)
    result = CliRunner().invoke(run.main, [*arguments, "--no-compile", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.iterdir()
    written = json.loads(file.read_text())
    assert written == json.loads(result.stdout)
    assert [r["case"] for r in written["results"]] == [r["case"] for r in from_package["results"]] == ["tiny"]
    assert [len(r["medians"]["ours"]) for r in from_package["results"]] == [2]
    result = CliRunner().invoke(main, ["bench", "--op", "rank", "--repeats", "2", "--passes", "1"])
    assert (result.exit_code, "rank" in result.stdout) == (0, True)
    assert CliRunner().invoke(main, ["bench", "--op", "nope"]).exit_code == 1


def test_passes_go_through_all_cases_in_both_orders() -> None:
    measurements = [bench.Measurement(case) for op in ("rank", "vote") for case in bench.cases(op)]
    assert [m.case.op for _, m in bench.turns(measurements, 3)] == ["rank", "vote", "vote", "rank", "rank", "vote"]


def test_a_result_is_drawn_and_compared_on_the_command_line(tmp_path: Path) -> None:
    shapes, old, svg, html = (tmp_path / name for name in ("shapes.json", "old.json", "roof.svg", "page.html"))
    shapes.write_text(
        json.dumps({"rank": {"<mine>": {"m": 3, "n": 50}}, "outer": {"b": {"n": 1, "t": 2, "i": 3, "o": 4}}})
    )
    given = ["bench", "--shapes", str(shapes), "--repeats", "1", "--passes", "6", "--threads", "1"]
    result = CliRunner().invoke(main, [*given, "--json"])
    assert result.exit_code == 0, result.output
    old.write_text(result.stdout)
    document = json.loads(result.stdout)
    assert {(r["op"], r["case"]): r["shape"] for r in document["results"]}["rank", "<mine>"] == {"m": 3, "n": 50}
    assert document["machine"]["threads"] == 1
    assert "peers" not in document
    # Ten times as fast before: slower now.
    for row in document["results"]:
        row["medians"]["ours"] = [seconds / 10 for seconds in row["medians"]["ours"]]
    old.write_text(json.dumps(document))
    files = ["--svg", str(svg), "--html", str(html)]
    given += ["--compare", str(old)]
    result = CliRunner().invoke(main, [*given, *files, "--json"])
    assert result.exit_code == 0, result.output
    assert {row["verdict"] for row in json.loads(result.stdout)["comparison"]["results"]} == {"slower"}
    assert CliRunner().invoke(main, [*given, "--strict"]).exit_code == 1
    assert "&lt;mine&gt;" in html.read_text()
    assert "<mine>" not in html.read_text()
    names = r'xmlns(:xlink)?="[^"]*"|<!DOCTYPE.*?>|<metadata>.*?</metadata>'
    assert "http" not in re.sub(names, "", html.read_text(), flags=re.S)
    assert svg.read_text().startswith("<?xml")
    shown = CliRunner().invoke(main, ["bench", "--result", str(old), "--compare", str(old), "--strict"])
    assert shown.exit_code == 0, shown.output
    assert "same" in shown.stdout
    for bad in (["--strict"], ["--compare", str(tmp_path / "none")], ["--shapes", str(old)]):
        assert CliRunner().invoke(main, ["bench", *bad]).exit_code in (1, 2)
