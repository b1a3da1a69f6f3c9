"""The job of a cluster's nodes: its scripts parse, and what a node runs works on one machine with two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
from audits import sentences, tokenizer, write_rows

import influence_fast as inf

FOLDER = Path(__file__).parents[2] / "examples" / "slurm"


@pytest.mark.parametrize("name", ["influence.sbatch", "steps.sh"])
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


def test_a_node_is_told_what_it_needs(tmp_path: Path) -> None:
    """influence.sbatch under a Slurm of two nodes that is played by scripts: what steps.sh would see on each."""
    tools = {"scontrol": "echo first; echo second", "srun": 'shift; for n in 0 1; do SLURM_NODEID=$n "$@"; done'}
    for name, script in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "steps.sh").write_text('echo "$NODE of $NODES at $HEAD:$PORT $MODEL $OUT"\n')
    given = {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    given |= {"MODEL": "m", "DATA": "d", "QUERIES": "q", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = ["bash", str(FOLDER / "influence.sbatch")]
    done = subprocess.run(job, env={**given, "OUT": "o"}, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [f"{node} of 2 at first:20007 m o" for node in range(2)]
    lacking = subprocess.run(job, env=given, capture_output=True, text=True, check=False)
    assert lacking.returncode != 0
    assert "OUT: a folder for results" in lacking.stderr


@pytest.mark.slow
def test_two_processes_build_score_and_search(tmp_path: Path) -> None:
    model = models.make("bert")
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for name, count, seed in (("train", 11, 0), ("queries", 3, 1)):
        write_rows(tmp_path / f"{name}.jsonl", sentences(count, seed))
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, module in (("torchrun", "torch.distributed.run"), ("influence-fast", "influence_fast"), ("python", "")):
        run = f'exec "{sys.executable}" {f"-m {module}" if module else ""} "$@"'
        (commands / name).write_text(f"#!/bin/bash\n{run}\n")
        (commands / name).chmod(0o755)
    given = {"MODEL": tmp_path / "model", "DATA": tmp_path / "train.jsonl", "QUERIES": tmp_path / "queries.jsonl"}
    given |= {"OUT": tmp_path / "out", "LAYERS": "attention", "PROJECTION": "rademacher:4x4", "K": 5, "METHOD": "trak"}
    given |= {"PROCESSES": 2, "PORT": 29650, "PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": 1}
    environment = {**os.environ, **{name: str(value) for name, value in given.items()}}
    done = subprocess.run(
        ["bash", str(FOLDER / "steps.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    train, queries = (inf.GradientStore.open(tmp_path / "out" / name) for name in ("train", "queries"))
    assert (len(train), len(queries)) == (11, 3)
    found = json.loads((tmp_path / "out" / "nearest.json").read_text())
    _, ids = inf.InfluenceIndex.build(train, "Flat").search(queries, 5, method="trak")
    assert [entry["ids"] for entry in found] == ids.tolist()
    written = inf.read_scores(tmp_path / "out" / "scores.csv")
    expected = inf.aggregate(inf.influence(train, queries, "cosine"), "rank")
    assert written["score"].tolist() == pytest.approx(expected.tolist())
