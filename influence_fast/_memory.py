"""Memory: what is free, what was used, and sizes as text."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
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


def give_back() -> None:
    """Return to the system what was freed and the C library keeps.

    glibc keeps freed blocks of up to 32 MiB in its heap, where smaller ones that stay come to lie between them, so that the
    heap grows with every batch though no more is in use. Does nothing elsewhere.
    """
    if (trim := _trim()) is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


class GiveBack:
    """Calls :func:`give_back`, at most once in some seconds: as often as costs nothing to speak of."""

    def __init__(self, seconds: float = 4.0) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last >= self._seconds:
            give_back()
            self._last = time.monotonic()


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    with suppress(OSError):
        # What getrusage says begins with what the process that started this one held.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.M):
            return 1024 * int(found[1])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
