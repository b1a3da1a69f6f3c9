"""The command line: ``influence-fast demo | audit | build | index | search | score | evaluate | doctor``.

Results go to stdout (tables, or one JSON document with ``--json``), progress and notes to stderr. Exit code 1 for an
error that the user can mend, with its message alone; 2 for wrong usage.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from influence_fast import __version__
from influence_fast.errors import InfluenceError, InputError


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InfluenceError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


def _example(text: str) -> str:
    return "\b\nExample:\n  " + text.replace("\n", "\n  ")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="influence-fast")
def main() -> None:
    """Find which training samples help or harm a language model."""
    # Libraries announce deprecations of their own inner calls; a user of this command can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("influence_fast").addHandler(logging.StreamHandler())


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")(command)


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that runs a model over data."""
    options = [
        click.option("--text-column", default="text", help="Column of the text; two joined by a comma are a pair."),
        click.option(
            "--label-column", default="label", help="Column of the class: a number, or a name the model knows."
        ),
        click.option("--answer-column", help="For causal models: the text to predict after --text-column's prompt."),
        click.option("--task", default="auto", type=click.Choice(["auto", "classification", "causal-lm"])),
        click.option("--layers", help="Such as attention[middle],head; adapters (or all but embeddings) by default."),
        click.option("--projection", default="identity", help="identity, rademacher:16x16, sjlt:4096, ..."),
        click.option("--dtype", default="float32", help="On disk: float32, float16, bfloat16 or int8."),
        click.option("--precision", type=click.Choice(["bfloat16", "float16"]), help="Autocast forward and backward."),
        click.option("--batch-tokens", default="auto", help="Most tokens in a batch, padding included."),
        click.option("--truncate", is_flag=True, help="Cut texts that are longer than the model's context."),
    ]
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def _list(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",")] if text else None


def _tokens(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdigit():
        raise InputError(f"batch_tokens: expected 'auto' or a positive int, got {text!r}")
    return int(text)


def _print(document: Any, as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=1, default=str))
    else:
        show()


