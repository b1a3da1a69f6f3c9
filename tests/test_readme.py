"""What the README promises: its example runs as printed, and an import is light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from ranks import run_script

README = (Path(__file__).parent.parent / "README.md").read_text()


def python(code: str, cwd: Path) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_example_runs_as_printed(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 15
    (tmp_path / "example.py").write_text(code)
    printed = run_script(tmp_path / "example.py", tmp_path)
    assert re.search(r"^most harmful: \[\d+(, \d+){4}\]$", printed, re.M)
    assert re.search(r"^most helpful to the first query: \[\d+(, \d+){2}\]$", printed, re.M)


def test_the_two_commands_are_printed_as_they_are_promised() -> None:
    for command in ("pip install '.[cpu]' && influence-fast demo", "pip install -e '.[cpu,test]' && pytest"):
        assert f"```\n{command}\n```" in README


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
