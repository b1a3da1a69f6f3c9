"""Stores that keep rows as factors: nearest matrices of their rank, read, changed, scored and searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from stores import append, write_store
from torch import Tensor

import influence_fast as inf
from influence_fast import ops
from influence_fast.gradients.row_factors import as_factors, products, sides

SHAPES = {"a": (8, 12), "b": (10, 6), "bias": (5, 1)}


def gradients(rows: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, out * in_, generator=random) for name, (out, in_) in SHAPES.items()}


def nearest(rows: Tensor, out: int, rank: int) -> Tensor:
    """By a decomposition of each row in float64."""
    found = []
    for row in rows.double():
        u, s, v = torch.linalg.svd(row.view(out, -1), full_matrices=False)
        found.append(((u[:, :rank] * s[:rank]) @ v[:rank]).flatten())
    return torch.stack(found)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_nearest_matrix_of_a_rank(rank: int) -> None:
    rows = gradients(7, 0)["a"]
    rows[3] = 0
    stored = as_factors(rows, 8, rank)
    assert stored.shape == (7, rank * 20)
    expected = nearest(rows, 8, rank)
    torch.testing.assert_close(products(stored, 8, rank).double(), expected, rtol=1e-4, atol=1e-5)
    other = as_factors(gradients(4, 1)["a"], 8, 2)
    (left, right), (a, b) = sides(stored, 8, rank), sides(other, 8, 2)
    scores = ops.ghost_dot(right, left, b, a)
    torch.testing.assert_close(scores.double(), expected @ products(other, 8, 2).double().T, rtol=1e-4, atol=1e-4)


def test_more_factors_than_the_matrix_has(tmp_path: Path) -> None:
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(products(as_factors(rows, 2, 5), 2, 5), rows, rtol=1e-5, atol=1e-6)


def test_a_store_reads_what_its_factors_stand_for(tmp_path: Path) -> None:
    data = gradients(30, 0)
    store = write_store(tmp_path / "s", data, shapes=SHAPES, shard_rows=8, factors=2)
    assert (store.factors, store.outs) == (2, {"a": 8, "b": 10})
    assert store.dims == {"a": 96, "b": 60, "bias": 5}
    for name, out in store.outs.items():
        torch.testing.assert_close(store.read(name).double(), nearest(data[name], out, 2), rtol=1e-4, atol=1e-5)
        assert torch.equal(store.read(name, [9, 2, 29]), store.read(name)[[9, 2, 29]])
        left, right = store.read_factors(name, slice(5, 20))
        assert (left.shape, right.shape) == ((15, 2, out), (15, 2, store.dims[name] // out))
        assert torch.equal((left.mT @ right).flatten(1), store.read(name, slice(5, 20)))
        # What was there before it was rounded.
        torch.testing.assert_close(store.sqnorm(name), data[name].double().square().sum(1))
    assert torch.equal(store.read("bias"), data["bias"])  # no fewer numbers as factors
    with pytest.raises(inf.InputError, match="'bias' is kept whole"):
        store.read_factors("bias")
    whole = write_store(tmp_path / "w", data, shapes=SHAPES, shard_rows=8)
    sizes = [sum(shard["bytes"] for shard in one.meta["shards"]) for one in (store, whole)]
    assert sizes[0] < 0.6 * sizes[1]
    store.verify()


def test_it_lives(tmp_path: Path) -> None:
    data, more = gradients(30, 0), gradients(9, 1)
    settings = {"shapes": SHAPES, "shard_rows": 8, "factors": 2}
    store = write_store(tmp_path / "s", data, **settings)
    behind = write_store(tmp_path / "m", more, **settings)
    expected = {name: torch.cat([store.read(name), behind.read(name)]) for name in SHAPES}
    inf.InfluenceIndex.build(store, path=tmp_path / "i")
    store = append(tmp_path / "s", more, range(30, 39), **settings)
    store.delete([4, 33])
    kept = [row for row in range(39) if row not in (4, 33)]
    for _ in range(2):
        assert len(store) == 37
        for name in SHAPES:
            assert torch.equal(store.read(name), expected[name][kept])
        for name in store.outs:
            left, right = store.read_factors(name, slice(3, 36))
            assert torch.equal((left.mT @ right).flatten(1), expected[name][kept][3:36])
        store.compact()
    inf.merge_stores([write_store(tmp_path / str(i), more, **settings) for i in range(2)], tmp_path / "both")
    both = inf.GradientStore.open(tmp_path / "both")
    assert torch.equal(both.read("a"), expected["a"][30:].repeat(2, 1))
    again = inf.InfluenceIndex.updated(tmp_path / "i", store)
    queries = gradients(2, 5)
    total = sum(queries[name].double() @ store.read(name).double().T for name in SHAPES)
    assert again.search(queries, 3)[1].tolist() == [[list(store.ids)[i] for i in row] for row in total.topk(3).indices]


@pytest.mark.parametrize("method", ["dot", "cosine", "datainf", "trak"])
def test_influence_and_searches_are_those_of_what_is_read(tmp_path: Path, method: str) -> None:
    stores = [write_store(tmp_path / str(i), gradients(n, i), shapes=SHAPES, factors=1) for i, n in enumerate((60, 5))]
    memory = [{name: store.read(name) for name in SHAPES} for store in stores]
    found, expected = inf.influence(*stores, method), inf.influence(*memory, method)
    for name in SHAPES:
        torch.testing.assert_close(found.layer(name), expected.layer(name), rtol=1e-3, atol=1e-4)
    index = inf.InfluenceIndex.build(stores[0])
    for layers in (["a"], ["a", "bias"], None):
        total = sum(expected.layer(name) for name in layers or SHAPES)
        if method == "cosine":
            pairs = [torch.cat([side[name] for name in layers or SHAPES], 1) for side in memory]
            total = torch.nn.functional.normalize(pairs[1]) @ torch.nn.functional.normalize(pairs[0]).T
        for harmful in (False, True):
            scores, ids = index.search(stores[1], 4, harmful, layers=layers, method=method)
            best = total.topk(4, largest=not harmful)
            torch.testing.assert_close(scores, best.values, rtol=1e-3, atol=1e-4)
            assert (ids == best.indices).double().mean() > 0.9


def test_a_build(tmp_path: Path) -> None:
    model = models.make("bert")
    rows = [{"input_ids": [3 + i, 4, 5 + i], "labels": i % 3} for i in range(10)]
    given: dict[str, Any] = {"layers": "attention", "projection": "rademacher:8x8", "progress": False}
    whole = inf.build_store(tmp_path / "w", model, rows, **given)
    store = inf.build_store(tmp_path / "s", model, rows, factors=1, **given)
    name = store.layers[0]
    torch.testing.assert_close(store.read(name).double(), nearest(whole.read(name), 8, 1), rtol=1e-3, atol=1e-6)
    assert inf.build_store(tmp_path / "s", model, rows, factors=1, **given).digest == store.digest
    again = inf.append_store(tmp_path / "s", model, rows[:3], progress=False)
    # Of three rows a matrix product may round otherwise than of ten.
    same = store.read(name, slice(0, 3))
    torch.testing.assert_close(again.read(name, slice(10, 13)), same, rtol=1e-3, atol=1e-4 * float(same.abs().max()))
    with pytest.raises(inf.StoreError, match="was built with another"):
        inf.build_store(tmp_path / "w", model, rows, factors=1, **given)
    for wrong, message in [
        ({"factors": 0}, "factors: expected"),
        ({"factors": 1, "dtype": "int8"}, "factors: are kept as float32"),
    ]:
        with pytest.raises(inf.InputError, match=message):
            inf.build_store(tmp_path / "x", model, rows, **given, **wrong)
    with pytest.raises(inf.InputError, match="is no matrix; project with two sides"):
        inf.build_store(
            tmp_path / "x", model, rows, factors=1, layers="attention", projection="sjlt:64", progress=False
        )


def test_damage_is_named(tmp_path: Path) -> None:
    import json

    from influence_fast._records import seal

    write_store(tmp_path / "s", gradients(9, 0), shapes=SHAPES, factors=1)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    del manifest["seal"]
    for change in (
        lambda m: m.update(factors=2),
        lambda m: m["layers"]["a"].update(out=7),
        lambda m: m["layers"]["a"].update(out=4),
        lambda m: m["layers"]["a"].pop("out"),
        lambda m: m.pop("factors"),
        lambda m: m.update(requires=[]),
        lambda m: m.update(dtype="int8"),
    ):
        broken = json.loads(json.dumps(manifest))
        change(broken)
        (tmp_path / "s" / "manifest.json").write_bytes(seal(broken))
        with pytest.raises(inf.StoreError):
            inf.GradientStore.open(tmp_path / "s").read("a")


def test_the_documented_reader_reads_it(tmp_path: Path) -> None:
    import re
    import textwrap

    from influence_fast.gradients import store_format

    store = write_store(tmp_path / "s", gradients(9, 0), shapes=SHAPES, factors=2)
    code = re.search(r"plain NumPy::\n\n(.*)\Z", store_format.__doc__ or "", re.S)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(code[1]), names)  # type: ignore[index]
    for name in SHAPES:
        torch.testing.assert_close(torch.from_numpy(names["read_store"](tmp_path / "s", name).copy()), store.read(name))
