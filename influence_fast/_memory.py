"""Memory: what is free, what was used, and sizes as text."""

from __future__ import annotations

import os
import re
import resource
import sys
from typing import TYPE_CHECKING

import psutil

from influence_fast.errors import InputError

if TYPE_CHECKING:
    import torch


def parse_memory(memory: int | str) -> int:
    """Bytes from an int or from text such as ``512MiB``, ``2GiB`` or ``1.5GB``.

    Raises:
        InputError: neither, or not positive.
    """
    units = {"": 1, "b": 1, **{f"{u}b": 1000**i for i, u in enumerate("kmgt", 1)}}
    units |= {f"{u}ib": 1024**i for i, u in enumerate("kmgt", 1)}
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", memory.lower())
        if found and found[2] in units:
            memory = int(float(found[1]) * units[found[2]])
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise InputError(f"memory: expected bytes, or text such as 2GiB, got {memory!r}")
    return memory


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device: main memory is shared by the processes of one job."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
