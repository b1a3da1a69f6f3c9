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
    assert "stock [0, 1, 2, 3], patched [0, 1, 2, 3]" in printed, printed
    assert re.search(r"stock \d+\.\d s, patched \d+\.\d s", printed), printed
