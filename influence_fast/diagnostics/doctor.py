"""What hardware, compilers and libraries there are, and which backend each operation takes and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from influence_fast import __version__, ops

_PACKAGES = ("torch", "numpy", "transformers", "peft", "datasets", "faiss-cpu", "faiss-gpu", "triton", "scikit-learn")
_COMPILERS = {"g++": ["g++", "-dumpfullversion"], "nvcc": ["nvcc", "--version"]}


def examine() -> dict[str, Any]:
    """Machine, packages, compilers and, for each device and operation, the backend that ``auto`` takes."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "influence_fast": __version__,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "cpu": _cpu(),
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "packages": {name: _version(name) for name in _PACKAGES},
        "compilers": {name: _compiler(command) for name, command in _COMPILERS.items()},
        "forced_backend": os.environ.get("INFLUENCE_FAST_BACKEND"),
        "backends": {device: {op: _backend(op, device) for op in ops.OPS} for device in devices},
    }


def _backend(op: str, device: str) -> dict[str, Any]:
    reasons = {name: ops.available(op, name, device) for name in ops.BACKENDS}
    return {
        "takes": next(
            name for name in ops.BACKENDS if reasons[name] is None and (device == "cuda" or name != "triton")
        ),
        "not": {name: reason for name, reason in reasons.items() if reason},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return output.splitlines()[-1] if output else None
