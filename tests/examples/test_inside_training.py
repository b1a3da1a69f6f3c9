"""The example of a recorded training runs as its docstring says."""

from __future__ import annotations

import re
from pathlib import Path

from ranks import run_script

EXAMPLE = Path(__file__).parents[2] / "examples" / "inside_training.py"


def test_dynamics_tracin_and_less_find_flips(tmp_path: Path) -> None:
    printed = run_script(EXAMPLE, tmp_path)
    found = {name: float(value) for name, value in re.findall(r"^(\w[\w ]*\w) +AUC_NDR (\S+)$", printed, re.M)}
    assert set(found) == {"loss of the last epoch", "aum", "mean_loss", "tracin", "less"}, printed
    # A fifth is flipped, so chance is 0.56: each of them was really computed of these rows.
    assert min(found.values()) > 0.7, printed
