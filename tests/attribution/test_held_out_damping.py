"""A damping by rows held out: against dense float64 matrices, against the truth, and its errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.attribution.held_out_damping import GRID, held_out_misfits, misfit
from influence_fast.attribution.preconditioners import kronecker_basis, turned

Rows = list[dict[str, Any]]


class Words(nn.Module):
    """Vectors of tokens, a layer over each of them, their mean over real tokens, classes."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(20, 10), nn.Linear(10, 8), nn.Linear(8, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        mask = attention_mask[..., None].to(self.head.weight.dtype)
        states = self.hidden(self.embedding(input_ids)).tanh() * mask
        return SimpleNamespace(logits=self.head(states.sum(1) / mask.sum(1)))


def made(count: int, seed: int = 0) -> tuple[nn.Module, Rows]:
    """A model and rows of 1 to 6 tokens."""
    torch.manual_seed(0)
    model = Words().double().eval()
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (count,), generator=random).tolist()
    rows = [{"input_ids": torch.randint(1, 20, (n,), generator=random).tolist(), "labels": n % 3} for n in lengths]
    return model, rows


def store_of(path: Path, model: nn.Module, rows: Rows) -> inf.GradientStore:
    return inf.build_store(path, model, rows, ["hidden", "head"], "identity", "classification", progress=False)


def parts_of(count: int, folds: int, seed: int) -> list[Tensor]:
    return list(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tensor_split(folds))


def test_misfits_are_those_of_dense_matrices(tmp_path: Path) -> None:
    model, rows = made(23)
    store = store_of(tmp_path / "s", model, rows)
    found = held_out_misfits(model, rows, store, None, GRID, 4, 7, progress=False)
    for name in ("hidden", "head"):
        grads, totals = store.read(name).double(), torch.zeros(len(GRID), dtype=torch.float64)
        for held_out in parts_of(23, 4, 7):
            others = [i for i in range(23) if i not in held_out.tolist()]
            factors = inf.kronecker_factors(model, [rows[i] for i in others], [name], progress=False)[name]
            basis = torch.kron(*(torch.linalg.eigh(factor).eigenvectors for factor in reversed(factors)))
            second, eigenvalues = grads[held_out].T @ grads[held_out] / len(held_out), (grads[others] @ basis).square()
            curvature = basis @ torch.diag(eigenvalues.mean(0)) @ basis.T
            for place, share in enumerate(GRID):
                shift = share * curvature.trace() / len(curvature) * torch.eye(len(curvature), dtype=torch.float64)
                step = torch.linalg.inv(curvature + shift) @ curvature
                inverse = torch.linalg.inv(curvature + shift)
                totals[place] += (second @ step @ inverse).trace() - 2 * step.trace()
        # Beside the least of 1e-8 the inverse of what is nearly singular is rounding.
        torch.testing.assert_close(found[name][1:], totals[1:], rtol=1e-3, atol=1e-3)
    chosen = inf.held_out_damping(model, rows, store, folds=4, seed=7, progress=False)
    assert chosen == {name: GRID[int(found[name].argmin())] for name in ("hidden", "head")}
    assert inf.held_out_damping(model, rows, store, ["head"], folds=4, seed=7, progress=False) == {
        "head": chosen["head"]
    }
    in_memory = {name: store.read(name) for name in store.layers}
    assert inf.held_out_damping(model, rows, in_memory, folds=4, seed=7, progress=False) == chosen


def test_misfit_is_least_where_damped_eigenvalues_are_those_of_held_out_rows() -> None:
    fitted = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    # A tenth of the mean of 2 was missing from each.
    found = {share: float(misfit(fitted, fitted + 0.2, share)) for share in (0.0, 0.05, 0.1, 0.2, 1.0)}
    assert min(found, key=lambda share: found[share]) == 0.1
    assert found[0.1] == pytest.approx(-float((fitted / (fitted + 0.2)).sum()))
    assert float(misfit(torch.zeros(3), torch.ones(3), 0.1)) == 0


def test_what_is_chosen_suits_rows_that_were_never_seen(tmp_path: Path) -> None:
    """Where the rows themselves choose, they take the least damping, which suits others badly."""
    for count in (10, 15, 25):
        model, rows = made(count)
        store = store_of(tmp_path / str(count), model, rows)
        fresh = store_of(tmp_path / f"fresh {count}", model, made(3000, seed=1)[1])
        factors = inf.kronecker_factors(model, rows, ["hidden"], progress=False)["hidden"]
        basis = kronecker_basis("hidden", factors, 80)
        own, truth = (turned(part.read("hidden"), *basis).double().square().mean(0) for part in (store, fresh))
        by_truth, by_itself = ({share: float(misfit(own, b, share)) for share in GRID} for b in (truth, own))
        chosen = inf.held_out_damping(model, rows, store, progress=False)["hidden"]
        least = min(by_truth.values())
        careless = min(by_itself, key=lambda share: by_itself[share])
        assert careless == min(GRID)
        assert by_truth[chosen] - least < 0.2 * (by_truth[careless] - least)


def test_few_rows_ask_for_more_damping_than_many(tmp_path: Path) -> None:
    chosen = []
    for count in (10, 300):
        model, rows = made(count)
        store = store_of(tmp_path / str(count), model, rows)
        chosen.append(inf.held_out_damping(model, rows, store, progress=False)["hidden"])
    assert chosen[0] > chosen[1]


def test_errors(tmp_path: Path) -> None:
    model, rows = made(6)
    store = store_of(tmp_path / "s", model, rows)

    def choose(*given: Any, **options: Any) -> dict[str, float]:
        return inf.held_out_damping(*given, progress=False, **options)

    with pytest.raises(inf.InputError, match="grid: expected positive shares"):
        choose(model, rows, store, grid=[0.0, 0.1])
    with pytest.raises(inf.InputError, match="grid: expected positive shares"):
        choose(model, rows, store, grid=[])
    with pytest.raises(inf.InputError, match="gradients: 6 rows, dataset: 5"):
        choose(model, rows[:5], store)
    for folds in (1, 7):
        with pytest.raises(inf.InputError, match="folds: expected from 2 to the 6 rows"):
            choose(model, rows, store, folds=folds)
    projected = inf.build_store(
        tmp_path / "p", model, rows, ["head"], inf.Projection(dim=(2, 2)), "classification", progress=False
    )
    with pytest.raises(inf.InputError, match="its factors stand for 3 x 8"):
        choose(model, rows, projected, folds=2)
    spoiled = {"head": store.read("head").index_fill(0, torch.tensor([2]), torch.nan)}
    with pytest.raises(inf.InputError, match="'head' has NaN or infinity in row 2"):
        choose(model, rows, spoiled, folds=2)


def test_a_layer_that_mixes_rows_is_named(tmp_path: Path) -> None:
    class Mixed(Words):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
            flat = self.embedding(input_ids).flatten(0, 1)
            states = self.hidden(flat).view(*input_ids.shape, -1)
            return SimpleNamespace(logits=self.head(states.mean(1)))

    _, rows = made(6)
    model = Mixed().double().eval()
    gradients = {"hidden": torch.zeros(6, 80)}
    with pytest.raises(inf.InputError, match=r"'hidden' is given inputs .* which do not tell the rows apart"):
        inf.held_out_damping(model, rows, gradients, folds=2, progress=False)
