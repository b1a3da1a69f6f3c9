"""The example of a method of one's own runs as its docstring says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_method.py"
# So small a model is no faster on several threads, and much slower where other tests have them.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_registered_method_works_in_influence_evaluate_and_audit() -> None:
    run = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert run.returncode == 0, run.stderr
    found = re.search(r"influence: AUC_NDR (\S+)", run.stdout)
    # Flips were planted, and the method finds more of them than chance (0.558): it was really called.
    assert found, run.stdout
    assert float(found[1]) > 0.6
    assert re.search(r"^sign-agreement mean +\d\.\d+", run.stdout, re.M), run.stdout
    assert re.search(r"audit: most harmful by sign-agreement all rank-c: \[\d+(, \d+){4}\]", run.stdout), run.stdout
