"""LESS's files against gradients that are computed here, one sample at a time."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_fast as inf
from influence_fast import InputError, ops
from influence_fast.compat import less, trak


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.used, self.frozen, self.unused = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(loss=self.frozen(self.used(x).tanh()).square().sum())


SAMPLES = [{"x": x} for x in torch.randn(19, 1, 4, generator=torch.Generator().manual_seed(0))]


def state(model: Model) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(2)
    return {
        name: {"exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p)} for name, p in model.named_parameters()
    }


def rows(model: Model, kind: str, moments: dict[str, dict[str, Tensor]]) -> Tensor:
    found = []
    for sample in SAMPLES:
        model.zero_grad()
        model(**sample).loss.backward()
        parts = []
        for name, p in model.named_parameters():
            if p.requires_grad:
                g = torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                m, v = (moments[name][key].flatten() for key in ("exp_avg", "exp_avg_sq"))
                adam = (0.9 * m + 0.1 * g) / (0.999 * v + 0.001 * g * g + 1e-8).sqrt()
                parts.append({"adam": adam, "sign": g.sign(), "sgd": g}[kind])
        found.append(torch.cat(parts).half().double())
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["adam", "sign", "sgd"])
def test_files_hold_projected_gradients(tmp_path: Path, kind: str) -> None:
    model = Model()
    moments = state(model)
    less.collect_grads(SAMPLES, model, tmp_path, [8, 5], moments, kind)
    expected = rows(model, kind, moments)
    for dim in (8, 5):
        folder = tmp_path / f"dim{dim}"
        assert sorted(path.name for path in folder.iterdir()) == ["all_orig.pt", "all_unormalized.pt", "grads-19.pt"]
        found = torch.load(folder / "all_unormalized.pt")
        matrix = ops.Side("rademacher", 0, dim, expected.shape[1]).matrix(torch.float64)
        torch.testing.assert_close(found.double(), expected @ matrix.T, rtol=2e-3, atol=2e-3)
        unit = torch.load(folder / "all_orig.pt")
        torch.testing.assert_close(unit, found / found.norm(dim=1, keepdim=True))


def test_a_stopped_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(less, "_PROJECTED", 2)
    monkeypatch.setattr(less, "_SAVED", 4)
    whole, parts, model = tmp_path / "whole", tmp_path / "parts", Model()
    less.collect_grads(SAMPLES, model, whole, [8], gradient_type="sgd")
    less.collect_grads(SAMPLES, model, parts, [8], gradient_type="sgd", max_samples=9)
    assert len(torch.load(parts / "dim8/all_orig.pt")) == 9
    before = (parts / "dim8/grads-8.pt").stat().st_mtime_ns
    less.collect_grads(SAMPLES, model, parts, [8], gradient_type="sgd")
    assert (parts / "dim8/grads-8.pt").stat().st_mtime_ns == before
    first, second = (torch.load(folder / "dim8/all_unormalized.pt") for folder in (whole, parts))
    torch.testing.assert_close(first, second)
    # A dimension that is new begins at the first sample, and leaves no row of the others twice.
    less.collect_grads(SAMPLES, model, parts, [8, 5], gradient_type="sgd")
    assert [len(torch.load(parts / f"dim{dim}/all_orig.pt")) for dim in (8, 5)] == [19, 19]
    torch.testing.assert_close(torch.load(parts / "dim8/all_unormalized.pt"), first)


def test_in_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = {name: (lambda: None) for name in ("collect_grads", "get_trak_projector")}
    names = ("less", "less.data_selection", "less.data_selection.collect_grad_reps", "less.data_selection.get_info")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[names[2]]).update(stock)
    vars(sys.modules[names[3]]).update(collect_grads=stock["collect_grads"])
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.1")
    with inf.patch("less") as patched:
        assert sorted(patched.places) == [
            f"{names[2]}.collect_grads",
            f"{names[2]}.get_trak_projector",
            f"{names[3]}.collect_grads",
        ]
        assert vars(sys.modules[names[3]])["collect_grads"] is less.collect_grads
    assert vars(sys.modules[names[3]])["collect_grads"] is stock["collect_grads"]
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.2")
    with pytest.raises(InputError, match=r"expected version 0\.1, got 0\.2"):
        inf.patch("less")


def test_what_is_refused(tmp_path: Path) -> None:
    model = Model()
    with pytest.raises(InputError, match="gradient_type"):
        less.collect_grads(SAMPLES, model, tmp_path, [8], gradient_type="lion")
    with pytest.raises(InputError, match=r"exp_avg_sq of 12 for used\.weight"):
        less.collect_grads(SAMPLES, model, tmp_path, [8])
    with pytest.raises(InputError, match="at least one sample"):
        less.collect_grads([], model, tmp_path, [8], gradient_type="sgd")
    assert less.get_trak_projector(torch.device("cpu")) is trak.BasicProjector
