"""Convolutions and norms of every kind, one sample at a time, and what is not plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.gradients.plain_layers import plain_kind


def check(model: nn.Module, x: Tensor) -> None:
    """Captured gradients of all parameters against ``autograd.grad`` of each sample alone."""
    with inf.GradientCapture(model, "trained") as capture:
        torch.tanh(model(x)).square().sum().backward()
        got = capture.pop()
    for row in range(len(x)):
        loss = torch.tanh(model(x[row : row + 1])).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for (name, _), expected in zip(model.named_parameters(), grads, strict=True):
            torch.testing.assert_close(got[name][row], expected.flatten(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": 2, "groups": 2},
        {"groups": 4, "padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
        {"stride": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("axes", [1, 2])
def test_convolutions(axes: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    check(nn.Sequential(kind(4, 8, 3, **options)).double(), torch.randn(3, 4, *[9, 8][:axes], dtype=torch.float64))


class Offset(nn.Module):
    """A norm whose weight is added to 1, of its input over the root mean square."""

    def __init__(self, width: int, power: bool = True) -> None:
        super().__init__()
        self.weight, self.power, self.eps = nn.Parameter(torch.zeros(width)), power, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        normal = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() if self.power else x
        return normal * (1 + self.weight)


class OffsetNorm(Offset):
    pass


class NoNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


@pytest.mark.parametrize(
    ("norm", "kind"),
    [(nn.LayerNorm(6), "mean"), (nn.RMSNorm(6), "square"), (OffsetNorm(6), "square"), (NoNorm(6), "none")],
    ids=["layer", "rms", "offset", "none"],
)
def test_norms(norm: nn.Module, kind: str) -> None:
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm, x = norm.double(), torch.randn(3, 5, 6, dtype=torch.float64)
    assert plain_kind(norm, x, norm(x)) == kind
    assert plain_kind(norm, x, 2 * norm(x)) == ""
    check(nn.Sequential(norm), x)


def test_quantised_weights_are_no_layers() -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4, bias=False)
            self.weight = nn.Parameter(torch.randint(-9, 9, (4, 4), dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) / 9)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), Packed(), nn.Linear(4, 2, bias=False)).double()
    assert inf.select_layers(model) == ["0", "2"]
    with pytest.raises(inf.InputError, match="the weight of '1' is quantised and frozen"):
        inf.select_layers(model, ["1"])
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    with inf.GradientCapture(model) as capture:
        model(x).square().sum().backward()
        got = capture.pop()
    for row in range(3):
        (expected,) = torch.autograd.grad(model(x[row : row + 1]).square().sum(), model[0].weight)
        torch.testing.assert_close(got["0"][row], expected.flatten())


def test_magnitudes_of_dora() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(base, config).double()
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    names = [name for name in inf.select_layers(model, "trained") if "magnitude" in name]
    assert len(names) == 2
    with inf.GradientCapture(model, names) as capture:
        weight = model.get_parameter(names[0])
        with torch.no_grad():
            weight[0] = 0  # nothing is left of what it scaled
        model(x).square().sum().backward()
        with pytest.raises(inf.InputError, match="before its magnitudes"):
            capture.pop()
        capture.clear()
    with torch.no_grad():
        weight[0] = 1
    with inf.GradientCapture(model, names) as capture:
        model(x).square().sum().backward()
        got = capture.pop()
    for row in range(3):
        loss = model(x[row : row + 1]).square().sum()
        for name, expected in zip(
            names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True
        ):
            torch.testing.assert_close(got[name][row], expected, rtol=1e-9, atol=1e-12)
