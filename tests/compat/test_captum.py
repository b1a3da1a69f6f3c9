"""TracInCP against a loop of autograd over single samples, and against captum where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import influence_fast as inf
from influence_fast.compat import captum
from influence_fast.compat._parameter_gradients import ParameterGradients


class Model(nn.Module):
    """A convolution, a norm, tokens, one layer of a sample, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.LayerNorm(4)
        self.hidden, self.head = nn.Linear(4, 20), nn.Linear(20, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x).flatten(2).mT)
        return self.head(self.hidden(tokens).tanh().mean(1)) * self.scale


RATES = {"c-2.pt": 0.5, "c-10.pt": 2.0}


def load(model: nn.Module, path: str) -> float:
    model.load_state_dict(torch.load(path, weights_only=True))
    return RATES[Path(path).name]


@pytest.fixture
def case(tmp_path: Path) -> tuple[nn.Module, TensorDataset, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Model()
    for name in RATES:
        torch.save({n: p + 0.1 * torch.randn_like(p) for n, p in model.state_dict().items()}, tmp_path / name)
    data = TensorDataset(torch.randn(11, 1, 5, 5), torch.randint(0, 3, (11,)))
    return model, data, (torch.randn(4, 1, 5, 5), torch.randint(0, 3, (4,)))


def rows(model: nn.Module, x: Tensor, y: Tensor, parameters: list[nn.Parameter], loss: Callable[..., Tensor]) -> Tensor:
    found = []
    for i in range(len(x)):
        grads = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), parameters)
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


def literal(model: nn.Module, folder: Path, data: TensorDataset, queries: Any, layers: list[str] | None) -> Any:
    """Scores, self-influence of the training data, and what the queries give, by single samples in float64."""
    model = Model().double()
    modules = [model] if layers is None else [model.get_submodule(name) for name in layers]
    parameters = [p for module in modules for p in module.parameters()]
    scores, own, given = 0, 0, []
    for name, rate in RATES.items():
        model.load_state_dict(torch.load(folder / name))
        train = rows(model, data.tensors[0].double(), data.tensors[1], parameters, F.cross_entropy)
        query = rows(model, queries[0].double(), queries[1], parameters, F.cross_entropy)
        scores, own = scores + rate * query @ train.T, own + rate * train.square().sum(1)
        given.append(rate * query)
    return scores, own, torch.cat(given, 1)


@pytest.mark.parametrize(
    ("reduction", "by_batch"), [("none", False), ("sum", True), ("mean", True)], ids=["none", "sum", "mean"]
)
@pytest.mark.parametrize("layers", [None, ["hidden", "head"]], ids=["all", "two"])
def test_scores_are_those_of_single_samples(
    case: Any, tmp_path: Path, reduction: str, by_batch: bool, layers: list[str] | None
) -> None:
    model, data, queries = case
    loss = nn.CrossEntropyLoss(reduction=reduction)
    tracin = captum.TracInCP(
        model, data, str(tmp_path), load, layers, loss, batch_size=4, sample_wise_grads_per_batch=by_batch
    )
    assert [Path(path).name for path in tracin.checkpoints] == list(RATES)
    scores, own, given = literal(model, tmp_path, data, queries, layers)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(tracin.influence(queries), scores, **close)
    torch.testing.assert_close(tracin.influence(DataLoader(TensorDataset(*queries), 3)), scores, **close)
    torch.testing.assert_close(tracin.influence(queries, aggregate=True), scores.sum(0, keepdim=True), **close)
    for largest in (True, False):
        found = tracin.influence(queries, k=6, proponents=largest)
        assert isinstance(found, captum.KMostInfluentialResults)
        best, numbers = scores.topk(6, largest=largest)
        torch.testing.assert_close(found.influence_scores, best, **close)
        assert torch.equal(found.indices, numbers)
    for by_checkpoint in (False, True):
        torch.testing.assert_close(tracin.self_influence(outer_loop_by_checkpoints=by_checkpoint), own, **close)
    torch.testing.assert_close(tracin.compute_intermediate_quantities(queries), given, **close)
    summed = tracin.compute_intermediate_quantities(DataLoader(TensorDataset(*queries), 3), aggregate=True)
    torch.testing.assert_close(summed, given.sum(0, keepdim=True), **close)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_last_layer_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    torch.save(model.state_dict(), tmp_path / "c-1.pt")
    data = TensorDataset(torch.randn(11, 6), torch.randint(0, 4, (11,)))
    queries = torch.randn(3, 6), torch.randint(0, 4, (3,))
    weight = [model[2].weight]
    train, query = (rows(model, *batch, weight, F.cross_entropy) for batch in (data.tensors, queries))
    for reduction in ("sum", "mean"):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        for layer in ("2", model[2]):
            tracin = captum.TracInCPFast(model, layer, data, str(tmp_path), loss_fn=loss, batch_size=4)
            torch.testing.assert_close(tracin.influence(queries), query @ train.T)
            torch.testing.assert_close(tracin.self_influence(), train.square().sum(1))