def _table(columns: list[str], rows: list[list[Any]], title: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@main.command(epilog=_example("influence-fast demo --out demo"))
@click.option("--out", default="influence-fast-demo", type=click.Path(path_type=Path), help="Folder of the report.")
@click.option("--samples", default=1200, help="Training samples.")
@click.option("--seed", default=0)
@_json_option
def demo(out: Path, samples: int, seed: int, as_json: bool) -> None:
    """Train a small transformer on labels of which 20 % are flipped, and find them. Offline, about a minute."""
    from influence_fast.auditing.demo import run_demo

    result = run_demo(out, samples=samples, seed=seed)
    _print_audit(result, out, as_json)


@main.command(
    epilog=_example(
        "influence-fast audit --model my-model --train train.jsonl --queries trusted.jsonl \\\n"
        "  --text-column sentence --label-column label --out audit"
    )
)
@click.option("--model", help="Folder of a model or a PEFT adapter, or a hub name.")
@click.option("--train", help="JSONL, CSV or Parquet file, saved data set, or hub name.")
@click.option("--queries", help="A small trusted set, in any of these forms.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for scores, report and stores.")
@click.option("--noise-column", help="If known: true for samples with a wrong label. Only used to measure.")
@_model_options
@click.option(
    "--methods",
    help="Of dot, cosine, datainf, trak, trackstar, ekfac, contrast-dot, contrast-cosine, outlier, repsim, we, we_topk, "
    "neighbours, fitted-trackstar, fitted-cosine, pool.  [default: dot,cosine,datainf, and pool for classifiers]",
)
@click.option("--aggregations", help="Such as mean,rank-c,vote-c (the default where predictions are known).")
@click.option("--rank-by", help="METHOD:GROUP:AGGREGATION that orders scores.csv.")
@click.option("--fraction", default=0.2, help="Share of the samples that a vote goes against.")
@click.option("--seed", default=0, help="Of the random baseline and of planted flips.")
@click.option(
    "--self-check", type=float, help="Plant flips in this share of a copy (such as 0.05): how far to trust the ranking."
)
@click.option("--checkpoints", help="For --self-check: folders of the model at other times of its training.")
@click.option("--config", type=click.Path(path_type=Path), help="Replay this config.json; other options are ignored.")
@_json_option
def audit(out: Path, config: Path | None, as_json: bool, **options: Any) -> None:
    """Rank training samples from most harmful to most helpful, with a report on how far to trust it."""
    from influence_fast.auditing.run import audit as run

    if config is not None:
        try:
            options = json.loads(config.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"config: cannot read {config} ({error})") from None
    else:
        missing = [f"--{name}" for name in ("model", "train", "queries") if not options[name]]
        if missing:
            raise click.UsageError(f"Missing option {missing[0]!r} (or --config).")
        options["methods"] = _list(options["methods"])
        options["aggregations"] = _list(options["aggregations"])
        options["checkpoints"] = _list(options["checkpoints"])
        options["batch_tokens"] = _tokens(options["batch_tokens"])
    _print_audit(
        run(options.pop("model"), options.pop("train"), options.pop("queries"), out=out, **options), out, as_json
    )


def _print_audit(result: Any, out: Path, as_json: bool) -> None:
    from influence_fast.auditing.report import findings

    files = {name: str(out / name) for name in ("scores.csv", "report.html", "config.json")}
    evaluation = result.evaluate() if result.noise is not None else []
    document = {"facts": result.facts, "main": result.main, "evaluation": evaluation, "files": files}

    def show() -> None:
        if evaluation:
            _show_evaluation(evaluation)
        worst = result.ranking[:10].tolist()
        texts = result.texts or [""] * len(result.ids)
        label = " ".join(result.main)
        _table(
            ["rank", "id", "label", "text"],
            [
                [place, result.ids[i], "" if result.labels is None else result.labels[i], texts[i][:70]]
                for place, i in enumerate(worst)
            ],
            f"Most harmful by {label}",
        )
        for finding in findings(result, evaluation):
            click.echo(f"- {finding}")
        click.echo("\n" + "\n".join(f"wrote {file}" for file in files.values()))

    _print(document, as_json, show)


def _show_evaluation(evaluation: list[dict[str, Any]], at: float = 0.3) -> None:
    """The baselines, then a table of layer group x aggregation for each method."""
    cells = {(row["method"], row["group"], row["aggregation"]): row for row in evaluation}
    rows = [
        [method, row["ndr"], row["auc_ndr"], f"{row['low']:.3f} to {row['high']:.3f}"]
        for (method, group, _), row in cells.items()
        if not group
    ]
    level = f"NDR@{100 * at:g}"
    _table(["baseline", level, "AUC_NDR", "95 % interval"], rows)
    for method in dict.fromkeys(method for method, group, _ in cells if group):
        groups = dict.fromkeys(g for m, g, _ in cells if m == method and g and not g.startswith("block"))
        aggregations = list(dict.fromkeys(a for m, _, a in cells if m == method))
        rows = [
            [group, *(cells[method, group, a][metric] for a in aggregations for metric in ("ndr", "auc_ndr"))]
            for group in groups
        ]
        _table([method, *(f"{a}\n{metric}" for a in aggregations for metric in (level, "AUC_NDR"))], rows)


@main.command(
    epilog=_example(
        "influence-fast build --model my-model --data train.jsonl --projection rademacher:16x16 --out store"
    )
)
@click.option("--model", required=True, help="Folder of a model or a PEFT adapter, or a hub name.")
@click.option("--data", required=True, help="JSONL, CSV or Parquet file, saved data set, or hub name.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the store.")
@_model_options
@click.option("--loss", default="auto", help="auto, classification, causal-lm or causal-lm-sum.")
@click.option("--dry-run", is_flag=True, help="Run a few batches and say what the build would take; write nothing.")
@_json_option
def build(model: str, data: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write per-sample gradients of a data set to a store; goes on where it stopped.

    Runs on the GPU if there is one. Several processes share the work, on folders that all of them see:
    torchrun --nproc-per-node 2 -m influence_fast build ...
    """
    from influence_fast import _distributed as processes
    from influence_fast.auditing.run import default_layers
    from influence_fast.data.loading import read_table
    from influence_fast.data.models import load_model
    from influence_fast.data.samples import Columns, prepare, task_of
    from influence_fast.gradients.build import build_store
    from influence_fast.gradients.estimate import estimate_build

    columns = Columns(options.pop("text_column"), options.pop("label_column"), options.pop("answer_column"))
    network, tokenizer = load_model(model, options["task"])
    rows = read_table("data", data)
    if len(rows) == 0:
        raise InputError(f"data: {data} has no rows")
    samples = prepare("data", rows, columns, task_of(options.pop("task"), network, rows), network, tokenizer)
    options["layers"] = options["layers"] or default_layers(network)
    options["batch_tokens"] = _tokens(options["batch_tokens"])
    with processes.joined() as device:
        rank, world = processes.here()
        network.to(device)
        if dry_run:
            found = estimate_build(network, samples.rows, ids=samples.ids, **options)
            if rank == 0:
                _print(dataclasses.asdict(found), as_json, lambda: _show_estimate(found, world))
            return
        store = build_store(out, network, samples.rows, ids=samples.ids, **options)
    if rank == 0:
        size = sum(shard["bytes"] for shard in store.meta["shards"])
        document = {"path": str(out), "rows": len(store), "layers": store.layers, "dims": store.dims, "bytes": size}
        _print(document, as_json, lambda: click.echo(f"{store}\n{size / 2**20:.1f} MiB in {out}"))


def _show_estimate(found: Any, world: int) -> None:
    rows = [
        ["rows", f"{found.rows:,} in {found.batches:,} batches"],
        ["samples/s", f"{found.samples_per_s:,.1f}" + (f" by each of {world} processes" if world > 1 else "")],
        ["time", f"{found.seconds / world:,.0f} s"],
        ["disk", f"{found.disk_bytes / 2**20:,.1f} MiB"],
        ["memory", f"{found.memory_bytes / 2**20:,.0f} MiB" + (" in each process" if world > 1 else "")],
    ]
    if found.device_bytes:
        rows.append(["GPU memory", f"{found.device_bytes / 2**20:,.0f} MiB"])
    _table(["what", "estimate"], rows)


_verify_option = click.option("--verify", is_flag=True, help="Hash every shard when it is first read.")


@main.command(epilog=_example("influence-fast index store --metric cosine --out store.index"))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the index.")
@click.option("--factory", default="auto", help="Flat (exact), auto, or a FAISS factory string such as IVF256,SQ8.")
@click.option("--metric", default="dot", help="dot or cosine.")
@click.option("--layers", help="Names joined by commas; all by default.")
@click.option("--recall", default=0.95, help="Share of the best 10 that an approximate index is to find.")
@click.option("--memory", help="What the index may take, such as 512MiB.")
@click.option("--rows", help="A range such as 0:500000, for one of several machines.")
@_verify_option
@_json_option
def index(
    store: Path,
    out: Path,
    factory: str,
    metric: str,
    layers: str | None,
    recall: float,
    memory: str | None,
    rows: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Build an index over a store: exact, or by FAISS."""
    from influence_fast.gradients.store import GradientStore
    from influence_fast.search.influence_index import InfluenceIndex

    opened = GradientStore.open(store, verify)
    share = None
    if rows is not None:
        ends = rows.split(":")
        if len(ends) != 2 or not all(end.isdigit() for end in ends):
            raise InputError(f"rows: expected a range such as 0:500000, got {rows!r}")
        share = range(int(ends[0]), int(ends[1]))
    built = InfluenceIndex.build(
        opened, factory, metric, _list(layers), recall=recall, memory=memory, rows=share, path=out
    )
    size = sum(file.stat().st_size for file in out.iterdir())
    document = {
        "path": str(out),
        "factory": built.factory,
        "metric": metric,
        "rows": len(built),
        "recall": built.recall,
        "bytes": size,
    }
    _print(document, as_json, lambda: click.echo(f"{built}\n{size / 2**20:.1f} MiB in {out}"))


@main.command(epilog=_example("influence-fast search store.index --queries query-store -k 5 --harmful"))
@click.argument("index", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--queries", type=click.Path(path_type=Path), help="A store of query gradients.")
@click.option("--model", help="With --text: the model of the store.")
@click.option("--text", help="One query text; with --label its class, with --answer the text to predict.")
@click.option("--label", help="Class of --text: a number, or a name that the model knows.")
@click.option("--answer", help="For causal models: what follows --text.")
@click.option("-k", default=10, help="Rows for each query.")
@click.option("--harmful", is_flag=True, help="The most harmful rows instead of the most helpful.")
@click.option("--layers", help="Search by these layers alone, each with a weight if wanted: NAME,NAME=2.")
@click.option("--where", help="Search among rows whose column has a value, such as prediction=1.")
@_verify_option
@_json_option
def search(
    index: tuple[Path, ...],
    queries: Path | None,
    model: str | None,
    text: str | None,
    label: str | None,
    answer: str | None,
    k: int,
    harmful: bool,
    layers: str | None,
    where: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Find the training samples with the most influence on each query.

    Under torchrun each process takes one of as many indexes, and the first prints what all of them found together.
    """
    import os

    from influence_fast.gradients.store import GradientStore
    from influence_fast.search.influence_index import InfluenceIndex

    if (queries is None) == (text is None) or (text is not None and model is None):
        raise click.UsageError("Give --queries, or --text with --model.")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if len(index) != world:
        raise click.UsageError(f"Give one index for each process: {len(index)} for {world}.")
    loaded = InfluenceIndex.load(index[rank], verify=verify)
    if queries is not None:
        opened = GradientStore.open(queries, verify)
        asked, names = opened, list(opened.ids)
    else:
        asked, names = _text_gradient(loaded, str(model), str(text), label, answer), [str(text)]
    options = {"layers": _weighted(layers), "only": None if where is None else _rows_where(loaded, where)}
    if world > 1:
        import torch.distributed as dist

        from influence_fast.search.distributed import search_all

        dist.init_process_group("gloo")
        try:
            scores, found = search_all(loaded, asked, k, harmful, **options)
        finally:
            dist.destroy_process_group()
        if rank:
            return
    else:
        scores, found = loaded.search(asked, k, harmful, **options)
    ids = found if isinstance(found, list) else found.tolist()
    document = [
        {"query": query, "ids": row, "scores": values, "recall": loaded.recall}
        for query, row, values in zip(names, ids, scores.tolist(), strict=True)
    ]
    rows = [
        [entry["query"], place, entry["ids"][place], f"{entry['scores'][place]:.6g}"]
        for entry in document
        for place in range(k)
    ]
    how = "exact" if loaded.factory == "Flat" else f"{loaded.factory}: recall@10 {loaded.recall:.3f} when it was built"
    _print(document, as_json, lambda: _table(["query", "place", "id", "influence"], rows, how))


def _weighted(layers: str | None) -> Any:
    if not layers or "=" not in layers:
        return _list(layers)
    try:
        pairs = [part.rsplit("=", 1) if "=" in part else (part, "1") for part in _list(layers) or []]
        return {name: float(weight) for name, weight in pairs}
    except ValueError:
        raise InputError(f"layers: expected NAME or NAME=WEIGHT, joined by commas, got {layers!r}") from None


def _rows_where(index: Any, where: str) -> Any:
    name, _, value = where.partition("=")
    values = index.column(name)
    try:
        wanted = {"true": 1.0, "false": 0.0}.get(value.lower())
        return values == (float(value) if wanted is None else wanted)
    except ValueError:
        raise InputError(f"where: expected COLUMN=NUMBER, got {where!r}") from None


def _text_gradient(index: Any, model: str, text: str, label: str | None, answer: str | None) -> Any:
    """Gradients of one text in the index's layers and projection."""
    from influence_fast.data.models import load_model
    from influence_fast.data.samples import Columns, prepare, task_of
    from influence_fast.errors import StoreError
    from influence_fast.gradients.build import gradients_of
    from influence_fast.gradients.model_state import fingerprint

    network, tokenizer = load_model(model, "auto")
    if fingerprint(network) != index.meta["model"]:
        raise StoreError(f"model: {model} is another than the index was made with")
    row: dict[str, Any] = {"text": text}
    if label is not None:
        row["label"] = int(label) if label.lstrip("-").isdigit() else label
    if answer is not None:
        row["answer"] = answer
    columns = Columns("text", "label", None if answer is None else "answer")
    samples = prepare("text", [row], columns, task_of("auto", network, [row]), network, tokenizer)
    return gradients_of(network, samples.rows, index.layers, index.meta["projection"])


@main.command(
    epilog=_example("influence-fast score --train store --queries query-store --method cosine --out scores.csv")
)
@click.option("--train", required=True, type=click.Path(path_type=Path), help="A store of training gradients.")
@click.option("--queries", required=True, type=click.Path(path_type=Path), help="A store of query gradients.")
@click.option("--method", default="cosine", help="dot, cosine or datainf.")
@click.option(
    "--aggregation", default="rank", help="mean, rank, vote, min, median or trimmed; -c: correct queries only."
)
@click.option("--fraction", default=0.2, help="Share of the samples that a vote goes against.")
@click.option("--layers", help="Names joined by commas; all by default.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="CSV: id, score, rank.")
@click.option("--memory", default="512MiB", help="What blocks of influence may take.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Folder from which a stopped job goes on.")
@_verify_option
@_json_option
def score(
    train: Path,
    queries: Path,
    method: str,
    aggregation: str,
    fraction: float,
    layers: str | None,
    out: Path,
    memory: str,
    checkpoint: Path | None,
    verify: bool,
    as_json: bool,
) -> None:
    """One score per training sample from two stores, lowest = most harmful."""
    from influence_fast.attribution.aggregation import aggregate_many, order
    from influence_fast.attribution.influence_matrix import influence
    from influence_fast.gradients.store import GradientStore

    store = GradientStore.open(train, verify)
    matrix = influence(store, GradientStore.open(queries, verify), method, _list(layers), memory=memory)
    # Votes tie often; ranks, which break the ties, cost nothing more in the same pass.
    methods = [aggregation, *([aggregation.replace("vote", "rank")] if aggregation.startswith("vote") else [])]
    found = aggregate_many(matrix, methods, fraction=fraction, checkpoint=checkpoint)["all"]
    scores, tie = found[aggregation], found[methods[1]] if len(methods) > 1 else None
    ranking = order(scores, tie).tolist()
    part = out.with_name(out.name + ".part")
    with open(part, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "score", "rank"])
        places = {row: place for place, row in enumerate(ranking)}
        writer.writerows([store.ids[row], repr(value), places[row]] for row, value in enumerate(scores.tolist()))
    part.rename(out)
    document = {"path": str(out), "rows": len(store), "most_harmful": [store.ids[row] for row in ranking[:10]]}
    _print(document, as_json, lambda: click.echo(f"wrote {out}; most harmful: {document['most_harmful']}"))


@main.command(
    epilog=_example(
        "influence-fast evaluate audit/scores.csv --noise-column noise --at 0.3\n"
        "influence-fast evaluate audit/scores.csv --train audit/stores/train --queries audit/stores/queries"
    )
)
@click.argument("scores", type=click.Path(path_type=Path))
@click.option("--score-column", default="score", help="Lowest = most harmful.")
@click.option("--noise-column", default="noise", help="1 or true where a sample is known to be bad.")
@click.option("--at", default=0.3, help="Share of the samples that are looked at.")
@click.option(
    "--train", type=click.Path(path_type=Path), help="Store of the samples, in the file's order: whole table."
)
@click.option("--queries", type=click.Path(path_type=Path), help="Store of the queries, for the whole table.")
@click.option("--methods", default="dot,cosine,datainf", help="For the whole table; also trak and trackstar.")
@click.option("--aggregations", help="For the whole table; such as mean,rank-c,vote-c.")
@click.option("--fraction", default=0.2, help="Share of the samples that a vote goes against.")
@_json_option
def evaluate(
    scores: Path,
    score_column: str,
    noise_column: str,
    at: float,
    train: Path | None,
    queries: Path | None,
    methods: str,
    aggregations: str | None,
    fraction: float,
    as_json: bool,
) -> None:
    """Noise detection rate and its companions: of a file of scores, or of layer group x method x aggregation.

    With --train and --queries, stores of gradients, SCORES need only have the noise column.
    """
    from influence_fast.evaluation.comparison import compare
    from influence_fast.evaluation.comparison import evaluate as whole_table
    from influence_fast.gradients.store import GradientStore

    if (train is None) != (queries is None):
        raise click.UsageError("--train and --queries go together.")
    if train is not None and queries is not None:
        (noise,) = _numbers(scores, [noise_column])
        stores = GradientStore.open(train), GradientStore.open(queries)
        found = whole_table(
            *stores,
            noise,
            methods=_list(methods) or [],
            aggregations=_list(aggregations),
            fraction=fraction,
            levels=sorted({0.1, 0.2, 0.3, at}),
        )
        name = f"{100 * at:g}"
        rows = [{**row, "ndr": row[f"ndr@{name}"], "precision": row[f"precision@{name}"]} for row in found.rows]
        document: dict[str, Any] = {
            "rows": found.rows,
            "wins": found.wins.tolist(),
            "warnings": found.warnings,
            "best": found.best,
        }

        def show() -> None:
            _show_evaluation(rows, at)
            _show_wins(found)
            for warning in found.warnings:
                click.echo(f"- {warning}")

        _print(document, as_json, show)
        return
    values, noise = _numbers(scores, [score_column, noise_column])
    (row,) = compare({("scores", "all", ""): values}, noise, levels=[at]).rows
    document = {
        "rows": len(values),
        "noisy": int(noise.sum()),
        f"ndr@{at:g}": row[f"ndr@{100 * at:g}"],
        "auc_ndr": row["auc_ndr"],
        "auc_ndr_interval": [row["low"], row["high"]],
        "auc_ndr_random": (len(values) + 1) / (2 * len(values) - int(noise.sum())),
        "roc_auc": row["roc_auc"],
        f"precision@{at:g}": row[f"precision@{100 * at:g}"],
    }
    _print(document, as_json, lambda: _table(["metric", "value"], [[key, value] for key, value in document.items()]))


def _numbers(path: Path, columns: list[str]) -> list[Any]:
    """Columns of numbers, ``true`` and ``false`` among them: float64 ``(n,)`` each."""
    import torch

    from influence_fast.data.loading import read_table

    table = read_table("scores", str(path))
    for column in columns:
        if column not in table.column_names:
            raise InputError(f"scores: has no column {column!r}; there are {', '.join(table.column_names)}")
    try:
        return [
            torch.tensor([float({"true": 1, "false": 0}.get(str(v).lower(), v)) for v in table[c]], dtype=torch.float64)
            for c in columns
        ]
    except (TypeError, ValueError) as error:
        raise InputError(f"scores: {' and '.join(map(repr, columns))} should be numbers ({error})") from None


def _show_wins(found: Any, most: int = 8) -> None:
    """How often each of the best rankings, and each baseline, beats the others."""
    ours = sorted((i for i, row in enumerate(found.rows) if row["group"]), key=lambda i: -found.rows[i]["auc_ndr"])
    shown = [i for i, row in enumerate(found.rows) if not row["group"]] + ours[:most]
    names = [" ".join(filter(None, (row["method"], row["group"], row["aggregation"]))) for row in found.rows]
    rows = [[f"{i}: {names[a]}", *(f"{float(found.wins[a, b]):.2f}" for b in shown)] for i, a in enumerate(shown)]
    title = "Share of resamples in which the row's AUC_NDR beats the column's"
    _table(["ranking", *(str(i) for i in range(len(shown)))], rows, title)


@main.command(epilog=_example("influence-fast doctor --json"))
@_json_option
def doctor(as_json: bool) -> None:
    """Say what hardware and libraries there are, and which backend each operation takes and why."""
    from influence_fast.diagnostics.doctor import examine

    found = examine()

    def show() -> None:
        facts = {**found["machine"], **found["compilers"], **found["packages"]}
        _table(["what", "found"], [[name, "none" if value in (None, []) else value] for name, value in facts.items()])
        for device, operations in found["backends"].items():
            rows = [
                [op, entry["takes"], "; ".join(f"{b}: {r}" for b, r in entry["not"].items())]
                for op, entry in operations.items()
            ]
            _table(["operation", "takes", "not"], rows, f"Backends for tensors on {device}")

    _print(found, as_json, show)


@main.command(epilog=_example("influence-fast bench --op rank --op vote"))
@click.option("--op", "op_names", multiple=True, help="Operation; all by default.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--dtype", default="float32", type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option("--repeats", default=9)
@_json_option
def bench(op_names: tuple[str, ...], device: str, dtype: str, repeats: int, as_json: bool) -> None:
    """Time the kernels on this machine, each verified first, beside plain torch."""
    import torch

    from influence_fast.diagnostics import kernel_bench as room

    unknown = [name for name in op_names if name not in room.OPS]
    if unknown:
        raise InputError(f"op: expected some of {', '.join(room.OPS)}, got {unknown[0]!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: this machine has no CUDA device")
    kind = getattr(torch, dtype)
    found = [
        room.measure(case, device, repeats) for op in op_names or room.OPS for case in room.cases(op, device, kind)
    ]
    document = {
        "machine": room.machine(device),
        "dtype": dtype,
        "ceilings": room.ceilings(device, kind),
        "results": found,
    }
    _print(document, as_json, lambda: bench_table(document))


def bench_table(document: dict[str, Any]) -> None:
    """Print a document of measurements."""
    ceilings = document["ceilings"]
    rows = []
    for result in document["results"]:
        share = [
            f"{result[key] / ceilings[ceiling]:.0%} of {name}"
            for key, ceiling, name in (
                ("bytes_per_s", "copy_bytes_per_s", "copy"),
                ("flops_per_s", "matmul_flops_per_s", "matmul"),
            )
            if result[key]
        ]
        per_element = "" if result["ns_per_element"] is None else f"{result['ns_per_element']:.2f} ns/element"
        best = [f"{ratio:.2f}x {name}" for name, ratio in result["ratios"].items()]
        times = result["times"]["ours"]
        rows.append(
            [
                result["op"],
                result["case"],
                f"{times['p50'] * 1e3:.3f} ms",
                f"{times['p20'] * 1e3:.3f} .. {times['p80'] * 1e3:.3f}",
                "\n".join([*share, *([per_element] if per_element else [])]),
                "\n".join(best),
            ]
        )
    title = f"{document['machine']['device']}, {document['dtype']}, {document['machine']['threads']} threads"
    _table(["operation", "case", "median", "p20 .. p80", "reached", "speed against"], rows, title)
