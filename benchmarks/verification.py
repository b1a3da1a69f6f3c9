"""What checking costs: ``score`` and exact search over a million rows, checked and with ``--no-verify``, from one command::

    python -m benchmarks.verification                 # about ten minutes and 3 GB of disk
    python -m benchmarks.verification --rows 100000

Whole commands, each in a process of its own, in turns, so that what else the machine does falls on both alike; and the parts
within a process: the first search after an index is loaded, which reads and checks, and those after it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

import influence_fast as inf
from benchmarks import protocol
from benchmarks.many_rows import DIM, Gradients, workspace


def command(*arguments: object) -> tuple[float, float]:
    """Seconds of one run of the command line, and of its processors, which other processes disturb less."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-m", "influence_fast", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, used


def in_turns(repeats: int, *arguments: object) -> dict[str, Any]:
    """Seconds of a command with and without checks, and what checks add to it."""
    spent: dict[str, list[tuple[float, float]]] = {"checked": [], "unchecked": []}
    for number in range(repeats + 1):
        for name in ("checked", "unchecked") if number % 2 else ("unchecked", "checked"):
            found = command(*arguments, *(["--no-verify"] if name == "unchecked" else []))
            # The first of each finds the page cache as it is.
            if number:
                spent[name].append(found)
    out: dict[str, Any] = {}
    for place, clock in enumerate(("wall", "cpu")):
        times = {name: [run[place] for run in runs] for name, runs in spent.items()}
        shares = [checked / unchecked - 1 for checked, unchecked in zip(*times.values(), strict=True)]
        out[clock] = {f"{name}_s": round(median(found), 2) for name, found in times.items()}
        out[clock]["share"] = round(median(shares), 4)
    return out


def searches(index: Path, queries: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    """Milliseconds of loading an index, of its first search and of later ones, within one process."""
    out: dict[str, Any] = {}
    for verify in (False, True, False, True, False, True)[: 2 * min(repeats, 3)]:
        begin = time.perf_counter()
        loaded = inf.InfluenceIndex.load(index, verify=verify)
        moments = [time.perf_counter()]
        for _ in range(4):
            loaded.search(queries)
            moments.append(time.perf_counter())
        spent = [1e3 * (b - a) for a, b in zip([begin, *moments], moments, strict=False)]
        found = out.setdefault("checked" if verify else "unchecked", {"load_ms": [], "first_ms": [], "later_ms": []})
        for key, value in zip(found, (spent[0], spent[1], median(spent[2:])), strict=True):
            found[key].append(value)
    return {name: {key: round(min(values), 1) for key, values in found.items()} for name, found in out.items()}


@click.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--queries", "query_count", default=200, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep stores and indexes here; removed otherwise.")
@protocol.out_option("An earlier result there is replaced.")
@protocol.json_option
def main(
    rows: int, query_count: int, repeats: int, seed: int, folder: Path | None, out: Path | None, as_json: bool
) -> None:
    """Measure what checking costs."""
    header = {**protocol.header("verification"), "rows": rows, "queries": query_count, "dim": DIM, "seed": seed}
    file = protocol.result_file(out, protocol.dated_name(header, "verification"))
    protocol.previous(file, "verification")
    with (
        protocol.Results(file, header) as results,
        protocol.Progress(6) as progress,
        workspace(folder) as place,
    ):
        with progress.step(f"a store of {rows} rows"):
            source = Gradients(place / "model", seed)
            store = source.write(place / "store", rows, 1000 + seed)
            asked = source.write(place / "queries", query_count, 2 * 10**6 + seed)
        with progress.step("an exact index"):
            inf.InfluenceIndex.build(store, "Flat", path=place / "index")
        queries = {name: asked.read(name) for name in asked.layers}
        stores = ["--train", store.path, "--queries", asked.path, "--out", place / "scores.csv"]
        for aggregation in ("rank", "mean"):
            with progress.step(f"score, {aggregation}"):
                found = in_turns(repeats, "score", *stores, "--aggregation", aggregation, "--memory", "2GiB")
            results.add(**{f"score_{aggregation}": found})
        with progress.step("search"):
            results.add(search=in_turns(repeats, "search", place / "index", "--queries", asked.path, "--json"))
        with progress.step("searches within a process"):
            results.add(searches=searches(place / "index", queries, repeats))
    protocol.show(results.document, as_json, lambda document: click.echo(json.dumps(document, indent=1)))


if __name__ == "__main__":
    main()
