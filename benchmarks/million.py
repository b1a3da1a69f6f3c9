"""A million samples and more: exact search, scores and memory on this machine, from one command::

    python -m benchmarks.million                      # about five minutes and 6 GB of disk
    python -m benchmarks.million --rows 100000 --json
    python -m benchmarks.million --rows 10000000 --dims 256 --faiss IVF4096,SQ8   # half an hour and 17 GB of disk

It makes its own store: gradients of a small BERT on random sentences (attention layers of ``rademacher:8x16``: 128 numbers
each), resampled around those rows as clusters, perturbed along a power-law spectrum and scaled to heavy-tailed
lengths (log-normal, sigma 1), with a seed. Queries are drawn likewise with another seed. Answers are checked against float64
brute force before anything is timed. Nothing holds the rows as a whole but FAISS, which is given as many as fit.

Floors, in the document beside what was measured: one query reads the index's bytes of the rows that lengths do not rule out,
divided by what this machine reads from memory. 200 queries x 300,000 rows of 512 are 61 GFLOP, at 1.4 TOP/s of int8
44 ms; a rank is 7 ns. The load average stands beside each figure: where others compute too, times are upper bounds.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from torch import Tensor

import influence_fast as inf
from benchmarks import protocol
from benchmarks.many_rows import (
    DIM,
    SIDES,
    AnonymousPeak,
    Gradients,
    blocks,
    brute_force,
    read_bytes_per_s,
    stacked,
    status,
    workspace,
)
from influence_fast.diagnostics import kernel_bench as bench

METRICS = ("dot", "cosine")
# Rows that the comparison in memory takes, and that memory is compared at.
_IN_MEMORY, _FEW = 300_000, 100_000
_FILTERED, _SECONDS = 10, 60
# Bytes a sample that ranks take at least, with a row of influence and some more.
_RANKED = 110


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median of some runs after one."""
    call()
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begin)
    return sorted(spent)[len(spent) // 2]


def latency(
    search: Callable[[dict[str, Tensor]], Any], queries: dict[str, Tensor], most: int = 200
) -> dict[str, float]:
    """Milliseconds of searches for one query each, of at least 50 and for a minute at most.

    ``cpu_p50_ms`` are those of all processors together, which other programs change less.
    """
    spent, used, start = [], [], time.perf_counter()
    for query in range(min(most, len(next(iter(queries.values()))))):
        one = {name: tensor[query : query + 1] for name, tensor in queries.items()}
        if time.perf_counter() - start > _SECONDS and query >= 50:
            break
        before, begin = time.process_time(), time.perf_counter()
        search(one)
        spent.append(1e3 * (time.perf_counter() - begin))
        used.append(1e3 * (time.process_time() - before))
    points = torch.tensor(spent, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64))
    found = dict(zip(("p50_ms", "p95_ms", "p99_ms"), points.tolist(), strict=True))
    return {**found, "cpu_p50_ms": sorted(used)[len(used) // 2], "searches": len(used)}


def same(found: Tensor, true: Tensor) -> float:
    """Share of the true best 10 that was found."""
    return float((found[:, :, None] == true[:, None, :]).any(2).float().mean())


def in_memory(store: inf.GradientStore, queries: dict[str, Tensor], folder: Path, rows: int) -> dict[str, Any]:
    """200 queries over the first rows, beside torch and FAISS on the same vectors in memory."""
    index = inf.InfluenceIndex.build(store, "Flat", rows=range(rows), path=folder)
    flat = stacked(queries)
    vectors = torch.cat([store.read(name, slice(0, rows)) for name in store.layers], 1)
    truth = brute_force(store, flat, rows, torch.float64, METRICS)
    for metric in METRICS:
        # Lengths rule nothing out of a cosine: what the scan costs when it reads everything.
        if not torch.equal(index.search(queries, method=metric)[1], truth[metric]):
            raise SystemExit(f"wrong: the exact search by {metric} differs from float64 brute force")
    half, narrow = vectors.bfloat16(), flat.bfloat16()
    single = (flat @ vectors.T).topk(10).indices
    approximate = (narrow @ half.T).topk(10).indices
    result = {
        "rows": rows,
        "queries": len(flat),
        "ours_ms": 1e3 * seconds(lambda: index.search(queries)),
        "ours_cosine_ms": 1e3 * seconds(lambda: index.search(queries, method="cosine")),
        "torch_float32_ms": 1e3 * seconds(lambda: (flat @ vectors.T).topk(10), 3),
        "torch_bfloat16_ms": 1e3 * seconds(lambda: (narrow @ half.T).topk(10), 3),
        "same_as_float64": 1.0,
        "torch_float32_same": float((single == truth["dot"]).float().mean()),
        "torch_bfloat16_same": float((approximate == truth["dot"]).float().mean()),
    }
    try:
        import faiss
    except ImportError:
        return result
    other = faiss.IndexFlatIP(vectors.shape[1])
    other.add(vectors.numpy())
    result["faiss_flat_ms"] = 1e3 * seconds(lambda: other.search(flat.numpy(), 10), 1)
    return result


def faiss_flat(store: inf.GradientStore, queries: dict[str, Tensor], true: Tensor) -> dict[str, Any]:
    """FAISS over as many rows as fit in what memory is free, at most all: it holds them as float32."""
    import faiss

    flat, free = stacked(queries), psutil.virtual_memory().available
    # What it grows by while rows are added, and other programs, take the rest.
    rows = min(len(store), int(0.4 * free / (4 * flat.shape[1])))
    other = faiss.IndexFlatIP(flat.shape[1])
    for _, values in blocks(store, rows):
        other.add(values.numpy())
    begin = time.perf_counter()
    found = torch.from_numpy(other.search(flat.numpy(), 10)[1])
    spent = time.perf_counter() - begin
    one = latency(lambda query: other.search(stacked(query).numpy(), 10), queries, 20)
    out = {"rows": rows, "free_bytes": free, "batch_ms_per_query": 1e3 * spent / len(flat), **one}
    return {**out, "recall_at_10": same(found, true)} if rows == len(store) else out


class _Read(logging.Handler):
    """How many rows the last exact search read, of how many, as its log says."""

    rows, of = 0, 1

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and str(record.msg).startswith("read %d of %d rows"):
            self.rows, self.of = int(record.args[0]), int(record.args[1])  # type: ignore[call-overload]


@contextmanager
def rows_read() -> Iterator[_Read]:
    log, handler = logging.getLogger("influence_fast"), _Read()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield handler
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def scan(
    index: inf.InfluenceIndex, queries: dict[str, Tensor], metric: str, true: Tensor, only: Tensor | None = None
) -> dict[str, Any]:
    """Exact search over all rows of a mapped index, or over those of a mask."""
    search = lambda asked: index.search(asked, method=metric, only=only)  # noqa: E731
    found = {"recall_at_10": same(search(queries)[1], true)}
    if found["recall_at_10"] != 1:
        raise SystemExit(f"wrong: the exact search by {metric} differs from float64 brute force")
    found["batch_ms_per_query"] = 1e3 * seconds(lambda: search(queries), 3) / len(true)
    with rows_read() as read:
        shares = []
        for query in range(min(20, len(true))):
            search({name: tensor[query : query + 1] for name, tensor in queries.items()})
            shares.append(read.rows / read.of)
    found["share_read"] = sum(shares) / len(shares)
    return {**found, **latency(search, queries)}


def faiss_index(
    store: inf.GradientStore,
    queries: dict[str, Tensor],
    folder: Path,
    factory: str,
    metric: str,
    target: float,
    true: Tensor,
) -> dict[str, Any]:
    """A FAISS index in norm partitions, held-out queries apart from those that it is tuned on."""
    half = len(true) // 2
    tuning = {name: tensor[:half] for name, tensor in queries.items()}
    held_out = {name: tensor[half:] for name, tensor in queries.items()}
    begin = time.perf_counter()
    inf.InfluenceIndex.build(store, factory, metric, queries=tuning, recall=target, path=folder)
    spent = time.perf_counter() - begin
    index = inf.InfluenceIndex.load(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "factory": factory,
        "metric": metric,
        "build_s": spent,
        "bytes": size,
        "share_of_float32": size / (4 * stacked(queries).shape[1] * len(store)),
        "recall_at_10": same(index.search(held_out)[1], true[half:]),
        "batch_ms_per_query": 1e3 * seconds(lambda: index.search(held_out), 3) / half,
        **latency(index.search, held_out),
    }


def job(kind: str, path: Path, out: Path, memory: str) -> dict[str, float]:
    """One build, search or aggregation in a process of its own: seconds and peak memory."""
    store = inf.GradientStore.open(path)
    # What a process takes before it has done anything.
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = status("VmHWM")
    with AnonymousPeak() as private:
        begin = time.perf_counter()
        if kind == "build":
            inf.InfluenceIndex.build(store, "Flat", path=out)
        elif kind == "search":
            index, asked = inf.InfluenceIndex.load(out), inf.GradientStore.open(memory)
            for metric in METRICS:
                index.search(asked, method=metric)
                index.search({name: asked.read(name, slice(0, 1)) for name in asked.layers}, method=metric)
        else:
            found = inf.influence(store, inf.GradientStore.open(out), "dot", memory=memory)
            inf.aggregate_many(found, [kind] if kind == "mean" else ["rank", "vote"])
        spent = time.perf_counter() - begin
    return {
        "seconds": spent,
        "peak_bytes": status("VmHWM"),
        "before_bytes": before,
        "anonymous_peak_bytes": private.bytes,
        "anonymous_before_bytes": private.before,
    }


def in_process(kind: str, path: Path, out: Path, memory: str = "512MiB") -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.million", "--job", kind, str(path), str(out), memory]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout)


@click.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option(
    "--dims",
    type=click.IntRange(min=128),
    default=DIM,
    show_default=True,
    help="Numbers a row, a multiple of 128: as many layers.",
)
@click.option("--queries", "query_count", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Keep stores and indexes here, and use a store that was kept; removed otherwise.",
)
@click.option(
    "--faiss",
    "factories",
    multiple=True,
    help="Also a FAISS index of this factory string, such as IVF1024,SQ8; of cosines with cosine: before it.",
)
@protocol.out_option("An earlier result there is replaced.")
@protocol.json_option
@click.option("--job", "job_of", nargs=4, hidden=True)
def main(
    rows: int,
    dims: int,
    query_count: int,
    seed: int,
    folder: Path | None,
    factories: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    job_of: tuple[str, str, str, str] | None,
) -> None:
    """Measure search and scores over a million samples."""
    if job_of:
        click.echo(json.dumps(job(job_of[0], Path(job_of[1]), Path(job_of[2]), job_of[3])))
        return
    if dims % (SIDES[0] * SIDES[1]):
        raise click.BadParameter(f"expected a multiple of {SIDES[0] * SIDES[1]}, got {dims}", param_hint="--dims")
    header = {**protocol.header("million"), "ceilings": bench.ceilings(), "rows": rows, "dims": dims, "seed": seed}
    header |= {"read_bytes_per_s": read_bytes_per_s(), "load": {}, "seconds": {}, "faiss": []}
    file = protocol.result_file(out, protocol.dated_name(header, "million", f"{rows}x{dims}"))
    protocol.previous(file, "million")
    with (
        protocol.Results(file, header) as results,
        protocol.Progress(13 + len(factories)) as progress,
        workspace(folder) as place,
    ):

        @contextmanager
        def step(name: str) -> Iterator[None]:
            """A step of the work, whose time and load averages (of a minute) before and after it are kept."""
            load, begin = os.getloadavg()[0], time.perf_counter()
            with progress.step(name):
                yield
            header["seconds"][name] = time.perf_counter() - begin
            header["load"][name] = [load, os.getloadavg()[0]]

        with step("rows of a small model"):
            shutil.rmtree(place / "model", ignore_errors=True)
            source = Gradients(place / "model", seed, dims)
        with step(f"a store of {rows} rows"):
            store = written(source, place / "store", rows, 1000 + seed)
        took = json.loads((place / "store.json").read_text())
        results.add(store={**took, "bytes": sum(s["bytes"] for s in store.meta["shards"])})
        few = min(_FEW, max(1, rows // 10))
        small = written(source, place / "small", few, 1000 + seed)
        queries = source.draw(query_count, 10**6 + seed)
        # 1,000 rows of influence up to a million samples, 100 of more; and so many that a block of influence fills the
        # memory that is stated.
        layers, count = len(source.layers), 1000 if rows <= 10**6 else 100
        asked = written(source, place / "queries", count // layers, 2 * 10**6 + seed)
        many = written(source, place / "many-queries", 1000, 2 * 10**6 + seed)
        first = min(rows, _IN_MEMORY)
        with step(f"exact search over {first} rows"):
            results.add(exact=in_memory(store, queries, place / "part", first))
        with step("an exact index of all rows"):
            begin = time.perf_counter()
            inf.InfluenceIndex.build(store, "Flat", path=place / "index")
            spent = time.perf_counter() - begin
        index = inf.InfluenceIndex.load(place / "index")
        every: dict[str, Any] = {"rows": rows, "build_s": spent, "bytes": index.nbytes}
        every["share_of_float32"] = index.nbytes / (4 * dims * rows)
        chosen = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 1 / _FILTERED
        with step("float64 brute force over all rows"):
            truth = brute_force(store, stacked(queries), rows, torch.float64, METRICS, {"filtered": chosen})
        for metric in METRICS:
            for name, only in ((metric, None), (f"{metric} filtered", chosen)):
                with step(f"exact search over all rows, {name}"):
                    every[name] = scan(index, queries, metric, truth[name], only)
                least = every[name]["share_read"] * index.nbytes / header["read_bytes_per_s"]
                every[name] |= {"floor_bytes": every[name]["share_read"] * index.nbytes, "floor_ms": 1e3 * least}
                results.add(million=every)
        with step("rank and vote"):
            ranked = in_process("rank", store.path, asked.path, str(max(2 << 30, _RANKED * rows)))
        results.add(rank_vote={**ranked, "rows": layers * len(asked)})
        with step("mean"):
            results.add(mean=in_process("mean", store.path, asked.path))
        peaks: dict[str, dict[str, Any]] = {"build": {}, "search": {}, "aggregate": {}}
        questions = written(source, place / "questions", query_count, 10**6 + seed)
        for of in (small, store):
            with step(f"peak memory over {len(of)} rows"):
                peaks["build"][str(len(of))] = in_process("build", of.path, place / "peak")
                peaks["search"][str(len(of))] = in_process("search", of.path, place / "peak", str(questions.path))
                wide = many if len(of) <= 10**6 else asked
                peaks["aggregate"][str(len(of))] = in_process(
                    "rank", of.path, wide.path, str(max(384 << 20, _RANKED * len(of)))
                )
                shutil.rmtree(place / "peak", ignore_errors=True)
            results.add(peak=peaks)
        with step("FAISS Flat"):
            results.add(faiss_flat=faiss_flat(store, queries, truth["dot"]))
        for number, given in enumerate(factories):
            metric, _, factory = given.rpartition(":")
            with step(f"FAISS {given}"):
                where, metric = place / f"faiss-{number}", metric or "dot"
                found = faiss_index(store, queries, where, factory, metric, 0.95, truth[metric])
                shutil.rmtree(where)
            results.add(faiss=[*results.document["faiss"], found])
    protocol.show(results.document, as_json, lambda document: click.echo(table(document)))


def written(source: Gradients, folder: Path, rows: int, seed: int) -> inf.GradientStore:
    """A store of rows, or the one that was kept; beside it how long it took and the load average then."""
    if folder.exists():
        kept = inf.GradientStore.open(folder)
        if len(kept) == rows and kept.layers == source.layers:
            return kept
        shutil.rmtree(folder)
    load, begin = os.getloadavg()[0], time.perf_counter()
    store = source.write(folder, rows, seed)
    took = {"build_s": time.perf_counter() - begin, "load": [load, os.getloadavg()[0]]}
    folder.with_suffix(".json").write_text(json.dumps(took))
    return store


def table(document: dict[str, Any]) -> str:
    exact, all_rows, rank = document["exact"], document["million"], document["rank_vote"]
    gib, large = 2**30, document["rows"] > 10**6
    size = f"{document['rows']} x {document['dims']}"
    rivals = [f"{name} {exact[key]:.0f} ms" for name, key in RIVALS.items() if key in exact]
    alike = f"float32 {exact['torch_float32_same']:.2%}, bfloat16 {exact['torch_bfloat16_same']:.2%}"
    ours = f"{exact['ours_ms']:.0f} ms (cosine, all rows read: {exact['ours_cosine_ms']:.0f} ms), the ids of float64 brute "
    ours += f"force ({'; '.join(rivals)}; same ids: {alike})"
    cells = [(f"exact top-10, {exact['rows']} x {document['dims']}, {exact['queries']} queries", "<= 200 ms", ours)]
    goals = {"dot": "<= 15 ms", "cosine": "<= 350 ms"} if large else dict.fromkeys(METRICS, "<= 40 ms")
    for name in (metric + kind for metric in METRICS for kind in ("", " filtered")):
        found = all_rows[name]
        what = f"{name} to one row in {_FILTERED}" if name.endswith("filtered") else name
        read = f"{found['share_read']:.1%} of the rows read, floor {found['floor_ms']:.1f} ms"
        cells.append((f"one query, exact, {size}, {what}", goals.get(name, ""), f"{points(found)}; {read}"))
        reached = f"recall {found['recall_at_10']:.3f} at {found['batch_ms_per_query']:.2f} ms a query"
        cells.append((f"{what}, batches of {exact['queries']}", "", reached))
    took = f"{all_rows['share_of_float32']:.1%}, {all_rows['bytes'] / gib:.2f} GiB mapped, built in "
    cells.append(("index", "<= 30 % of float32", f"{took}{all_rows['build_s']:.1f} s"))
    flat = document["faiss_flat"]
    reached = f"{flat['batch_ms_per_query']:.1f} ms a query in batches of {exact['queries']}; one {points(flat)}"
    cells.append((f"FAISS Flat, {flat['rows']} rows in memory", "", reached))
    for found in document["faiss"]:
        reached = (
            f"recall {found['recall_at_10']:.3f}; {points(found)}; {found['batch_ms_per_query']:.2f} ms a query in "
        )
        reached += f"batches; {found['share_of_float32']:.1%} of float32, built in {found['build_s']:.0f} s"
        goal = "recall@10 >= 0.95 at <= 10 ms"
        cells.append((f"FAISS {found['factory']} in norm partitions, {found['metric']}", goal, reached))
    spent = f"{rank['seconds']:.1f} s, {rank['peak_bytes'] / 1e9:.2f} GB"
    cells.append((f"rank + vote, {document['rows']} x {rank['rows']} (layer, query) rows", "<= 30 s, <= 4 GB", spent))
    cells.append(("mean of the same", "one pass", f"{document['mean']['seconds']:.1f} s"))
    for kind, runs in document["peak"].items():
        (few, low), (many, high) = runs.items()
        sizes = " to ".join(f"{run['anonymous_peak_bytes'] / 2**20:.0f}" for run in (low, high))
        change = f"{high['anonymous_peak_bytes'] / low['anonymous_peak_bytes'] - 1:+.1%}"
        cells.append((f"peak private memory of {kind}, {few} to {many} rows", "within 10 %", f"{sizes} MiB ({change})"))
    head = f"{document['machine']['device']}, {document['machine']['threads']} threads; store {size}, "
    head += (
        f"{document['store']['bytes'] / gib:.2f} GiB, written in {document['store']['build_s']:.0f} s; load average "
    )
    averages = [value for pair in document["load"].values() for value in pair]
    head += f"{min(averages):.1f} to {max(averages):.1f}"
    rows = ["| work | goal | measured |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)]
    return "\n".join([head, "", *rows])


def points(found: dict[str, float]) -> str:
    wall = f"p50 {found['p50_ms']:.1f}, p95 {found['p95_ms']:.1f}, p99 {found['p99_ms']:.1f} ms"
    return f"{wall} ({found['cpu_p50_ms']:.1f} ms of processors)"


RIVALS = {"FAISS Flat": "faiss_flat_ms", "torch float32": "torch_float32_ms", "torch bfloat16": "torch_bfloat16_ms"}

if __name__ == "__main__":
    main()
