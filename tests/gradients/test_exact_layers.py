"""Layers that autograd takes: several rows by torch.func, one at a time where rows disagree or torch.func cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import influence_fast as inf


class Model(nn.Module):
    def __init__(self, inside: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.inside = nn.Linear(3, 3, bias=False), inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self, x) @ (2 * self.linear.weight).tanh()


def condition(model: nn.Module, x: Tensor) -> Tensor:
    return 2 * x if x[..., 0].abs().max() > 0.5 else x.square()


def converts(model: nn.Module, x: Tensor) -> Tensor:
    return model.linear.to(torch.float64)(x)


CASES = {
    "plain": (lambda model, x: x, True),
    "rows agree": (lambda model, x: 2 * x if x.isfinite().all() else x, True),
    "rows disagree": (condition, False),
    "no rule": (lambda model, x: x * len(x.abs().flatten().tolist()), False),
    "converts itself": (converts, True),
}


@pytest.mark.parametrize("name", CASES)
def test_every_row_has_its_gradient(name: str) -> None:
    torch.manual_seed(0)
    inside, in_batches = CASES[name]
    model = Model(inside).double().requires_grad_(False)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    x[0, :, 0] = 0.1

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().flatten(1).sum(1)

    with inf.GradientCapture(model, ["linear"], exact=["linear"], batched=True) as capture:
        capture.differentiate(loss, {"x": x})
        assert (capture.one_by_one == "") == in_batches
        got = capture.pop()["linear"]
    model.requires_grad_(True)
    for row in range(5):
        (expected,) = torch.autograd.grad(loss(model, {"x": x[row : row + 1]}).sum(), model.linear.weight)
        torch.testing.assert_close(got[row], expected.flatten())
