"""The example of a patched library runs, and both projectors find the rows that its queries were made from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ranks import run_script

EXAMPLE = Path(__file__).parents[2] / "examples" / "trak_gpt2.py"


@pytest.mark.slow
def test_stock_and_patched_agree(tmp_path: Path) -> None:
    pytest.importorskip("trak")
    printed = run_script(EXAMPLE, tmp_path)
    assert re.search(r"seconds +stock +\d+\.\d +patched +\d+\.\d", printed), printed
    found = re.findall(r"query (\d), row +(\d+) +stock +(\S+) +patched +(\S+)", printed)
    for query in range(4):
        (first, *best), (_, *second) = [line[1:] for line in found if line[0] == str(query)]
        assert int(first) == query, printed
        # Both of them tell the row that a query was made from.
        assert all(float(high) > float(low) + 0.01 for high, low in zip(best, second, strict=True)), printed
