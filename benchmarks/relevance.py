"""Which layers, and which way of putting them together, find a query's class in a Llama tuned by LoRA.

A small Llama is trained on the rows of one data set (the base model), frozen, and tuned by LoRA on query, value, embedding
and head with all rows of the other. For each test row, training rows of its class should have the highest influence:
ROC-AUC and recall among the 90 highest, by layer, and by group of layers and aggregation::

    python -m benchmarks.relevance --data DATA_DIR
    python -m benchmarks.relevance --page docs/quality.md

Each step is kept in ``--work``; the same command goes on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

import influence_fast as inf
from benchmarks import protocol
from benchmarks.generative import SETS, encoder, read, token_losses
from benchmarks.paper import relevance
from benchmarks.paper_tables import interval, verdict
from benchmarks.paper_tasks import bpe
from benchmarks.training import causal_model, fit_causal, with_lora
from influence_fast import ops
from influence_fast.gradients.layers import block_of

METHODS = ("dot", "cosine", "datainf", "trackstar")
AGGREGATIONS = ("mean", "rank", "vote", "vote for")
METRICS = ("roc_auc", "recall@90")
# The middle ones are the blocks of the second and third quarter.
MIDDLE, FIRST, LAST = ("block 1", "block 2"), "embedding", "head"
PROJECTION = "sjlt:1024"
FRACTION = 0.2
_WHOSE = {"rank": "Paper: rank", "vote": "Paper: vote", "vote for": "Ours: vote for the highest"}
Run = dict[str, Any]


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of the data sets, one folder each.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("relevance-runs"), help="Steps of unfinished runs."
)
@protocol.out_option("A finished run in it stays as it is, others are added.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--base-epochs", default=8, show_default=True)
@click.option("--epochs", default=5, show_default=True)
@click.option("--lr", default=3e-3, show_default=True, help="Step size of the LoRA matrices.")
@protocol.seconds_option
@protocol.page_option
@protocol.threads_option
def main(
    data: Path | None,
    work: Path,
    out: Path | None,
    seeds: int,
    seconds: float,
    page: Path | None,
    threads: int,
    **settings: Any,
) -> None:
    """Train, tune by LoRA, look for each query's class."""
    torch.set_num_threads(threads)
    if page is not None:
        protocol.write_table(page, out, "relevance", "runs", table_of)
        return
    if data is None:
        raise click.UsageError("--data is needed (or --page).")
    file, document = protocol.begun(out, "relevance", "runs", settings)
    done = {(run["task"], run["seed"]) for run in document["runs"]}
    rows = {task: read(data, task) for task in SETS}
    tokenizer = bpe([row["prompt"] + row["target"] for task in SETS for row in rows[task]["train"]])
    with protocol.Results(file, document) as results, protocol.Progress(seconds=seconds) as progress:
        try:
            for seed, task in itertools.product(range(seeds), SETS):
                if (task, seed) not in done:
                    found = one_run(task, seed, rows, tokenizer, work / f"{task}-seed{seed}", progress, settings)
                    document["runs"].append(found)
                    results.add()
        except protocol.OutOfTime as error:
            click.echo(f"out of time before the next {error}; the same command goes on")
            raise SystemExit(3) from None
    click.echo(f"wrote {file}")


