"""Uses of a weight away from its module: each that is followed, and those that are not and say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import influence_fast as inf

functional = nn.functional
IDS = torch.tensor([[0, 1, 2], [3, 3, 1]])


class Uses(nn.Module):
    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.table, self.use = nn.Linear(4, 4), nn.Embedding(4, 4, padding_idx=1), use
        self.ids = IDS

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.use(self, x))


FOLLOWED = {
    "linear": lambda m, x: functional.linear(x, m.linear.weight),
    "linear with its bias": lambda m, x: functional.linear(x, m.linear.weight, m.linear.bias),
    "transposed": lambda m, x: x @ m.linear.weight.T,
    "rows": lambda m, x: torch.matmul(x, m.linear.weight),
    "twice transposed": lambda m, x: functional.linear(x, m.linear.weight.t().transpose(0, 1)),
    "permuted to itself": lambda m, x: x @ m.linear.weight.permute(0, 1),
    "from the left": lambda m, x: (m.linear.weight @ x.transpose(1, 2)).mT,
    "in another type": lambda m, x: functional.linear(x.float(), m.linear.weight.float()).double(),
    "module and weight": lambda m, x: m.linear(x) @ m.linear.weight.T,
    "ids": lambda m, x: functional.embedding(m.ids, m.linear.weight) * x,
    "ids of columns": lambda m, x: functional.embedding(m.ids, m.linear.weight.T) * x,
    "table's columns": lambda m, x: functional.embedding(m.ids, m.table.weight.T) * x,
    "table": lambda m, x: 3 * functional.embedding(m.ids, m.table.weight, padding_idx=1) * x,
    "table as a head": lambda m, x: (m.table(m.ids) * x) @ m.table.weight.T,
}
LOST = {
    "mul": lambda m, x: x @ (2 * m.linear.weight),
    "cat": lambda m, x: x @ torch.cat([m.linear.weight, m.linear.weight])[:4],
    "both": lambda m, x: x @ (m.linear.weight @ m.linear.weight),
    "__getitem__": lambda m, x: x * m.linear.weight[0],
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_each_use_has_its_gradient(name: str) -> None:
    torch.manual_seed(0)
    model, x = Uses(FOLLOWED[name]).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    layers = ["table"] if "table" in name else ["linear"] + (["linear.bias"] if name == "linear with its bias" else [])
    with inf.GradientCapture(model, layers, followed=layers) as capture:
        model(x).square().sum().backward()
        got = capture.pop()
    for row in range(2):
        model.ids = IDS[row : row + 1]
        for layer in layers:
            weight = model.get_parameter(layer if "bias" in layer else f"{layer}.weight")
            (expected,) = torch.autograd.grad(model(x[row : row + 1]).square().sum(), weight)
            expected = expected.T if layer == "table" else expected
            torch.testing.assert_close(got[layer][row], expected.flatten(), rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("name", LOST)
def test_a_use_that_cannot_be_told_is_named(name: str) -> None:
    model, x = Uses(LOST[name]), torch.randn(2, 3, 4)
    with (
        inf.GradientCapture(model, ["linear"], followed=["linear"]),
        pytest.raises(inf.InputError, match=r"layer 'linear': autograd alone can tell its gradient from a use in"),
    ):
        model(x)
