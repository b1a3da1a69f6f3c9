"""A search over several processes gives the answer of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from definitions import draw
from stores import write_store

import influence_fast as inf

native = pytest.importorskip("influence_fast_cpu")


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
