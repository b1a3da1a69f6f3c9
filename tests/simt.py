"""The kernels of ``csrc/cuda`` on the host machine of ``csrc/cuda/simt``: built once for the sources as they are."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
from filelock import FileLock

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-DINFLUENCE_FAST_SIMT", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Winvalid-pch", f"-I{CUDA}"]


def compiler() -> str:
    found = shutil.which("g++") or pytest.skip("no g++")
    return str(found)


def library(folder: Path) -> Path:
    """The module influence_fast_simt in a folder that test runs and their processes share, built where it is not there."""
    built = folder / _key() / "influence_fast_simt.so"
    with FileLock(folder / "lock"):
        if not built.exists():
            for stale in folder.glob("*/"):
                shutil.rmtree(stale)
            built.parent.mkdir()
            _build(built)
    return built


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("influence_fast_simt", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _key() -> str:
    """What a build depends on."""
    version = subprocess.run([compiler(), "-v"], capture_output=True, text=True, check=True).stderr
    found = hashlib.sha256("\n".join([*FLAGS, sys.version, pybind11.__version__, version]).encode())
    csrc = CUDA.parent
    for path in sorted([*csrc.glob("*.h"), *CUDA.rglob("*.*")]):
        found.update(str(path.relative_to(csrc)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _build(built: Path) -> None:
    gxx, folder = compiler(), built.parent
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    # What every kernel includes is read once. Bindings are the longest to compile, and nothing of theirs is slow.
    common = folder / "common.h"
    common.write_text('#include "params.h"\n#include "portable.cuh"\n')

    def compiled(source: Path, *flags: str) -> str:
        target = str(folder / f"{source.name}.o")
        subprocess.run([gxx, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        bindings = pool.submit(compiled, CUDA / "bindings.cpp", "-O0", "-fvisibility=hidden", *includes)
        subprocess.run([gxx, *FLAGS, "-x", "c++-header", str(common), "-o", f"{common}.gch"], check=True)
        kernels = list(pool.map(lambda source: compiled(source, "-include", str(common)), sorted(CUDA.glob("*.cu"))))
    # Of functions that several units have the first one's are taken: those that were optimised.
    subprocess.run([gxx, "-shared", *kernels, bindings.result(), "-o", f"{built}.part"], check=True)
    os.replace(f"{built}.part", built)
