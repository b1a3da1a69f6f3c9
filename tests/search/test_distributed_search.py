"""A search over several processes gives the answer of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import write_store
from torch import Tensor

import influence_fast as inf

native = pytest.importorskip("influence_fast_cpu")


def draw(rows: int, dims: dict[str, int], seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, dim, generator=random) for name, dim in dims.items()}


def scores(train: dict[str, Tensor], queries: dict[str, Tensor], weights: dict[str, float], cosine: bool) -> Tensor:
    """The definition. Every product is summed alike, so that equal rows score alike."""
    total, g2, v2 = 0, 0, 0
    for name, weight in weights.items():
        g, v = train[name].double(), queries[name].double()
        total = total + weight * (v[:, None] * g[None]).sum(2)
        g2, v2 = g2 + weight * g.square().sum(1), v2 + weight * v.square().sum(1)
    if not cosine:
        return total
    return torch.where((g2 * v2[:, None]) > 0, total / (g2 * v2[:, None]).sqrt(), 0)


def check(
    store: inf.GradientStore,
    index: inf.InfluenceIndex,
    queries: dict[str, Tensor],
    k: int,
    harmful: bool = False,
    layers: dict[str, float] | None = None,
    only: Tensor | None = None,
) -> None:
    train = {name: store.read(name) for name in store.layers}
    expected = scores(train, queries, layers or dict.fromkeys(store.layers, 1.0), index.metric == "cosine")
    if only is not None:
        expected[:, ~only] = float("inf") if harmful else -float("inf")
    got, ids = index.search(queries, k, harmful, layers=layers, only=only)
    order = expected.argsort(dim=1, descending=not harmful, stable=True)[:, :k]
    torch.testing.assert_close(got, expected.gather(1, order).float(), rtol=1e-6, atol=1e-12)
    # Sums in another order may turn what differs in the last bit; anything else is a wrong answer.
    close = (expected.gather(1, ids) - expected.gather(1, order)).abs() <= 1e-13 * expected.abs().amax(1, keepdim=True)
    assert torch.equal(ids, order) or close[ids != order].all()
    for row, values in zip(ids.tolist(), got.tolist(), strict=True):
        assert len(set(row)) == k
        assert all(a < b for a, b, s, t in zip(row, row[1:], values, values[1:], strict=False) if s == t == 0)


WORKER = """
import json, sys, torch, torch.distributed as dist
import influence_fast as inf
from influence_fast.search.distributed import search_all
dist.init_process_group("gloo")
folder = sys.argv[1]
index = inf.InfluenceIndex.load(f"{folder}/part-{dist.get_rank()}")
queries = inf.GradientStore.open(f"{folder}/queries")
found = [search_all(index, queries, 40, harmful) for harmful in (False, True)]
if dist.get_rank() == 1:
    print(json.dumps([[scores.tolist(), ids.tolist()] for scores, ids in found]))
dist.destroy_process_group()
"""


def test_two_processes_give_the_answer_of_one(tmp_path: Path) -> None:
    import json

    dims = {"a": 10, "b": 20}
    data = draw(90, dims, 0)
    for name in dims:
        data[name][20:60] = data[name][3]  # ties over both
    store = write_store(tmp_path / "s", data, shard_rows=20)
    queries = write_store(tmp_path / "queries", draw(5, dims, 1))
    for rank, rows in enumerate((range(57), range(57, 90))):
        inf.InfluenceIndex.build(store, rows=rows, path=tmp_path / f"part-{rank}")
    (tmp_path / "worker.py").write_text(WORKER)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    index = inf.InfluenceIndex.build(store)
    for harmful, (values, ids) in enumerate(json.loads(run.stdout.strip().splitlines()[-1])):
        expected = index.search(queries, 40, bool(harmful))
        assert ids == expected[1].tolist()
        assert np.array_equal(np.array(values, np.float32), expected[0].numpy())
