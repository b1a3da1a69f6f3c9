"""Cancellation of a layer's gradients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from stores import write_store

import influence_fast as inf


def test_cancellation(tmp_path: Path, monkeypatch) -> None:
    data = {"a": torch.randn(30, 4), "b": torch.tensor([[1.0], [-1.0]] * 15)}
    expected = float(data["a"].abs().sum() / data["a"].sum(0).abs().sum())
    for source in (data, write_store(tmp_path / "s", data)):
        assert inf.cancellation(source)["a"] == pytest.approx(expected, rel=1e-5)
        assert inf.cancellation(source, ["b"]) == {"b": math.inf}
    with pytest.raises(inf.InputError, match="expected some of a, b, got 'z'"):
        inf.cancellation(data, ["z"])
