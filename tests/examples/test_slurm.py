"""The job of a cluster's nodes: its scripts parse, and what a node runs works on one machine with two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from threading import Thread

import models
import pytest
from audits import sentences, tokenizer, write_rows
from ranks import run_ranks

import influence_fast as inf

FOLDER = Path(__file__).parents[2] / "examples" / "slurm"


@pytest.mark.parametrize("name", ["influence.sbatch", "steps.sh"])
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


def test_a_node_is_told_what_it_needs(tmp_path: Path) -> None:
    """influence.sbatch under a Slurm of two nodes that is played by scripts: what steps.sh would see on each."""
    # More names than a pipe holds: whoever reads the first alone must not end the job.
    tools = {"scontrol": "echo first; seq 100000", "srun": 'shift; for n in 0 1; do SLURM_NODEID=$n "$@"; done'}
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


def run_cli(arguments: list[str], environment: dict[str, str], ranks: int, out: Path) -> None:
    """The command line in a process that was forked: as a rank that torchrun started, or with what its own shell had."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= environment | ({name: os.environ[name] for name in ours} if ranks else {})
    os.dup2(os.open(out / os.environ["RANK"], os.O_WRONLY | os.O_CREAT), 1)
    from influence_fast.cli import main

    main(arguments)


# Both commands, played: they ask the test's own process, which forks one that has everything imported already.
PLAYED = """#!{python} -IS
import os, subprocess, sys
from multiprocessing.connection import Client

arguments, ranks = sys.argv[1:], 0
if os.path.basename(sys.argv[0]) == "torchrun":
    options = dict(zip(arguments[0:10:2], arguments[1:10:2]))
    assert options["--nnodes"] == "1" and options["--master-port"] == "29650", options
    ranks, (kind, *arguments) = int(options["--nproc-per-node"]), arguments[10:]
    if kind == "--no-python":
        place = dict(os.environ, WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="29650")
        each = [subprocess.Popen(arguments, env=dict(place, RANK=str(rank))) for rank in range(ranks)]
        sys.exit(max(one.wait() for one in each))
    assert [kind, arguments.pop(0)] == ["-m", "influence_fast"]
with Client({address!r}) as asked:
    asked.send((arguments, dict(os.environ), ranks))
    code, printed = asked.recv()
print(printed, end="")
sys.exit(code)
"""


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Path]:
    """A folder with torchrun and influence-fast."""
    commands = tmp_path / "bin"
    commands.mkdir()
    address = str(tmp_path / "asked")
    for name in ("torchrun", "influence-fast"):
        (commands / name).write_text(PLAYED.format(python=sys.executable, address=address))
        (commands / name).chmod(0o755)
    (commands / "python").write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    (commands / "python").chmod(0o755)
    numbers = count()

    def answer(connection: Connection) -> None:
        arguments, environment, ranks = connection.recv()
        out = tmp_path / f"printed {next(numbers)}"
        out.mkdir()
        code = run_ranks(run_cli, arguments, environment, ranks, out, log=out / "log", ranks=ranks or 1)
        printed = [path.read_text() for path in sorted(out.iterdir()) if path.name != "log" or code]
        connection.send((code, "".join(printed)))

    with Listener(address) as listener, ThreadPoolExecutor(4) as pool:

        def listen() -> None:
            with suppress(OSError):
                while True:
                    pool.submit(answer, listener.accept())

        Thread(target=listen, daemon=True).start()
        yield commands


def test_two_processes_build_score_and_search(tmp_path: Path, played: Path) -> None:
    model = models.make("bert")
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for name, rows, seed in (("train", 11, 0), ("queries", 3, 1)):
        write_rows(tmp_path / f"{name}.jsonl", sentences(rows, seed))
    given = {"MODEL": tmp_path / "model", "DATA": tmp_path / "train.jsonl", "QUERIES": tmp_path / "queries.jsonl"}
    given |= {"OUT": tmp_path / "out", "LAYERS": "attention", "PROJECTION": "rademacher:4x4", "K": 5, "METHOD": "trak"}
    given |= {"PROCESSES": 2, "PORT": 29650, "PATH": f"{played}:{os.environ['PATH']}", "OMP_NUM_THREADS": 1}
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
