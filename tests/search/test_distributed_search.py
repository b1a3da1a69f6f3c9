"""A search over several processes gives the answer of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from definitions import draw
from ranks import run_ranks
from stores import write_store

import influence_fast as inf
from influence_fast.search.distributed import add_curvature_all, search_all

native = pytest.importorskip("influence_fast_cpu")

DIMS = {"a": 10, "b": 20}
PARTS = (range(57), range(57, 90))
FOUR = (range(20), range(20, 21), range(21, 70), range(70, 90))


def build(folder: Path, data: dict[str, torch.Tensor], parts: tuple[range, ...]) -> inf.InfluenceIndex:
    """An index of each part in a folder of its own; the index of all rows."""
    store = write_store(folder / "s", data, shard_rows=20)
    write_store(folder / "queries", {name: (4 * values).round() for name, values in draw(5, DIMS, 1).items()})
    for rank, rows in enumerate(parts):
        inf.InfluenceIndex.build(store, rows=rows, path=folder / f"part-{rank}")
    return inf.InfluenceIndex.build(store)


def search(folder: Path, asked: list[dict[str, Any]]) -> None:
    dist.init_process_group("gloo")
    index = inf.InfluenceIndex.load(folder / f"part-{dist.get_rank()}")
    queries = inf.GradientStore.open(folder / "queries")
    found = [search_all(index, queries, **options) for options in asked]
    if dist.get_rank() == 1:
        (folder / "found.json").write_text(json.dumps([[scores.tolist(), ids.tolist()] for scores, ids in found]))
    dist.destroy_process_group()


def test_two_processes_give_the_answer_of_one(tmp_path: Path) -> None:
    data = draw(90, DIMS, 0)
    for name in DIMS:
        data[name][20:60] = data[name][3]  # ties over both
    index = build(tmp_path, data, PARTS)
    queries = inf.GradientStore.open(tmp_path / "queries")
    log, asked = tmp_path / "log", [{"k": 40, "harmful": harmful} for harmful in (False, True)]
    assert run_ranks(search, tmp_path, asked, log=log) == 0, log.read_text()
    for options, (values, ids) in zip(asked, json.loads((tmp_path / "found.json").read_text()), strict=True):
        expected = index.search(queries, **options)
        assert ids == expected[1].tolist()
        assert np.array_equal(np.array(values, np.float32), expected[0].numpy())


def test_four_processes_precondition_by_the_rows_of_all(tmp_path: Path) -> None:
    """Whole numbers, whose sums are exact: the curvature has the bits that one process finds."""
    index = build(tmp_path, {name: (4 * values).round() for name, values in draw(90, DIMS, 0).items()}, FOUR)
    queries = inf.GradientStore.open(tmp_path / "queries")
    asked: list[dict[str, Any]] = [{"k": 40, "method": method} for method in ("trak", "trackstar", "datainf", "cosine")]
    asked += [{"k": 7, "method": "trackstar", "harmful": True, "layers": {"b": 2.0}}]
    log = tmp_path / "log"
    assert run_ranks(search, tmp_path, asked, log=log, ranks=4) == 0, log.read_text()
    for options, (values, ids) in zip(asked, json.loads((tmp_path / "found.json").read_text()), strict=True):
        expected = index.search(queries, **options)
        assert ids == expected[1].tolist(), options
        if options["method"] == "datainf":  # weights of rows, which are rounded
            np.testing.assert_allclose(np.array(values), expected[0].numpy(), rtol=1e-6)
        else:
            assert np.array_equal(np.array(values, np.float32), expected[0].numpy()), options


def curve(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    index = inf.InfluenceIndex.load(folder / f"part-{rank}")
    queries, factors = inf.GradientStore.open(folder / "queries"), torch.load(folder / "factors.pt")
    for method, options in (("ekfac", {"factors": factors, "damping": 0.3}), ("datainf", {"rank": 6})):
        add_curvature_all(index, method, **options)
        scores, ids = search_all(index, queries, 90, method=method)
        if rank == 0:
            (folder / f"{method}.json").write_text(json.dumps([scores.tolist(), ids.tolist()]))
    # Its own curvature is of its own rows still.
    assert index.curvature == {}
    with pytest.raises(inf.InputError, match="ekfac needs those of layer"):
        add_curvature_all(index, "ekfac")
    with pytest.raises(inf.InputError, match="damping: expected a positive share"):
        add_curvature_all(index, "trak", damping=-1.0)
    with pytest.raises(inf.InputError, match="method: expected one of"):
        search_all(index, queries, 1, method="another")
    dist.destroy_process_group()


def test_curvature_of_all_ranks_with_options(tmp_path: Path) -> None:
    index = build(tmp_path, draw(90, DIMS, 0), PARTS)
    sides = {"a": (2, 5), "b": (4, 5)}
    shapes = {name: index._rows.stores[0][0].shapes[name] for name in DIMS}
    factors = {}
    for number, (name, (out, in_)) in enumerate(shapes.items()):
        assert out * in_ == sides[name][0] * sides[name][1] == DIMS[name]
        left, right = (torch.randn(size, 40, generator=torch.Generator().manual_seed(number)) for size in (in_, out))
        factors[name] = (left @ left.T / 40, right @ right.T / 40)
    torch.save(factors, tmp_path / "factors.pt")
    queries, log = inf.GradientStore.open(tmp_path / "queries"), tmp_path / "log"
    assert run_ranks(curve, tmp_path, log=log) == 0, log.read_text()
    for method, options in (("ekfac", {"factors": factors, "damping": 0.3}), ("datainf", {"rank": 6})):
        index.add_curvature(method, **options)
        scores, ids = json.loads((tmp_path / f"{method}.json").read_text())
        expected = index.search(queries, 90, method=method)
        assert ids == expected[1].tolist()
        np.testing.assert_allclose(np.array(scores), expected[0].numpy(), rtol=1e-5, atol=1e-6)


def spoilt(folder: Path) -> None:
    dist.init_process_group("gloo")
    index = inf.InfluenceIndex.load(folder / f"part-{dist.get_rank()}")
    if dist.get_rank() == 1:
        read = index._rows.read
        index._rows.read = lambda *given: read(*given) / 0  # type: ignore[method-assign]
    kind, text = [(inf.InfluenceError, "curvature: failed on rank 1"), (inf.InputError, "has NaN or infinity")][
        dist.get_rank()
    ]
    with pytest.raises(kind, match=text):
        search_all(index, inf.GradientStore.open(folder / "queries"), 1, method="trak")
    dist.destroy_process_group()


def test_a_rank_that_fails_leaves_no_other_waiting(tmp_path: Path) -> None:
    build(tmp_path, draw(90, DIMS, 0), PARTS)
    log = tmp_path / "log"
    assert run_ranks(spoilt, tmp_path, log=log, seconds=60) == 0, log.read_text()
