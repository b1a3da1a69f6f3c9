"""Several processes, one store: two ranks on this machine, one that is killed, a model that is sharded over both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import integers
import models
import pytest
import torch
from click.testing import CliRunner
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard

import influence_fast as inf
from influence_fast import _distributed as processes
from influence_fast.cli import main
from influence_fast.gradients.model_state import fingerprint
from influence_fast.gradients.store_writer import StoreWriter


def build(path: Path, kind: str) -> None:
    """A store by every rank that runs this."""
    model, rows, layers, loss = integers.IntegerModel(), integers.integer_rows(23), "all", integers.integer_loss
    if kind == "sharded":
        model, rows, layers, loss = (
            models.make("llama", "causal"),
            models.rows("causal", count=23),
            "attention[1:],head",
            "auto",
        )
    elif kind == "bad":
        model, rows, layers, loss = models.make("bert"), models.rows(count=23), "head", "auto"
        rows[4]["labels"] = 7
    with processes.joined():
        rank, ranks = processes.here()
        if kind == "killed" and rank == 1:
            _die_at_write(2)
        if kind == "sharded" and ranks > 1:
            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model)
            assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        store = inf.build_store(
            path, model, rows, layers, "rademacher:4x4", loss, batch_tokens=24, shard_rows=3, progress=False
        )
        store.verify()


def of_a_causal_model(path: Path, kind: str) -> None:
    """A store that keeps factors, or Adam's updates, by every rank that runs this."""
    model, layers = models.make("llama", "causal"), "attention[1:]"
    options: dict[str, Any] = {"factors": 2}
    if kind == "adam":
        draw, options = torch.Generator().manual_seed(0), {"adam": {}}
        for name, layer in ((name, model.get_submodule(name)) for name in inf.select_layers(model, layers)):
            m = 0.1 * torch.randn(layer.weight.shape, generator=draw)
            options["adam"][name] = inf.ops.AdamState(m, m.square() + 0.01, (0.9, 0.99), 1e-6)
    with processes.joined():
        inf.build_store(
            path,
            model,
            models.rows("causal", count=23),
            layers,
            "rademacher:8x8",
            batch_tokens=64,
            shard_rows=3,
            progress=False,
            **options,
        ).verify()


def _die_at_write(number: int) -> None:
    write, left = StoreWriter.write, [number]

    def dying(*args: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)

    StoreWriter.write = dying


def files(path: Path) -> dict[str, bytes]:
    """What a store is made of; lock files stay behind and hold nothing."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if not p.name.endswith(".lock")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of integers that one process writes."""
    path = tmp_path_factory.mktemp("alone") / "store"
    log = path.with_name("log")
    assert run_ranks(build, path, "plain", log=log, ranks=1) == 0, log.read_text()
    return files(path)


def test_two_ranks_write_the_bytes_of_one(tmp_path: Path, alone: dict[str, bytes]) -> None:
    log = tmp_path / "log"
    assert run_ranks(build, tmp_path / "store", "plain", log=log) == 0, log.read_text()
    assert files(tmp_path / "store") == alone


def test_a_lost_rank_is_made_up_for(tmp_path: Path, alone: dict[str, bytes]) -> None:
    path, log = tmp_path / "store", tmp_path / "log"
    assert run_ranks(build, path, "killed", log=log) == -signal.SIGKILL, log.read_text()
    with pytest.raises(inf.StoreError, match="unfinished"):
        inf.GradientStore.open(path)
    before = {name: (path / name).stat().st_mtime_ns for name in files(path) if name in alone and "shard" in name}
    assert before
    assert run_ranks(build, path, "plain", log=log) == 0, log.read_text()
    assert files(path) == alone
    named = [name for name in before if (path / name).stat().st_mtime_ns == before[name]]
    assert named, "shards that were whole must not be computed again"


@pytest.mark.parametrize("kind", ["factors", "adam"])
def test_four_ranks_write_factors_and_updates_of_adam_as_one(tmp_path: Path, kind: str) -> None:
    log = tmp_path / "log"
    for ranks in (1, 4):
        assert run_ranks(of_a_causal_model, tmp_path / str(ranks), kind, log=log, ranks=ranks) == 0, log.read_text()
    assert files(tmp_path / "4") == files(tmp_path / "1")
    store = inf.GradientStore.open(tmp_path / "4")
    assert len(store.meta["shards"]) == 8
    assert kind in json.dumps(store.meta)


def test_every_rank_says_what_is_wrong(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_ranks(build, tmp_path / "store", "bad", log=log) != 0
    assert "row 4 has label 7" in log.read_text()
    assert not (tmp_path / "store").exists()


def fail() -> None:
    raise inf.StoreError("no such store")


def agree() -> None:
    with processes.joined():
        rank = processes.here()[0]
        assert processes.agree(lambda: [rank, "a", None]) == [0, "a", None]
        with pytest.raises(inf.StoreError, match=r"^no such store$"):
            processes.agree(fail)


def test_what_rank_0_makes_or_raises_is_everyones(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_ranks(agree, log=log) == 0, log.read_text()


def test_a_model_sharded_over_two_ranks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_ranks(build, tmp_path / "store", "sharded", log=log) == 0, log.read_text()
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
