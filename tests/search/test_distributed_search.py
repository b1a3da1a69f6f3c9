"""A search over several processes gives the answer of one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from definitions import draw
from ranks import run_ranks
from stores import write_store

import influence_fast as inf
from influence_fast.search.distributed import search_all

native = pytest.importorskip("influence_fast_cpu")


def search(folder: Path) -> None:
    dist.init_process_group("gloo")
    index = inf.InfluenceIndex.load(folder / f"part-{dist.get_rank()}")
    queries = inf.GradientStore.open(folder / "queries")
    found = [search_all(index, queries, 40, harmful) for harmful in (False, True)]
    with pytest.raises(inf.InputError, match="method: trak needs the curvature of all ranks' rows"):
        search_all(index, queries, 1, method="trak")
    if dist.get_rank() == 1:
        (folder / "found.json").write_text(json.dumps([[scores.tolist(), ids.tolist()] for scores, ids in found]))
    dist.destroy_process_group()


def test_two_processes_give_the_answer_of_one(tmp_path: Path) -> None:
    dims = {"a": 10, "b": 20}
    data = draw(90, dims, 0)
    for name in dims:
        data[name][20:60] = data[name][3]  # ties over both
    store = write_store(tmp_path / "s", data, shard_rows=20)
    queries = write_store(tmp_path / "queries", draw(5, dims, 1))
    for rank, rows in enumerate((range(57), range(57, 90))):
        inf.InfluenceIndex.build(store, rows=rows, path=tmp_path / f"part-{rank}")
    log = tmp_path / "log"
    assert run_ranks(search, tmp_path, log=log) == 0, log.read_text()
    index = inf.InfluenceIndex.build(store)
    for harmful, (values, ids) in enumerate(json.loads((tmp_path / "found.json").read_text())):
        expected = index.search(queries, 40, bool(harmful))
        assert ids == expected[1].tolist()
        assert np.array_equal(np.array(values, np.float32), expected[0].numpy())
