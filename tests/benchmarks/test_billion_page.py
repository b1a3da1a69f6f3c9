"""The page of arithmetic says what follows from a measurement, and which one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import billion_page, protocol

FOUND = {
    "benchmark": "million",
    "date": "2026-01-01",
    "rows": 1000,
    "dims": 256,
    "machine": {"device": "Intel(R) Test"},
    "load": {"a": [0.5, 1.5]},
    "read_bytes_per_s": 2e10,
    "store": {"build_s": 2.0},
    "million": {
        "bytes": 280_000,
        "share_of_float32": 0.2734,
        "build_s": 0.5,
        "dot": {"p50_ms": 0.2},
        "cosine": {"p50_ms": 3.0, "batch_ms_per_query": 0.1, "floor_ms": 0.014},
    },
    "rank_vote": {"seconds": 1.0, "rows": 100},
    "mean": {"seconds": 0.1},
}


def test_arithmetic(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(FOUND))
    out = tmp_path / "page.md"
    given = ["--result", str(tmp_path / "r.json"), "--rows", "1000000000", "--memory", "100", "--out", str(out)]
    assert CliRunner().invoke(billion_page.main, given, catch_exceptions=False).exit_code == 0
    page = out.read_text()
    assert "| store, float32 | 1024 | 1.02 TB |" in page
    assert "| store, int8 | 264 | 264.0 GB |" in page
    assert "| exact index, 27.3% of float32 | 280 | 280.0 GB |" in page
    assert "280.0 GB take 3 machines of 100 GiB" in page
    # A million times the rows: 3,000 s by cosine on one machine, 20 s for 200 queries of 0.1 ms on 1,000 rows.
    assert "| 1 | 280.0 GB | 50.0 min | 3.3 min | 5.6 h |" in page
    assert "| 4 | 70.0 GB | 12.5 min | 50.0 s | 83.3 min |" in page
    assert "| rank and vote, 100 (layer, query) rows | 1.0 s for 1,000 rows | 277.8 h |" in page
    assert "load average 0.5 to 1.5" in page


def test_the_largest_result_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    with pytest.raises(billion_page.click.UsageError, match=r"no result of benchmarks\.million"):
        billion_page._largest(tmp_path)
    for name, rows in (("a", 10), ("b", 1000), ("c", 100)):
        (tmp_path / f"million-{name}.json").write_text(json.dumps({**FOUND, "rows": rows}))
    (tmp_path / "million-d.json").write_text(json.dumps({"benchmark": "million", "rows": 10**7, "partial": True}))
    assert billion_page._largest(tmp_path).name == "million-b.json"


def test_the_page_is_that_of_the_kept_result(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    assert CliRunner().invoke(billion_page.main, ["--out", str(out)], catch_exceptions=False).exit_code == 0
    assert out.read_text() == (Path(__file__).parents[2] / "docs" / "billion.md").read_text()