def test_a_use_that_no_hook_sees_is_left_to_autograd() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.other = nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(F.linear(self.linear(x), self.linear.weight))

    torch.manual_seed(0)
    model, x, y = Tied(), torch.randn(3, 5), torch.randint(0, 2, (3,))
    parameters = list(model.parameters())
    found = ParameterGradients(model, parameters)
    parts = found.of_batch((x,), y, lambda out, labels: F.cross_entropy(out, labels, reduction="none"))
    own = torch.cat([found.flat(part, i) for i, part in enumerate(parts)], 1)
    torch.testing.assert_close(own, rows(model, x, y, parameters, F.cross_entropy), rtol=1e-4, atol=1e-6)
    assert found._names == ["", "linear.bias", "other", "other.bias"]


def test_inputs_in_one_tuple(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a: Any, b: Tensor | None = None) -> Tensor:
            a, b = (a, b) if b is not None else a
            return self.layer(a * b)

    model = Pair()
    torch.save(model.state_dict(), tmp_path / "c.pt")
    data = TensorDataset(torch.randn(5, 3), torch.randn(5, 3), torch.randint(0, 2, (5,)))
    tracin = captum.TracInCP(model, data, [str(tmp_path / "c.pt")], loss_fn=nn.CrossEntropyLoss(reduction="none"))
    torch.testing.assert_close(tracin.influence(data[:2], unpack_inputs=False), tracin.influence(data[:2]))


def test_what_is_refused(case: Any, tmp_path: Path) -> None:
    model, data, queries = case
    with pytest.raises(ValueError, match="Invalid checkpoints"):
        captum.TracInCP(model, data, [], load)
    with pytest.raises(AssertionError, match="must be none"):
        captum.TracInCP(model, data, str(tmp_path), load, loss_fn=nn.CrossEntropyLoss())
    with pytest.raises(AssertionError, match="list of names"):
        captum.TracInCP(model, data, str(tmp_path), load, layers="head")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='Invalid final_fc_layer str: "nothing"'):
        captum.TracInCPFast(model, "nothing", data, str(tmp_path), load, nn.CrossEntropyLoss())
    with pytest.raises(AssertionError, match="loss function must not be none"):
        captum.TracInCPFast(model, "head", data, str(tmp_path), load)
    with pytest.warns(UserWarning, match="one loss a sample"):
        tracin = captum.TracInCP(model, data, str(tmp_path), load, loss_fn=lambda out, labels: out.sum())
    with pytest.raises(AssertionError, match="applying a reduction"):
        tracin.influence(queries)
    with pytest.raises(AssertionError, match="self influence"):
        tracin.influence(None)


def test_in_captum(case: Any, tmp_path: Path) -> None:
    influence = pytest.importorskip("captum.influence")
    model, data, queries = case
    stock = influence.TracInCP
    arguments = {"loss_fn": nn.CrossEntropyLoss(reduction="none"), "batch_size": 4}
    expected = stock(model, data, str(tmp_path), load, **arguments).influence(queries)
    with inf.patch("captum") as patched:
        assert {"captum.influence.TracInCP", "captum.influence.TracInCPFast"} <= set(patched.places)
        found = influence.TracInCP(model, data, str(tmp_path), load, **arguments).influence(queries)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert influence.TracInCP is stock
