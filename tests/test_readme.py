"""What the README promises: its example runs as printed, and an import is light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def python(code: str, cwd: Path) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_example_runs_as_printed(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 10
    assert re.search(r"most harmful: \[\d+(, \d+){4}\]", python(code, tmp_path))


def test_an_import_loads_nothing(tmp_path: Path) -> None:
    heavy = "{'torch', 'numpy', 'faiss', 'triton', 'transformers', 'influence_fast_cpu', 'influence_fast_cuda'}"
    code = (
        "import sys, time; begin = time.perf_counter(); import influence_fast; spent = time.perf_counter() - begin; "
        f"print(sorted({heavy} & set(sys.modules)), spent < 0.3, influence_fast.__version__)"
    )
    assert python(code, tmp_path).startswith("[] True")


def test_the_library_itself_brings_no_heavy_side_loads(tmp_path: Path) -> None:
    code = (
        "import sys, influence_fast as inf; "
        "inf.GradientCapture, inf.build_store, inf.influence, inf.aggregate, inf.ndr, inf.ops; "
        "print(sorted({'faiss', 'triton', 'transformers', 'datasets', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    assert python(code, tmp_path).strip() == "[]"


def test_a_room_and_its_function_of_the_same_name(tmp_path: Path) -> None:
    code = (
        "import influence_fast as inf; from influence_fast.attribution.influence_matrix import InfluenceMatrix; "
        "from influence_fast.attribution.aggregation import order; from influence_fast.auditing.run import AuditConfig; "
        "from influence_fast.evaluation.comparison import compare; "
        "print(callable(inf.influence), callable(inf.aggregate), callable(inf.audit), callable(inf.evaluate))"
    )
    assert python(code, tmp_path).strip() == "True True True True"
