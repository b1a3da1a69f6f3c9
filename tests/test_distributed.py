"""Several processes, one store: two ranks on this machine, one that is killed, a model that is sharded over both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import models
import pytest
import torch
from click.testing import CliRunner

import influence_fast as inf
from influence_fast.cli import main
from influence_fast.gradients.model_state import fingerprint

_BUILD = """
import os, signal, sys
import torch
import integers
import influence_fast as inf
from influence_fast import _distributed as processes
from influence_fast.gradients.store_writer import StoreWriter

torch.set_num_threads(1)
path, kind = sys.argv[1:3]
if kind == "sharded":
    import models
    model, rows, layers = models.make("llama", "causal"), models.rows("causal", count=23), "attention[1:],head"
    loss = "auto"
elif kind == "bad":
    import models
    model, rows, layers, loss = models.make("bert"), models.rows(count=23), "head", "auto"
    rows[4]["labels"] = 7
else:
    model, rows, layers, loss = integers.IntegerModel(), integers.integer_rows(23), "all", integers.integer_loss
with processes.joined():
    if kind == "killed" and processes.here()[0] == 1:
        write, left = StoreWriter.write, [2]
        def dying(*args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*args)
        StoreWriter.write = dying
    if kind == "sharded" and processes.here()[1] > 1:
        from torch.distributed.fsdp import fully_shard
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    store = inf.build_store(
        path, model, rows, layers, "rademacher:4x4", loss, batch_tokens=24, shard_rows=3, progress=False
    )
    store.verify()
"""


def build(path: Path, kind: str, processes: int) -> subprocess.CompletedProcess:
    script = path.parent / "job.py"
    script.write_text(_BUILD)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launch, str(script), str(path), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def files(path: Path) -> dict[str, bytes]:
    """What a store is made of; lock files stay behind and hold nothing."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if not p.name.endswith(".lock")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of integers that one process writes."""
    path = tmp_path_factory.mktemp("alone") / "store"
    done = build(path, "plain", 1)
    assert done.returncode == 0, done.stderr
    return files(path)


def test_two_ranks_write_the_bytes_of_one(tmp_path: Path, alone: dict[str, bytes]) -> None:
    done = build(tmp_path / "store", "plain", 2)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "store") == alone


def test_a_lost_rank_is_made_up_for(tmp_path: Path, alone: dict[str, bytes]) -> None:
    path = tmp_path / "store"
    assert build(path, "killed", 2).returncode != 0
    with pytest.raises(inf.StoreError, match="unfinished"):
        inf.GradientStore.open(path)
    before = {name: (path / name).stat().st_mtime_ns for name in files(path) if name in alone and "shard" in name}
    assert before
    assert build(path, "plain", 2).returncode == 0
    assert files(path) == alone
    named = [name for name in before if (path / name).stat().st_mtime_ns == before[name]]
    assert named, "shards that were whole must not be computed again"


def test_every_rank_says_what_is_wrong(tmp_path: Path) -> None:
    done = build(tmp_path / "store", "bad", 2)
    assert done.returncode != 0
    assert "row 4 has label 7" in done.stderr
    assert not (tmp_path / "store").exists()


_AGREE = """
from influence_fast import _distributed as processes
from influence_fast.errors import StoreError

def fail():
    raise StoreError("no such store")

with processes.joined():
    rank = processes.here()[0]
    assert processes.agree(lambda: [rank, "a", None]) == [0, "a", None]
    try:
        processes.agree(fail)
    except StoreError as error:
        assert str(error) == "no such store"
    else:
        raise SystemExit(f"rank {rank} heard of no error")
"""


def test_what_rank_0_makes_or_raises_is_everyones(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(_AGREE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(tmp_path / "job.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_model_sharded_over_two_ranks(tmp_path: Path) -> None:
    done = build(tmp_path / "store", "sharded", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    store = inf.GradientStore.open(tmp_path / "store")
    model, rows = models.make("llama", "causal"), models.rows("causal", count=23)
    assert store.meta["model"] == fingerprint(model)
    for layer, expected in models.oracle(model, rows, store.layers).items():
        o, i = expected.shape[1:]
        projection = inf.Projection.parse("rademacher:4x4")
        left = projection.side(layer, "left", o).matrix(torch.float64)
        right = projection.side(layer, "right", i).matrix(torch.float64)
        wanted = (left @ expected @ right.T).flatten(1)
        assert (store.read(layer).double() - wanted).norm() <= 1e-5 * wanted.norm(), layer


def test_torchrun_on_the_command_line(tmp_path: Path) -> None:
    model = models.make("bert")
    model.save_pretrained(tmp_path / "model")
    datasets.Dataset.from_list(models.rows(count=9)).save_to_disk(tmp_path / "rows")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "influence_fast", "build"]
    options = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows"), "--out", str(tmp_path / "store")]
    tried = CliRunner().invoke(main, ["build", *options, "--dry-run", "--json"])
    assert tried.exit_code == 0, tried.output
    assert json.loads(tried.stdout)["rows"] == 9
    assert not (tmp_path / "store").exists()
    done = subprocess.run([sys.executable, *command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9 rows") == 1
    inf.GradientStore.open(tmp_path / "store").verify()
