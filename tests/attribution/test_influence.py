"""Influence against literal float64 loops, in memory and from stores, in blocks of any size."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from stores import write_store
from torch import Tensor

import influence_fast as inf


def gradients(rows: int, seed: int, dims: dict[str, int] | None = None) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    dims = dims or {"a": 6, "b": 10}
    return {name: torch.randn(rows, dim, generator=random) for name, dim in dims.items()}


def loop(train: Tensor, queries: Tensor, method: str, weights: int) -> Tensor:
    """The definitions, one query and one sample at a time, in float64."""
    g, v = train.double(), queries.double()
    n = len(g)
    out = torch.zeros(len(v), n, dtype=torch.float64)
    lam = sum(float(row @ row) for row in g) / (10 * n * weights)
    for j in range(len(v)):
        for k in range(n):
            if method == "dot":
                out[j, k] = v[j] @ g[k]
            elif method == "cosine":
                norms = v[j].norm() * g[k].norm()
                out[j, k] = v[j] @ g[k] / norms if norms else 0
            else:
                correction = sum((v[j] @ g[i]) * (g[i] @ g[k]) / (lam + g[i] @ g[i]) for i in range(n)) / n
                out[j, k] = (v[j] @ g[k] - correction) / lam
    return out


@pytest.mark.parametrize("block_bytes", [1 << 27, 100])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("method", ["dot", "cosine", "datainf"])
def test_definitions(tmp_path: Path, monkeypatch, method: str, stored: bool, block_bytes: int) -> None:
    monkeypatch.setattr(
        importlib.import_module("influence_fast.attribution.gradient_source"), "_BLOCK_BYTES", block_bytes
    )
    train, queries = gradients(9, 0), gradients(4, 1)
    matrix = inf.influence(
        write_store(tmp_path / "t", train) if stored else train,
        write_store(tmp_path / "q", queries) if stored else queries,
        method,
    )
    assert matrix.shape == (4, 9)
    for name in ("a", "b"):
        expected = loop(train[name], queries[name], method, train[name].shape[1])
        torch.testing.assert_close(
            matrix.layer(name).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )
    rows = {name: torch.zeros(4, 9) for name in matrix.layers}
    for name, part, values in matrix:
        rows[name][part] += values
    columns = torch.zeros(2, 4, 9)
    for part, values in matrix.columns():
        columns[:, :, part] += values
    for i, name in enumerate(matrix.layers):
        torch.testing.assert_close(rows[name], matrix.layer(name))
        torch.testing.assert_close(columns[i], matrix.layer(name))


@pytest.mark.parametrize("method", ["dot", "trackstar"])
def test_sums_over_layers(method: str) -> None:
    train, queries = gradients(9, 0), gradients(4, 1)
    train["c"], queries["c"] = torch.zeros(9, 5), torch.randn(4, 5)
    matrix = inf.influence(train, queries, method)
    layers = [matrix.layer(name) for name in matrix.layers]
    torch.testing.assert_close(matrix.total(), sum(layers), rtol=1e-5, atol=1e-5)
    expected = sum(values / values.double().square().mean().sqrt() for values in layers[:2])
    torch.testing.assert_close(matrix.total(equal_layers=True).double(), expected.double(), rtol=1e-5, atol=1e-5)
    # Of one size, whatever that of the gradients.
    large = inf.influence({**train, "a": 100 * train["a"]}, queries, method).total(equal_layers=True)
    torch.testing.assert_close(large, matrix.total(equal_layers=True), rtol=1e-4, atol=1e-4)


def test_datainf_takes_the_number_of_weights_from_the_store(tmp_path: Path) -> None:
    train, queries = gradients(9, 0, {"a": 6}), gradients(3, 1, {"a": 6})
    stores = [write_store(tmp_path / n, g, shapes={"a": (20, 30)}) for n, g in (("t", train), ("q", queries))]
    expected = loop(train["a"], queries["a"], "datainf", 600)
    torch.testing.assert_close(inf.influence(*stores, "datainf").layer("a").double(), expected, rtol=1e-5, atol=1e-2)


def test_zero_gradients_are_counted() -> None:
    train, queries = gradients(5, 0), gradients(3, 1)
    train["a"][2] = queries["a"][0] = 0
    matrix = inf.influence(train, queries, "cosine")
    assert matrix.zero_norms == {"a": (1, 1), "b": (0, 0)}
    assert matrix.layer("a")[:, 2].eq(0).all()
    assert matrix.layer("a")[0].eq(0).all()
    train["b"].zero_()
    assert inf.influence(train, queries, "datainf").layer("b").eq(0).all()


@pytest.mark.parametrize("method", ["cosine", "trackstar"])
def test_gradients_that_all_but_vanish_count_as_zero(method: str) -> None:
    """As of a row that a model has learned by heart: their inverse lengths are no numbers of float32."""
    train, queries = torch.randn(6, 4), torch.randn(3, 4)
    train[2], queries[1] = 1e-43, 1e-43
    found = inf.influence({"a": train}, {"a": queries}, method)
    values = found.layer("a")
    assert values.isfinite().all()
    assert not values[:, 2].any()
    assert not values[1].any()
    assert found.between_queries("a").isfinite().all()
    assert found.weighted("a", torch.ones(1, 3)).isfinite().all()


def test_some_layers_and_correct_queries(tmp_path: Path) -> None:
    correct = torch.tensor([True, False, True])
    queries = write_store(tmp_path / "q", gradients(3, 1), columns={"correct": correct})
    matrix = inf.influence(gradients(5, 0), queries, layers=["b"])
    assert matrix.layers == ["b"]
    assert torch.equal(matrix.query_correct, correct)
    assert inf.influence(gradients(5, 0), gradients(3, 1)).query_correct is None


def test_errors_name_both_sides(tmp_path: Path) -> None:
    train, queries = gradients(5, 0), gradients(3, 1)
    with pytest.raises(inf.InputError, match=r"method: expected one of dot, cosine, datainf, trak, .*got 'nearest'"):
        inf.influence(train, queries, "nearest")
    with pytest.raises(inf.InputError, match="layers: expected some of a, b, got 'c'"):
        inf.influence(train, queries, layers=["c"])
    with pytest.raises(inf.StoreError, match="queries: lacks layer 'b'"):
        inf.influence(train, {"a": queries["a"]})
    with pytest.raises(inf.StoreError, match="'a' has 5 numbers per row, train has 6"):
        inf.influence(train, {**queries, "a": queries["a"][:, :5]})
    with pytest.raises(inf.InputError, match="expected a GradientStore"):
        inf.influence(train["a"], queries)
    stores = [
        write_store(tmp_path / "t", train),
        write_store(tmp_path / "p", queries, projection="sjlt:6"),
        write_store(tmp_path / "m", queries, model="other"),
    ]
    for other, key in ((stores[1], "projection"), (stores[2], "model")):
        with pytest.raises(inf.StoreError, match=f"another {key}"):
            inf.influence(stores[0], other)
    train["b"][3, 0] = float("nan")
    with pytest.raises(inf.InputError, match="train: layer 'b' has NaN or infinity in row 3"):
        inf.influence(train, queries, "cosine").layer("b")


def test_a_frame_of_influence_has_the_names_of_both_sides(tmp_path: Path) -> None:
    train = write_store(tmp_path / "t", gradients(6, 0), ids=[f"row {i}" for i in range(6)])
    train.delete(["row 2"])
    matrix = inf.influence(train, write_store(tmp_path / "q", gradients(3, 1)))
    frame = matrix.to_pandas()
    assert frame.shape == (5, 6)
    for layer in ("a", "b"):
        assert torch.equal(torch.from_numpy(frame[layer].to_numpy()).T, matrix.layer(layer))
    assert frame.loc["row 3", ("b", 1)] == float(matrix.layer("b")[1, 2])
    assert list(matrix.to_pandas(["b"]).columns) == [("b", 0), ("b", 1), ("b", 2)]
    assert list(inf.influence(gradients(2, 0), gradients(2, 1)).to_pandas().index) == [0, 1]


def test_sums_over_queries_are_those_of_float64_whatever_part_is_copied_at_a_time() -> None:
    train, queries = {"a": torch.randn(37, 20_000)}, {"a": torch.randn(5, 20_000)}
    weights = torch.rand(2, 5, dtype=torch.float64)
    found = inf.influence(train, queries, "dot").weighted("a", weights)
    torch.testing.assert_close(found, weights @ queries["a"].double() @ train["a"].double().T, rtol=1e-12, atol=1e-9)
