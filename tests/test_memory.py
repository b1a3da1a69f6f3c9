"""Sizes as text, and what a process may take."""

from __future__ import annotations

import platform
import subprocess
import sys
import time

import psutil
import pytest
import torch

from influence_fast._memory import GiveBack, free_memory, give_back, parse_memory, peak_memory
from influence_fast.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"), [(5, 5), ("512MiB", 512 << 20), (" 2 gib ", 2 << 30), ("1.5GB", 1_500_000_000), ("7", 7)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("wrong", [0, -1, True, "much", "2XiB", 1.5])
def test_what_is_no_size(wrong: object) -> None:
    with pytest.raises(InputError, match="memory: expected bytes, or text such as 2GiB"):
        parse_memory(wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(platform.system() != "Linux", reason="others begin at zero anyway")
def test_the_peak_is_of_this_process_alone() -> None:
    held = torch.ones(100 << 20)
    code = "from influence_fast._memory import *; print(peak_memory(), psutil.Process().memory_info().rss)"
    peak, now = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split())
    # The kernel counts pages a processor at a time, and the second number is read later.
    assert 0.9 * now < peak < 1.5 * now < held.nbytes


def test_processes_of_one_job_share_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})())
    assert free_memory(cpu) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(cpu) == 250


def test_the_peak_grows_with_what_is_held() -> None:
    before = peak_memory()
    torch.ones(64 << 18)  # 64 MiB
    assert peak_memory() >= before
    assert peak_memory() > 64 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own ways")
def test_what_was_freed_between_what_stays_is_given_back() -> None:
    def held() -> int:
        return psutil.Process().memory_info().rss

    # Below the size that the C library gives back by itself, with something small behind each.
    large, small = [], []
    for _ in range(1000):
        large.append(bytearray(100_000))
        small.append(bytearray(1_000))
    full = held()
    large.clear()
    kept = held()
    give_back()
    assert held() < full - 80_000_000
    assert kept > held() + 40_000_000
    assert len(small) == 1000


def test_it_is_given_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, now = [], [0.0]
    monkeypatch.setattr("influence_fast._memory.give_back", lambda: calls.append(now[0]))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    often = GiveBack(4.0)
    for now[0] in (0.0, 3.9, 4.0, 5.0, 7.9, 8.5):
        often()
    assert calls == [4.0, 8.5]
