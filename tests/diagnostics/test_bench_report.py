"""The drawing and the page of a benchmark, and the command that writes them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from influence_fast.cli import main
from influence_fast.diagnostics import bench_compare, bench_report, kernel_bench

CEILINGS = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result of tiny shapes, as the command writes it."""
    monkeypatch.setattr(kernel_bench, "ceilings", lambda *args: CEILINGS)
    (tmp_path / "shapes.json").write_text(
        json.dumps({"outer": {"<b>": {"n": 2, "t": 3, "i": 4, "o": 5}}, "rank": {"r": {"m": 3, "n": 40}}})
    )
    file = tmp_path / "before.json"
    file.write_text(invoke("--shapes", tmp_path / "shapes.json", "--passes", 5, "--repeats", 1, "--json"))
    return file


def invoke(*arguments: Any, code: int = 0) -> str:
    found = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert found.exit_code == code, found.output
    return found.stdout


def test_shares_are_of_what_the_machine_does_at_best() -> None:
    assert bench_report.shares({"bytes_per_s": 5e9, "flops_per_s": 2.5e10}, CEILINGS) == {"copy": 0.5, "matmul": 0.25}
    assert bench_report.shares({"bytes_per_s": 5e9, "flops_per_s": 0.0}, CEILINGS) == {"copy": 0.5}


def test_drawing_and_page_name_every_case(before: Path, tmp_path: Path) -> None:
    svg, html = tmp_path / "a.svg", tmp_path / "a.html"
    invoke("--result", before, "--svg", svg, "--html", html)
    text = "".join(ET.fromstring(svg.read_text()).itertext())
    assert all(part in text for part in ("outer <b>", "rank r", "copies 10.0 GB/s", "multiplies 100 GFLOP/s"))
    page = html.read_text()
    assert "<b>" not in page
    assert "outer</td><td>&lt;b&gt;" in page
    assert page.count("<svg") == 1
    # One result gives the same bytes.
    assert svg.read_text() == bench_report.roofline(json.loads(before.read_text()))


def test_strict_fails_where_something_became_slower(before: Path, tmp_path: Path) -> None:
    document = json.loads(before.read_text())
    for row in document["results"]:
        # Passes of the same order in both, so that what the test finds does not hang on this machine's noise.
        row["medians"] = {name: [1e-3 + i * 1e-7 for i in range(5)] for name in row["medians"]}
    slower = json.loads(json.dumps(document))
    slower["results"][1]["medians"]["ours"] = [2 * seconds for seconds in slower["results"][1]["medians"]["ours"]]
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(document))
    new.write_text(json.dumps(slower))
    assert "same" in invoke("--result", old, "--compare", old, "--strict")
    assert "slower" in invoke("--result", new, "--compare", old)
    html = tmp_path / "a.html"
    found = json.loads(invoke("--result", new, "--compare", old, "--strict", "--json", "--html", html, code=1))
    assert [row["verdict"] for row in found["comparison"]["results"]] == ["same", "slower"]
    assert found["comparison"]["results"] == bench_compare.compare(document, slower)["results"]
    assert 'class="slower">slower' in html.read_text()
    invoke("--result", old, "--compare", new, "--strict")


def test_threads_are_those_asked_for(before: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        arguments = ("--shapes", tmp_path / "shapes.json", "--op", "rank", "--passes", 1, "--threads", 1, "--json")
        assert json.loads(invoke(*arguments))["machine"]["threads"] == 1
    finally:
        torch.set_num_threads(threads)


def test_wrong_options_are_refused_before_anything_is_measured(before: Path, tmp_path: Path) -> None:
    invoke("--strict", code=2)
    invoke("--compare", tmp_path / "none.json", code=1)
    invoke("--shapes", tmp_path / "shapes.json", "--op", "vote", code=1)
