"""A damping by rows held out: its criterion is least at the truth, and grows as rows get few."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import influence_fast as inf
from benchmarks import lds
from benchmarks.lds_damping import GRID, held_out_dampings, misfit


def test_the_misfit_is_least_where_damped_eigenvalues_are_those_of_held_out_rows() -> None:
    fitted = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    # A tenth of the mean of 2 was missing from each.
    found = {damping: misfit(fitted, fitted + 0.2, damping) for damping in (0.0, 0.05, 0.1, 0.2, 1.0)}
    assert min(found, key=lambda damping: found[damping]) == 0.1
    assert found[0.1] == pytest.approx(-float((fitted / (fitted + 0.2)).sum()))


def test_few_rows_ask_for_more_damping_than_many(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lds.Digits().double().eval()
    random = torch.Generator().manual_seed(0)
    chosen = []
    for count in (10, 400):
        pixels = torch.randint(17, (count, 64), generator=random).tolist()
        rows = [{"input_ids": ids, "labels": i % 10} for i, ids in enumerate(pixels)]
        store = inf.build_store(
            tmp_path / str(count), model, rows, ["head"], "identity", "classification", progress=False
        )
        chosen.append(held_out_dampings(store, model, rows, ["head"])["head"])
    assert set(chosen) <= set(GRID)
    assert chosen[0] > chosen[1]
