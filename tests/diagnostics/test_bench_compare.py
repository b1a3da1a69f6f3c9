"""What changed between two results of the benchmark: beyond noise, and beyond what the machine itself did."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import mannwhitneyu

from influence_fast import InputError
from influence_fast.diagnostics.bench_compare import compare, read_result


def document(ours: dict[str, list[float]], torch: float = 1.0) -> dict[str, Any]:
    results = [
        {"op": "outer", "case": case, "shape": {"n": 1}, "medians": {"ours": times, "torch.bmm": [torch] * len(times)}}
        for case, times in ours.items()
    ]
    machine = {"device": "a", "threads": 1, "packages": {"torch": "2"}}
    return {"machine": machine, "dtype": "float32", "ceilings": {}, "results": results}


TIMES = {"one": [1.0, 1.01, 0.99, 1.02, 0.98, 1.005], "two": [2.0, 2.02, 1.99, 2.04, 1.98, 2.01]}


def test_slower_faster_and_the_same() -> None:
    new = {"one": [t * 1.5 for t in TIMES["one"]], "two": TIMES["two"][::-1]}
    found = compare(document(TIMES), document(new))
    assert [row["verdict"] for row in found["results"]] == ["slower", "same"]
    slower = found["results"][0]
    assert (slower["ratio"], slower["corrected"]) == (pytest.approx(1.5), pytest.approx(1.5))
    exact = mannwhitneyu(TIMES["one"], new["one"], alternative="two-sided", method="exact").pvalue
    assert slower["p"] == pytest.approx(2 * exact)  # Holm: the first of two
    assert [row["verdict"] for row in compare(document(new), document(TIMES))["results"]] == ["faster", "same"]
    assert found["can_tell"]


def test_a_slower_machine_is_no_slower_kernel() -> None:
    twice = {case: [2 * t for t in times] for case, times in TIMES.items()}
    found = compare(document(TIMES), document(twice, torch=2.0))
    assert {row["verdict"] for row in found["results"]} == {"same"}
    assert (found["machine_slower_by"], found["controls"]) == (2.0, 2)
    # Of another torch nothing can be said of the machine.
    other = document(twice, torch=2.0)
    other["machine"]["packages"]["torch"] = "3"
    found = compare(document(TIMES), other)
    assert {row["verdict"] for row in found["results"]} == {"slower"}
    assert (found["controls"], found["packages"]) == (0, {"torch": ["2", "3"]})


def test_noise_and_small_changes_are_no_change() -> None:
    little = {case: [1.03 * t for t in times] for case, times in TIMES.items()}
    assert {row["verdict"] for row in compare(document(TIMES), document(little))["results"]} == {"same"}
    few = {case: times[:2] for case, times in TIMES.items()}
    found = compare(document(few), document({case: [9 * t for t in times] for case, times in few.items()}))
    assert {row["verdict"] for row in found["results"]} == {"same"}
    assert not found["can_tell"]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    for change, message in (
        ({"dtype": "float16"}, "dtype: expected 'float32'"),
        ({"machine": {"device": "b", "threads": 1, "packages": {"torch": "2"}}}, "device: expected 'a'"),
        ({"machine": {"device": "a", "threads": 2, "packages": {"torch": "2"}}}, "threads: expected 1"),
    ):
        with pytest.raises(InputError, match=message):
            compare(document(TIMES), {**document(TIMES), **change})
    bare = document(TIMES)
    del bare["results"][0]["medians"]
    with pytest.raises(InputError, match="no medians of passes"):
        compare(bare, document(TIMES))
    reshaped = copy.deepcopy(document(TIMES))
    reshaped["results"][1]["shape"] = {"n": 2}
    found = compare(document(TIMES), reshaped)
    assert [row["case"] for row in found["results"]] == ["one"]
    assert found["not_compared"] == [["outer", "two"]]
    for text in ("", "[]", json.dumps({"results": []})):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match="expected a result of bench --json"):
            read_result(tmp_path / "x.json")
