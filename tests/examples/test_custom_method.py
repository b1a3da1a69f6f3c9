"""The example of a method of one's own runs as its docstring says."""

from __future__ import annotations

import re
from pathlib import Path

from ranks import run_script

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_method.py"


def test_a_registered_method_works_in_influence_evaluate_and_audit(tmp_path: Path) -> None:
    printed = run_script(EXAMPLE, tmp_path)
    found = re.search(r"influence: AUC_NDR (\S+)", printed)
    # Flips were planted, and the method finds more of them than chance (0.558): it was really called.
    assert found, printed
    assert float(found[1]) > 0.6
    assert re.search(r"^sign-agreement mean +\d\.\d+", printed, re.M), printed
    assert re.search(r"audit: most harmful by sign-agreement all rank-c: \[\d+(, \d+){4}\]", printed), printed