def one_run(
    task: str,
    seed: int,
    rows: dict[str, dict[str, list[dict[str, Any]]]],
    tokenizer: Any,
    work: Path,
    progress: protocol.Progress,
    settings: dict[str, Any],
) -> Run:
    """Base model, LoRA, gradients, and the relevance of layers and groups, of one data set and seed."""
    work.mkdir(parents=True, exist_ok=True)
    encode = encoder(tokenizer)
    other = next(name for name in SETS if name != task)
    train, queries, general = (
        [encode(row) for row in part] for part in (rows[task]["train"], rows[task]["test"], rows[other]["train"])
    )
    base = {"epochs": settings["base_epochs"]}
    model, _ = causal_model(tokenizer.get_vocab_size(), general, work / "base.pt", progress, seed, base)
    loss = {"base": mean_loss(model, queries)}
    model = with_lora(model, seed)
    history = fit_causal(model, train, work / "lora.pt", progress, seed, settings)
    loss["tuned"] = mean_loss(model, queries)
    layers = inf.select_layers(model, "trained")
    stores = []
    for name, part in (("train", train), ("queries", queries)):
        with progress.step(f"{task}, seed {seed}: gradients of {name}", "capture"):
            stores.append(inf.build_store(work / name, model, part, layers, PROJECTION))
    classes = [torch.tensor([row["class_id"] for row in rows[task][side]]) for side in ("test", "train")]
    same = classes[0][:, None] == classes[1][None]
    by_layer, by_group = [], []
    for method in METHODS:
        with progress.step(f"{task}, seed {seed}: {method}", "scores"):
            matrix = inf.influence(stores[0], stores[1], method)
            values = {name: matrix.layer(name) for name in matrix.layers}
            by_layer += [{"method": method, "layer": name, **relevance(values[name], same)} for name in values]
            for group, members in groups_of(layers).items():
                for aggregation, found in by_query(torch.stack([values[name] for name in members])).items():
                    key = {"method": method, "group": group, "aggregation": aggregation}
                    by_group.append({**key, **relevance(found, same)})
    return {
        "task": task, "seed": seed, "sizes": {"train": len(train), "queries": len(queries)},
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss": history, "query_loss": loss, "relevance": by_layer, "groups": by_group,
    }  # fmt: skip


def mean_loss(model: torch.nn.Module, rows: list[dict[str, Any]]) -> float:
    return float(np.mean([float(row.mean()) for row in token_losses(model, rows)]))


def place_of(layer: str) -> str:
    """``embedding``, ``head``, or the block of a layer."""
    block = block_of(layer)
    return f"block {block}" if block is not None else FIRST if "embed" in layer else LAST


def groups_of(layers: Iterable[str]) -> dict[str, list[str]]:
    """Layers by place, those of the middle blocks, and all."""
    groups: dict[str, list[str]] = {}
    for layer in sorted(layers, key=lambda name: (place_of(name) != FIRST, place_of(name) == LAST)):
        groups.setdefault(place_of(layer), []).append(layer)
    return {
        **groups,
        "middle": [layer for place in MIDDLE for layer in groups.get(place, [])],
        "all": [layer for members in groups.values() for layer in members],
    }


def by_query(influence: Tensor, fraction: float = FRACTION) -> dict[str, Tensor]:
    """``(layers, m, n)`` put together for each query alone: ``{aggregation: (m, n)}``, highest = most helpful.

    ``mean``, ``rank`` and ``vote`` are those of :func:`influence_fast.aggregate` for one query: ``vote`` is against the rows
    that are lowest in a layer. ``vote for`` is its mirror, for the highest. Votes tie often: ``rank`` breaks their ties.
    """
    n = influence.shape[2]
    ranks = torch.stack([ops.rank(values) for values in influence]).double()
    mean, k = ranks.mean(0), round(fraction * n)
    # Votes differ by halves at least, so this orders equal ones alone.
    tie = mean / (4 * n)
    return {
        "mean": influence.mean(0, dtype=torch.float64),
        "rank": mean,
        "vote": tie - (k - ranks).clamp(min=0).sum(0),
        "vote for": tie + (ranks - (n - 1 - k)).clamp(min=0).sum(0),
    }


