"""Curvature that is kept, against dense solutions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import influence_fast as inf
from influence_fast.attribution.curvature import LayerCurvature, default_rank

DIM, ROWS, WEIGHTS, DAMPING = 12, 90, 40, 0.1
METHODS = ("datainf", "trak", "trackstar")


def gradients(rows: int = ROWS, dim: int = DIM, decay: float = 0.5, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=random) * torch.arange(1, dim + 1) ** -decay


def made(method: str, rows: Tensor, rank: int | None = None) -> LayerCurvature:
    return LayerCurvature.made(method, "x", rows.shape[1], WEIGHTS, DAMPING, lambda: rows.split(17), rank)


def dense(method: str, rows: Tensor) -> tuple[Tensor, float]:
    """``H^-1`` by its definition (METHOD: datainf's closed form, or the inverse of the damped second moment)."""
    g = rows.double()
    n, square = len(g), g.square().sum(1)
    if method == "datainf":
        lam = DAMPING * float(square.sum()) / (n * WEIGHTS)
        outer = sum(torch.outer(row, row) / (lam + s) for row, s in zip(g, square, strict=True))
        return (torch.eye(g.shape[1], dtype=torch.float64) - outer / n) / lam, lam
    lam = DAMPING * float(square.sum()) / (n * g.shape[1])
    return (g.T @ g / n + lam * torch.eye(g.shape[1], dtype=torch.float64)).inverse(), lam


@pytest.mark.parametrize("method", METHODS)
def test_the_definition(method: str) -> None:
    rows, asked = gradients(), gradients(5, seed=1)
    found, (inverse, lam) = made(method, rows), dense(method, rows)
    assert found.shift == pytest.approx(lam)
    assert (found.rows, found.share) == (ROWS, 1)
    torch.testing.assert_close(found.precondition(asked), asked.double() @ inverse, rtol=1e-10, atol=1e-12)
    if method != "datainf":
        expected = ((rows.double() @ inverse) * rows).sum(1)
        torch.testing.assert_close(found.squares_of([rows]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_is_closer_the_higher_and_says_what_it_holds(method: str) -> None:
    rows, asked = gradients(400, 120, 1.0), gradients(6, 120, 1.0, seed=1)
    inverse, lam = dense(method, rows)
    expected = asked.double() @ inverse
    damped = torch.linalg.eigvalsh(inverse).flip(0)
    eigenvalues = (1 - lam * damped).sort().values if method == "datainf" else (1 / damped - lam).sort().values
    shares, errors = [], []
    for rank in (10, 30, 90):
        found = made(method, rows, rank)
        assert found.tensors["sketch"].shape == (120, rank)
        shares.append(found.share)
        # No more than the largest eigenvalues hold; one pass finds most of it, also at a rank of 10.
        best = float(eigenvalues[-rank:].sum() / eigenvalues.sum())
        assert 0.75 * best < found.share <= best + 1e-12
        errors.append(float((found.precondition(asked) - expected).norm() / expected.norm()))
    assert shares == sorted(shares)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1


def test_fewer_rows_than_the_rank_leave_nothing_out() -> None:
    rows, asked = gradients(20, 300, 0.0), gradients(4, 300, 0.0, seed=1)
    found, (inverse, _) = made("trackstar", rows, 32), dense("trackstar", rows)
    assert found.share == pytest.approx(1)
    torch.testing.assert_close(found.precondition(asked), asked.double() @ inverse, rtol=1e-6, atol=1e-8)
    expected = ((rows.double() @ inverse) * rows).sum(1)
    torch.testing.assert_close(found.tensors["lengths"], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("method", ["trak", "ekfac"])
def test_rows_can_be_added(method: str, rank: int | None) -> None:
    rows, asked = gradients(), gradients(3, seed=1)
    factors = (torch.eye(4) + torch.ones(4, 4), torch.eye(3) + torch.ones(3, 3))

    def of(part: Tensor) -> LayerCurvature:
        return LayerCurvature.made(method, "x", DIM, WEIGHTS, DAMPING, lambda: part.split(17), rank, factors)

    grown, whole = of(rows[:50]), of(rows)
    assert grown.grows
    grown.extend(rows[50:].split(7))
    torch.testing.assert_close(grown.precondition(asked), whole.precondition(asked), rtol=1e-6, atol=1e-6)
    assert grown.rows == ROWS


def test_ekfac_is_that_of_influence() -> None:
    rows, asked = gradients(), gradients(3, seed=1)
    half = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)), torch.eye(3) + torch.ones(3, 3)
    factors = half[0] @ half[0].T, half[1]
    found = LayerCurvature.made("ekfac", "x", DIM, WEIGHTS, DAMPING, lambda: [rows], None, factors)
    expected = inf.influence({"x": rows}, {"x": asked}, "ekfac", factors={"x": factors}, damping=DAMPING).layer("x")
    torch.testing.assert_close((found.precondition(asked) @ rows.double().T).float(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(inf.InputError, match="factors: ekfac needs those of layer 'x'"):
        LayerCurvature.made("ekfac", "x", DIM, WEIGHTS, DAMPING, lambda: [rows])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_zero_and_those_that_are_not_finite(method: str) -> None:
    rows = torch.zeros(5, DIM)
    assert not made(method, rows).precondition(gradients(2)).any()
    rows[3, 1] = float("inf")
    with pytest.raises(inf.InputError, match="layer 'x' has NaN or infinity in row 3"):
        made(method, rows)


def test_kept_numbers_that_cannot_be_decomposed() -> None:
    """As of a damaged file that is read without checks; their shape alone is known to be right."""
    found = made("trackstar", gradients(), 8)
    tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
    tensors["sketch"][3, 2] = math.nan
    broken = LayerCurvature("trackstar", "x", WEIGHTS, DAMPING, tensors)
    with pytest.raises(inf.InputError, match="curvature: that of layer 'x' cannot be decomposed"):
        broken.precondition(gradients(2))


def test_ranks_fit_a_gib() -> None:
    assert [default_rank(dim) for dim in (5000, 131_072, 262_144, 10**6)] == [1024, 1024, 512, 134]
