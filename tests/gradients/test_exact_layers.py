"""Layers that autograd takes: several rows by torch.func, one at a time where rows disagree or torch.func cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import influence_fast as inf
from influence_fast.gradients.exact_layers import gradients


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


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_weights_within_a_checkpoint(reentrant: bool, learned: bool) -> None:
    """autograd.grad refuses a part that runs again on the way to an input, and overlooks one that is on no way to any."""
    first, inner, last = (nn.Linear(3, 3) for _ in range(3))
    x = torch.randn(2, 3, requires_grad=True)
    weights = [inner.weight, last.weight, *([first.weight] if learned else [])]
    unused = nn.Parameter(torch.ones(2))

    def loss(again: bool) -> Tensor:
        y = first(x) if learned else first(x).detach().requires_grad_()
        found = checkpoint(lambda y: inner(y).tanh(), y, use_reentrant=reentrant) if again else inner(y).tanh()
        return last(found).square().sum()

    expected = torch.autograd.grad(loss(False), weights)
    found = gradients(lambda: loss(True), [*weights, unused])
    for wanted, got in zip([*expected, torch.zeros(2)], found, strict=True):
        torch.testing.assert_close(got, wanted)
    assert all(weight.grad is None for weight in [*weights, unused])


def test_a_loss_without_any_of_the_weights() -> None:
    used, unused = nn.Linear(2, 1), nn.Linear(2, 1).requires_grad_(True)
    used.requires_grad_(False)
    (found,) = gradients(lambda: used(torch.ones(1, 2)).sum(), [unused.weight])
    assert torch.equal(found, torch.zeros(1, 2))
