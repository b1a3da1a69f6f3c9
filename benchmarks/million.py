"""A million samples: exact search, scores and memory on this machine, from one command::

    python -m benchmarks.million                      # about five minutes and 6 GB of disk
    python -m benchmarks.million --rows 100000 --json

It makes its own store: gradients of a small BERT on the demo's sentences (four attention layers, ``rademacher:8x16``: 512
numbers a row), resampled around those rows as clusters, perturbed along a power-law spectrum and scaled to heavy-tailed
lengths (log-normal, sigma 1), with a seed. Queries are drawn likewise with another seed. Answers are checked against float64
brute force before anything is timed.

Floors on two cores (20 GB/s read, 300 GFLOP/s float32, 1.4 TOP/s int8): the 8-bit copy of 10^6 x 512 is 0.5 GB, 26 ms to
read for one query where lengths rule nothing out; 200 queries x 300,000 rows are 61 GFLOP, 44 ms of int8 and 205 ms of
float32 products; 1,000 rows of influence over a million samples are 0.26 TFLOP (1 s) and 10^9 ranks (7 ns each, 7 s).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import influence_fast as inf
from benchmarks import protocol
from influence_fast.diagnostics import kernel_bench as bench
from influence_fast.gradients.store_writer import StoreWriter

LAYERS, SIDES, DIM = 4, (8, 16), 512
BASE_ROWS, CLUSTERS, SHARD = 4096, 1000, 32768


class Gradients:
    """Rows like those of a small model, any number of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
        model = BertForSequenceClassification(config)
        lengths = torch.randint(4, 24, (BASE_ROWS,)).tolist()
        rows = [{"input_ids": torch.randint(5, 500, (n,)).tolist(), "labels": i % 2} for i, n in enumerate(lengths)]
        layers = ["query", "value"]
        names = [f"bert.encoder.layer.{block}.attention.self.{name}" for block in range(2) for name in layers]
        store = inf.build_store(folder, model, rows, layers=names, projection="rademacher:8x16", progress=False)
        self.meta, self.shapes, self.layers = store.meta, store.shapes, store.layers
        real = torch.cat([store.read(name) for name in store.layers], 1)
        real /= real.norm(dim=1, keepdim=True)
        self.centres = real[torch.randperm(len(real))[:CLUSTERS]]
        # Directions of the real rows, with lengths that fall as a power of their place.
        _, _, basis = torch.linalg.svd(real - real.mean(0), full_matrices=False)
        spread = torch.arange(1, DIM + 1).float() ** -0.5
        self.noise = basis * (spread / spread.norm())[:, None]

    def draw(self, rows: int, seed: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        values = torch.randn(rows, DIM, generator=random) @ self.noise
        values = 0.7 * values + self.centres[torch.randint(CLUSTERS, (rows,), generator=random)]
        values *= (torch.randn(rows, 1, generator=random)).exp() / values.norm(dim=1, keepdim=True)
        return dict(zip(self.layers, values.split(DIM // LAYERS, 1), strict=True))

    def write(self, folder: Path, rows: int, seed: int) -> inf.GradientStore:
        writer = StoreWriter.create(
            folder,
            layers=self.shapes,
            dims=dict.fromkeys(self.layers, DIM // LAYERS),
            ids=range(rows),
            projection=self.meta["projection"],
            identifiers={name: self.meta["layers"][name]["matrices"] for name in self.layers},
            model=self.meta["model"],
            loss=self.meta["loss"],
            dtype="float32",
            shard_rows=SHARD,
            settings={"seed": seed},
        )
        with writer:
            for shard in writer.missing:
                writer.write(shard, self.draw(len(writer.span(shard)), seed + shard), {})
        return inf.GradientStore.open(folder)


def stacked(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(gradients.values()), 1)


def brute_force(
    store: inf.GradientStore, queries: Tensor, rows: int, dtype: torch.dtype, metric: str = "dot"
) -> Tensor:
    """Ids of the best 10, ties in row order: a stable sort of the best of each block."""
    best, where = torch.empty(len(queries), 0, dtype=dtype), torch.empty(len(queries), 0, dtype=torch.int64)
    for begin in range(0, rows, 20_000):
        end = min(begin + 20_000, rows)
        values = torch.cat([store.read(name, slice(begin, end)) for name in store.layers], 1).to(dtype)
        if metric == "cosine":
            values = values / values.norm(dim=1, keepdim=True)
        scores = queries.to(dtype) @ values.T
        best = torch.cat([best, scores], 1)
        where = torch.cat([where, torch.arange(begin, end).expand(len(queries), -1)], 1)
        order = best.argsort(dim=1, descending=True, stable=True)[:, :10]
        best, where = best.gather(1, order), where.gather(1, order)
    return where


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median of some runs after one."""
    call()
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begin)
    return sorted(spent)[len(spent) // 2]


def latency(index: inf.InfluenceIndex, queries: dict[str, Tensor]) -> dict[str, float]:
    """Milliseconds of searches for one query each."""
    spent = []
    for query in range(len(queries[index.layers[0]])):
        one = {name: tensor[query : query + 1] for name, tensor in queries.items()}
        begin = time.perf_counter()
        index.search(one)
        spent.append(1e3 * (time.perf_counter() - begin))
    points = torch.tensor(spent, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64))
    return dict(zip(("p50_ms", "p95_ms", "p99_ms"), points.tolist(), strict=True))


def recall(index: inf.InfluenceIndex, queries: dict[str, Tensor], true: Tensor) -> float:
    found = index.search(queries)[1]
    return float((found[:, :, None] == true[:, None, :]).any(2).float().mean())


def exact_search(store: inf.GradientStore, queries: dict[str, Tensor], folder: Path, rows: int) -> dict[str, Any]:
    """200 queries over the first rows, beside torch and FAISS on the same vectors in memory."""
    index = inf.InfluenceIndex.build(store, "Flat", rows=range(rows), path=folder)
    flat = stacked(queries)
    vectors = torch.cat([store.read(name, slice(0, rows)) for name in store.layers], 1)
    truth = brute_force(store, flat, rows, torch.float64)
    found = index.search(queries)[1]
    if not torch.equal(found, truth):
        raise SystemExit("wrong: the exact search differs from float64 brute force")
    # Lengths rule nothing out of a cosine: what the scan costs when it reads everything.
    directions = inf.InfluenceIndex.build(store, "Flat", "cosine", rows=range(rows), path=folder / "cosine")
    if not torch.equal(directions.search(queries)[1], brute_force(store, flat, rows, torch.float64, "cosine")):
        raise SystemExit("wrong: the exact search by cosine differs from float64 brute force")
    half, narrow = vectors.bfloat16(), flat.bfloat16()
    single = (flat @ vectors.T).topk(10).indices
    approximate = (narrow @ half.T).topk(10).indices
    result = {
        "rows": rows,
        "queries": len(flat),
        "ours_ms": 1e3 * seconds(lambda: index.search(queries)),
        "ours_cosine_ms": 1e3 * seconds(lambda: directions.search(queries)),
        "torch_float32_ms": 1e3 * seconds(lambda: (flat @ vectors.T).topk(10), 3),
        "torch_bfloat16_ms": 1e3 * seconds(lambda: (narrow @ half.T).topk(10), 3),
        "same_as_float64": 1.0,
        "torch_float32_same": float((single == truth).float().mean()),
        "torch_bfloat16_same": float((approximate == truth).float().mean()),
    }
    try:
        import faiss
    except ImportError:
        return result
    other = faiss.IndexFlatIP(DIM)
    other.add(vectors.numpy())
    result["faiss_flat_ms"] = 1e3 * seconds(lambda: other.search(flat.numpy(), 10), 1)
    return result


def scan(store: inf.GradientStore, queries: dict[str, Tensor], folder: Path, metric: str) -> dict[str, Any]:
    """Exact search over all rows, from a mapped index."""
    begin = time.perf_counter()
    inf.InfluenceIndex.build(store, "Flat", metric, path=folder)
    spent = time.perf_counter() - begin
    index = inf.InfluenceIndex.load(folder)
    true = brute_force(store, stacked(queries), len(store), torch.float64, metric)
    return {
        "build_s": spent,
        "bytes": index.nbytes,
        "share_of_float32": index.nbytes / (4 * DIM * len(store)),
        "recall_at_10": recall(index, queries, true),
        "batch_ms_per_query": 1e3 * seconds(lambda: index.search(queries)) / len(true),
        **latency(index, queries),
    }


def faiss_index(
    store: inf.GradientStore, queries: dict[str, Tensor], folder: Path, factory: str, target: float
) -> dict[str, Any]:
    """A FAISS index in norm partitions, held-out queries apart from those that it is tuned on."""
    begin = time.perf_counter()
    half = len(queries[store.layers[0]]) // 2
    tuning = {name: tensor[:half] for name, tensor in queries.items()}
    held_out = {name: tensor[half:] for name, tensor in queries.items()}
    index = inf.InfluenceIndex.build(store, factory, queries=tuning, recall=target, path=folder)
    spent = time.perf_counter() - begin
    true = brute_force(store, stacked(held_out), len(store), torch.float32)
    return {
        "factory": factory,
        "build_s": spent,
        "bytes": index.nbytes,
        "share_of_float32": index.nbytes / (4 * DIM * len(store)),
        "recall_at_10": recall(index, held_out, true),
        "batch_ms_per_query": 1e3 * seconds(lambda: index.search(held_out), 3) / half,
        **latency(index, held_out),
    }


def job(kind: str, path: Path, out: Path, memory: str) -> dict[str, float]:
    """One build or aggregation in a process of its own: seconds and peak resident memory."""
    store = inf.GradientStore.open(path)
    # What a process takes before it has done anything.
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = peak()
    begin = time.perf_counter()
    if kind == "build":
        inf.InfluenceIndex.build(store, "Flat", path=out)
    else:
        found = inf.influence(store, inf.GradientStore.open(out), "dot", memory=memory)
        inf.aggregate_many(found, [kind] if kind == "mean" else ["rank", "vote"])
    spent = time.perf_counter() - begin
    return {"seconds": spent, "peak_bytes": peak(), "before_bytes": before}


def peak() -> int:
    """Most resident memory of this process: not ``ru_maxrss``, which begins with that of the process it came from."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def in_process(kind: str, path: Path, out: Path, memory: str = "512MiB") -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.million", "--job", kind, str(path), str(out), memory]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout)


@contextmanager
def workspace(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)


@click.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--queries", "query_count", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep stores and indexes here; removed otherwise.")
@click.option(
    "--faiss", "factories", multiple=True, help="Also a FAISS index of this factory string, such as IVF1024,SQ8."
)
@protocol.out_option("An earlier result there is replaced.")
@protocol.json_option
@click.option("--job", "job_of", nargs=4, hidden=True)
def main(
    rows: int,
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
    header = {**protocol.header("million"), "ceilings": bench.ceilings(), "rows": rows, "seed": seed, "faiss": []}
    file = protocol.result_file(out, protocol.dated_name(header, "million"))
    protocol.previous(file, "million")
    with (
        protocol.Results(file, header) as results,
        protocol.Progress(9 + len(factories)) as progress,
        workspace(folder) as place,
    ):
        with progress.step("rows of a small model"):
            source = Gradients(place / "model", seed)
        with progress.step(f"a store of {rows} rows"):
            begin = time.perf_counter()
            store = source.write(place / "store", rows, 1000 + seed)
            spent = time.perf_counter() - begin
        results.add(store={"build_s": spent, "bytes": sum(s["bytes"] for s in store.meta["shards"])})
        small = source.write(place / "small", max(1, rows // 10), 1000 + seed)
        queries = source.draw(query_count, 10**6 + seed)
        asked = source.write(place / "queries", 1000 // LAYERS, 2 * 10**6 + seed)
        # Enough queries that a block of either store fills the memory that is stated.
        many = source.write(place / "many-queries", 1000, 2 * 10**6 + seed)
        first = min(rows, 300_000)
        with progress.step(f"exact search over {first} rows"):
            results.add(exact=exact_search(store, queries, place / "part", first))
        every: dict[str, Any] = {"rows": len(store)}
        for metric in ("dot", "cosine"):
            with progress.step(f"exact search over all rows, {metric}"):
                every[metric] = scan(store, queries, place / "index" / metric, metric)
            results.add(million=every)
        for number, factory in enumerate(factories):
            with progress.step(f"FAISS {factory}"):
                found = faiss_index(store, queries, place / f"faiss-{number}", factory, 0.95)
            results.add(faiss=[*results.document["faiss"], found])
        with progress.step("rank and vote"):
            ranked = in_process("rank", store.path, asked.path, "2GiB")
        results.add(rank_vote={**ranked, "rows": LAYERS * len(asked)})
        with progress.step("mean"):
            results.add(mean=in_process("mean", store.path, asked.path))
        peaks: dict[str, dict[str, Any]] = {"build": {}, "aggregate": {}}
        for of in (small, store):
            with progress.step(f"peak memory over {len(of)} rows"):
                peaks["build"][str(len(of))] = in_process("build", of.path, place / "peak", "384MiB")
                peaks["aggregate"][str(len(of))] = in_process("rank", of.path, many.path, "384MiB")
                shutil.rmtree(place / "peak", ignore_errors=True)
            results.add(peak=peaks)
    protocol.show(results.document, as_json, lambda document: click.echo(table(document)))


def table(document: dict[str, Any]) -> str:
    exact, all_rows, rank = document["exact"], document["million"], document["rank_vote"]
    gib = 2**30
    rivals = [f"{name} {exact[key]:.0f} ms" for name, key in RIVALS.items() if key in exact]
    same = f"float32 {exact['torch_float32_same']:.2%}, bfloat16 {exact['torch_bfloat16_same']:.2%}"
    ours = f"{exact['ours_ms']:.0f} ms (cosine, all rows read: {exact['ours_cosine_ms']:.0f} ms), the ids of float64 brute "
    ours += f"force ({'; '.join(rivals)}; same ids: {same})"
    cells = [(f"exact top-10, {exact['rows']} x {DIM}, {exact['queries']} queries", "<= 200 ms", ours)]
    for metric in ("dot", "cosine"):
        found = all_rows[metric]
        what = f"{all_rows['rows']} x {DIM}, {metric}, batches of {exact['queries']}"
        reached = f"recall {found['recall_at_10']:.3f} at {found['batch_ms_per_query']:.2f} ms"
        cells.append((what, "recall@10 >= 0.95 at <= 3.7 ms a query", reached))
        cells.append((f"one query, exact, {metric}", "<= 40 ms", points(found)))
    dot = all_rows["dot"]
    size = f"{dot['share_of_float32']:.1%}, {dot['bytes'] / gib:.2f} GiB mapped, built in {dot['build_s']:.1f} s"
    cells.append(("index RAM", "<= 30 % of float32", size))
    for found in document["faiss"]:
        reached = f"recall {found['recall_at_10']:.3f} at {found['batch_ms_per_query']:.2f} ms; {points(found)}"
        size = f"{found['share_of_float32']:.1%} of float32, built in {found['build_s']:.0f} s"
        cells.append((f"FAISS {found['factory']} in norm partitions", "the same", f"{reached}; {size}"))
    spent = f"{rank['seconds']:.1f} s, {rank['peak_bytes'] / 1e9:.2f} GB"
    cells.append((f"rank + vote, {document['rows']} x {rank['rows']} (layer, query) rows", "<= 30 s, <= 4 GB", spent))
    cells.append(("mean of the same", "one pass", f"{document['mean']['seconds']:.1f} s"))
    for kind, runs in document["peak"].items():
        (few, low), (many, high) = runs.items()
        sizes = f"{low['peak_bytes'] / 2**20:.0f} to {high['peak_bytes'] / 2**20:.0f} MiB"
        change = f"{high['peak_bytes'] / low['peak_bytes'] - 1:+.1%}"
        cells.append((f"peak memory of {kind}, {few} to {many} rows", "within 10 %", f"{sizes} ({change})"))
    head = (
        f"{document['machine']['device']}, {document['machine']['threads']} threads; store {document['rows']} x {DIM}, "
    )
    head += f"{document['store']['bytes'] / gib:.2f} GiB, written in {document['store']['build_s']:.0f} s"
    rows = ["| work | goal | measured |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)]
    return "\n".join([head, "", *rows])


def points(found: dict[str, float]) -> str:
    return f"p50 {found['p50_ms']:.1f}, p95 {found['p95_ms']:.1f}, p99 {found['p99_ms']:.1f} ms"


RIVALS = {"FAISS Flat": "faiss_flat_ms", "torch float32": "torch_float32_ms", "torch bfloat16": "torch_bfloat16_ms"}

if __name__ == "__main__":
    main()
