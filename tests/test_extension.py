"""The package is light to import, and the extension is what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import influence_fast
from influence_fast import ops

BACKENDS = ("faiss", "triton", "transformers", "influence_fast_cpu", "influence_fast_cuda")


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ops_load_no_other_backend() -> None:
    code = f"import sys; from influence_fast import ops; print([name for name in {BACKENDS!r} if name in sys.modules])"
    assert run(code) == "[]"


def test_extension() -> None:
    native = pytest.importorskip("influence_fast_cpu")
    assert native.__version__ == influence_fast.__version__
    assert native.isas()[0] == "baseline"
    assert native.isa() == native.isas()[-1]
    for op in set(ops.OPS) - {"rank", "vote"}:
        assert ops.available(op, "cpu") is None, op
    with pytest.raises(ValueError, match=r"expected one of baseline.*got sse9"):
        native.set_isa("sse9")


def test_instruction_set_from_environment() -> None:
    pytest.importorskip("influence_fast_cpu")
    code = "import influence_fast_cpu as native; print(native.isa())"
    assert run(code, INFLUENCE_FAST_ISA="baseline") == "baseline"
    with pytest.raises(AssertionError, match="expected one of"):
        run(code, INFLUENCE_FAST_ISA="sse9")


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--compiler=mingw32"], {}, "compiles with g++ or clang on Linux and macOS, not with mingw32: on Windows"),
        ([], {"CC": "no-such-compiler", "CXX": "no-such-compiler"}, "no no-such-compiler found; install g++ or clang"),
    ],
)
def test_no_compiler_for_it(tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str) -> None:
    """One sentence, and no traceback."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    environment = {**os.environ, "INFLUENCE_FAST_CUDA": "0", **environment}
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("influence_fast")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("with_torch", [True, False])
def test_fork(with_torch: bool) -> None:
    """A forked child works with threads of its own, with torch's runtime in the parent or without."""
    pytest.importorskip("influence_fast_cpu")
    code = f"""
import os, ctypes
if {with_torch}:
    import torch
import influence_fast_cpu as native
def matrix():
    out = (ctypes.c_float * (64 * 999))()
    side = native.Side(kind="rademacher", key0=1, key1=2, k=64, features=999, scale=1.0)
    native.random_matrix(side, row=0, rows=64, column=0, columns=999, out=ctypes.addressof(out), threads=2)
    return bytes(out)
first = matrix()
child = os.fork()
if child == 0:
    os._exit(0 if matrix() == first else 1)
print(os.waitpid(child, 0)[1], matrix() == first)
"""
    assert run(code) == "0 True"


def test_python_threads_at_once() -> None:
    pytest.importorskip("influence_fast_cpu")
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(8, 16, 96)
    expected = ops.outer(x, x, backend="cpu")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ops.outer(x, x, backend="cpu"), range(40)))
    assert all(torch.equal(result, expected) for result in results)
