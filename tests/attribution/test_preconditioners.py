"""Whitening and Kronecker-factored curvature against dense float64 inverses."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from stores import write_store
from torch import Tensor

import influence_fast as inf


def whitened(train: Tensor, queries: Tensor, cosine: bool, damping: float) -> Tensor:
    g, v = train.double(), queries.double()
    n, d = g.shape
    second = g.T @ g / n
    inverse = torch.linalg.inv(second + damping * second.trace() / d * torch.eye(d, dtype=torch.float64))
    out = v @ inverse @ g.T
    if cosine:
        out /= ((v @ inverse) * v).sum(1).sqrt()[:, None] * ((g @ inverse) * g).sum(1).sqrt()
    return out


@pytest.mark.parametrize("block_bytes", [1 << 27, 100])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dim", [6, 15])  # fewer and more numbers than rows
@pytest.mark.parametrize("damping", [0.1, 1e-3])
@pytest.mark.parametrize("method", ["trak", "trackstar"])
def test_whitening(tmp_path: Path, monkeypatch, method, damping, dim, stored, block_bytes) -> None:
    monkeypatch.setattr(
        importlib.import_module("influence_fast.attribution.gradient_source"), "_BLOCK_BYTES", block_bytes
    )
    train, queries = torch.randn(9, dim), torch.randn(4, dim)
    sides = [{"a": train}, {"a": queries}]
    if stored:
        sides = [write_store(tmp_path / str(i), side) for i, side in enumerate(sides)]
    found = inf.influence(*sides, method, damping=damping).layer("a").double()
    expected = whitened(train, queries, method == "trackstar", damping)
    # The preconditioned query is float32: what cancels in its products is as large as the condition number, 1 / damping.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6 / damping * float(expected.abs().max()))


@pytest.mark.parametrize("dim", [3, 8])
def test_whitening_of_nothing_is_nothing(dim: int) -> None:
    for method in ("trak", "trackstar"):
        matrix = inf.influence({"a": torch.zeros(5, dim)}, {"a": torch.randn(2, dim)}, method)
        assert matrix.layer("a").eq(0).all()


def test_eigenvalue_corrected_curvature() -> None:
    n, m, t, out, in_ = 12, 3, 4, 3, 5
    x, dy = torch.randn(n, t, in_).double(), torch.randn(n, t, out).double()
    train = torch.einsum("nto,nti->noi", dy, x)
    queries = torch.randn(m, out, in_).double()
    a, s = torch.einsum("nti,ntj->ij", x, x) / (n * t), torch.einsum("nto,ntp->op", dy, dy) / (n * t)
    basis = torch.kron(torch.linalg.eigh(s).eigenvectors, torch.linalg.eigh(a).eigenvectors)
    eigenvalues = (train.flatten(1) @ basis).square().mean(0)
    inverse = basis @ torch.diag(1 / (eigenvalues + 0.1 * eigenvalues.mean())) @ basis.T
    expected = queries.flatten(1) @ inverse @ train.flatten(1).T
    found = inf.influence({"a": train.flatten(1)}, {"a": queries.flatten(1)}, "ekfac", factors={"a": (a, s)}).layer("a")
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    zero = inf.influence({"a": torch.zeros(5, out * in_)}, {"a": torch.randn(2, 15)}, "ekfac", factors={"a": (a, s)})
    assert zero.layer("a").eq(0).all()


@pytest.mark.parametrize("method", ["datainf", "trak", "trackstar", "ekfac"])
def test_a_damping_for_each_layer(method: str) -> None:
    train, queries = ({name: torch.randn(n, 6) for name in "ab"} for n in (5, 2))
    factors = {name: (torch.eye(2), torch.eye(3)) for name in "ab"} if method == "ekfac" else None
    matrix = inf.influence(train, queries, method, damping={"b": 0.5, "a": 0.01}, factors=factors)
    for name, damping in (("a", 0.01), ("b", 0.5)):
        alone = inf.influence(train, queries, method, damping=damping, factors=factors)
        assert torch.equal(matrix.layer(name), alone.layer(name))
    digests = {
        inf.influence(train, queries, method, damping=given, factors=factors).digest
        for given in (0.01, {"a": 0.01, "b": 0.5}, {"b": 0.5, "a": 0.01}, {"a": 0.5, "b": 0.01})
    }
    assert len(digests) == 3
    with pytest.raises(inf.InputError, match="damping: has none for layer 'b'"):
        inf.influence(train, queries, method, damping={"a": 0.1}, factors=factors)
    with pytest.raises(inf.InputError, match=r"damping: expected a positive share .* got -1 for layer 'b'"):
        inf.influence(train, queries, method, damping={"a": 0.1, "b": -1}, factors=factors)


def test_errors() -> None:
    train, queries = {"a": torch.randn(5, 6)}, {"a": torch.randn(2, 6)}
    with pytest.raises(inf.InputError, match="factors: ekfac needs those of layer 'a'"):
        inf.influence(train, queries, "ekfac")
    with pytest.raises(inf.InputError, match="'a' has 6 numbers per row, its factors stand for 2 x 2"):
        inf.influence(train, queries, "ekfac", factors={"a": (torch.eye(2), torch.eye(2))}).layer("a")
    with pytest.raises(inf.InputError, match="damping: expected a positive share"):
        inf.influence(train, queries, "trak", damping=0.0)
    train["a"][3, 0] = float("nan")
    with pytest.raises(inf.InputError, match="train: layer 'a' has NaN or infinity in row 3"):
        inf.influence(train, queries, "trak").layer("a")
