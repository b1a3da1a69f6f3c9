"""Processes that are forked from one that has everything imported already: ranks as ``torchrun`` starts them, scripts.

Importing torch and transformers anew in each takes longer than what all tests do in them. ``torchrun`` itself is tested
once, on the command line.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from threading import Timer

_server = multiprocessing.get_context("forkserver")
# What commands import when they come to it is among them.
HEAVY = ["torch", "transformers", "datasets", "scipy.stats", "sklearn.linear_model", "sklearn.isotonic", "datasketch"]
HEAVY += ["matplotlib.figure", "matplotlib.backends.backend_svg"]
_server.set_forkserver_preload([*HEAVY, "influence_fast.gradients.build", "models"])


def run_ranks(
    job: Callable[..., None],
    *arguments: object,
    log: Path,
    ranks: int = 2,
    seconds: float = 120,
    kill: tuple[int, float] | None = None,
) -> int:
    """Exit code of ``job(*arguments)`` in ``ranks`` processes, 0 where all end well; their output goes to ``log``.

    As with ``torchrun``, the others are ended where one dies. ``kill``, a rank and seconds, ends that one after so long.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [_server.Process(target=_rank, args=(job, arguments, rank, ranks, port, log)) for rank in range(ranks)]
    for process in processes:
        process.start()
    if kill is not None:
        killer = Timer(kill[1], processes[kill[0]].kill)
        killer.start()
    running = list(processes)
    while running:
        ended = wait([process.sentinel for process in running], seconds)
        running = [process for process in running if process.sentinel not in ended]
        if not ended or any(process.exitcode for process in processes if process not in running):
            for process in running:
                process.kill()
                process.join()
            break
    for process in processes:
        process.join()
    if kill is not None:
        killer.cancel()
        killer.join()
    return next((code for process in processes if (code := process.exitcode)), 0) or 0


def run_script(path: Path, folder: Path) -> str:
    """What a Python file prints that runs as ``python FILE`` in ``folder`` and ends well."""
    log = folder / "log"
    code = run_ranks(_script, path, folder, log=log, ranks=1)
    assert code == 0, log.read_text()
    return log.read_text()


def _script(path: Path, folder: Path) -> None:
    os.chdir(folder)
    runpy.run_path(str(path), run_name="__main__")


def _rank(job: Callable[..., None], arguments: tuple[object, ...], rank: int, ranks: int, port: int, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    torch.set_num_threads(1)
    job(*arguments)
