"""Sizes as text, and what a process may take."""

from __future__ import annotations

import psutil
import pytest
import torch

from influence_fast._memory import free_memory, parse_memory, peak_memory
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