def table_of(runs: list[Run]) -> list[str]:
    """What LoRA learned, ROC-AUC and recall by place and by group and aggregation, and the paper's claims."""
    lines = ["| data set | runs | rows | loss of queries, base model | after LoRA |", "|---|---|---|---|---|"]
    by = {task: [run for run in runs if run["task"] == task] for task in SETS}
    for task, some in by.items():
        before, after = (float(np.mean([run["query_loss"][of] for run in some])) for of in ("base", "tuned"))
        lines.append(f"| {task} | {len(some)} | {some[0]['sizes']['train']} | {before:.2f} | {after:.2f} |")
    for task, some in by.items():
        places = dict.fromkeys(place_of(row["layer"]) for row in some[0]["relevance"])
        lines += ["", f"`{task}`, ROC-AUC / recall@90 of single layers, mean over those of a place:", ""]
        lines += _grid(
            some, {place: functools.partial(of_place, places=[place]) for place in sorted(places, key=_order)}
        )
        lines += ["", f"`{task}`, layers put together for each query:", ""]
        cells = itertools.product(("middle", "all"), AGGREGATIONS)
        lines += _grid(some, {f"{g}, {a}": functools.partial(of_group, group=g, aggregation=a) for g, a in cells})
    return [*lines, "", "Claims on a query's class, mean over methods:", "", *claims(runs)]


def _order(place: str) -> tuple[bool, bool, str]:
    return place != FIRST, place == LAST, place


def _grid(runs: list[Run], figures: dict[str, Callable[..., list[Run]]]) -> list[str]:
    """A line for each entry of ``figures``: by method, and the mean over methods with its interval over runs."""
    head = ["layers", *METHODS, "ROC-AUC, all methods", "95 % interval", "recall@90, all methods", "95 % interval"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, rows_of in figures.items():
        cells = [name]
        for method in METHODS:
            cells.append(" / ".join(f"{_mean(rows_of(runs, method=method), metric):.3f}" for metric in METRICS))
        for metric in METRICS:
            mean, low, high = interval(_mean(rows_of([run]), metric) for run in runs)
            cells += [f"{mean:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _mean(rows: list[Run], metric: str) -> float:
    return float(np.mean([row[metric] for row in rows]))


def of_place(runs: Iterable[Run], places: Iterable[str], method: str | None = None) -> list[Run]:
    """Figures of single layers there, by one method or all."""
    return [
        row
        for run in runs
        for row in run["relevance"]
        if place_of(row["layer"]) in places and method in (None, row["method"])
    ]


def of_group(runs: Iterable[Run], group: str, aggregation: str, method: str | None = None) -> list[Run]:
    """Figures of a group of layers put together, by one method or all."""
    return [
        row
        for run in runs
        for row in run["groups"]
        if (row["group"], row["aggregation"]) == (group, aggregation) and method in (None, row["method"])
    ]


def claims(runs: list[Run]) -> list[str]:
    """Differences over runs with Student intervals, over all runs and over those of each data set."""

    def place(*places: str) -> Callable[[Run], list[Run]]:
        return lambda run: of_place([run], places)

    def together(group: str, aggregation: str) -> Callable[[Run], list[Run]]:
        return lambda run: of_group([run], group, aggregation)

    pairs: list[tuple[str, Callable[[Run], list[Run]], Callable[[Run], list[Run]]]] = [
        ("Paper: middle blocks over the embedding", place(*MIDDLE), place(FIRST)),
        ("Paper: middle blocks over the head", place(*MIDDLE), place(LAST)),
    ]
    for aggregation, group in itertools.product(AGGREGATIONS[1:], ("all", "middle")):
        text = f"{_WHOSE[aggregation]} over mean, {'all layers' if group == 'all' else 'middle blocks'} together"
        pairs.append((text, together(group, aggregation), together(group, "mean")))
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    head = ["claim", "runs", "mean", "95 % interval", "verdict", *(f"{task} alone" for task in tasks)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (text, one, rival), metric in itertools.product(pairs, METRICS):
        over = [(run["task"], _mean(one(run), metric) - _mean(rival(run), metric)) for run in runs]
        mean, low, high = interval(figure for _, figure in over)
        cells = [f"{text} ({metric})", str(len(runs)), f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", verdict(low, high)]
        for task in tasks:
            mean, low, high = interval(figure for of, figure in over if of == task)
            cells.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f}), {verdict(low, high)}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
