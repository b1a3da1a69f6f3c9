"""``score`` and ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from influence_fast.cli.options import (
    Command,
    check_methods,
    example,
    json_option,
    methods_help,
    names,
    print_document,
    print_table,
    say,
    verify_option,
)
from influence_fast.cli.tables import show_evaluation, show_wins
from influence_fast.errors import InputError


@click.command(
    cls=Command,
    epilog=example("influence-fast score --train store --queries query-store --method cosine --out scores.csv"),
)
@click.option("--train", required=True, type=click.Path(path_type=Path), help="A store of training gradients.")
@click.option("--queries", required=True, type=click.Path(path_type=Path), help="A store of query gradients.")
@click.option("--method", default="cosine", help=methods_help())
@click.option(
    "--aggregation",
    default="rank",
    help="mean, rank, vote, min, median or trimmed; with -c over correct queries alone.",
)
@click.option("--fraction", default=0.2, help="Share of the samples that a vote goes against.")
@click.option("--layers", help="Names of layers joined by commas; all by default.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="File for id, score and rank: CSV, or Parquet by its name.",
)
@click.option("--memory", default="512MiB", help="Memory that blocks of influence may take.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Folder from which a stopped job goes on.")
@verify_option
@json_option
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
    as_json: bool,
) -> None:
    """One score per training sample from two stores, lowest = most harmful.

    Several processes share the work, and the first writes the file: torchrun --nproc-per-node 2 -m influence_fast score ...
    """
    from influence_fast import _distributed as processes
    from influence_fast.attribution.aggregation import aggregate_many
    from influence_fast.attribution.influence import influence
    from influence_fast.evaluation.metrics import order
    from influence_fast.evaluation.scores import write_scores
    from influence_fast.gradients.store import GradientStore

    check_methods([method])
    store = GradientStore.open(train)
    matrix = influence(store, GradientStore.open(queries), method, names(layers), memory=memory)
    # Votes tie often; ranks, which break the ties, cost nothing more in the same pass.
    methods = [aggregation, *([aggregation.replace("vote", "rank")] if aggregation.startswith("vote") else [])]
    with processes.joined():
        rank, ranks = processes.here()
        found = aggregate_many(matrix, methods, fraction=fraction, checkpoint=checkpoint, together=ranks > 1)["all"]
    if rank:
        return
    scores, tie = found[aggregation], found[methods[1]] if len(methods) > 1 else None
    ranking = order(scores, tie).tolist()
    places = {row: place for place, row in enumerate(ranking)}
    write_scores(out, store.ids, scores.tolist(), [places[row] for row in range(len(store))])
    document = {"path": str(out), "rows": len(store), "most_harmful": [store.ids[row] for row in ranking[:10]]}
    print_document(document, as_json, lambda: say(f"wrote {out}; most harmful: {document['most_harmful']}"))


@click.command(
    cls=Command,
    epilog=example(
        "influence-fast evaluate audit/scores.csv --noise-column noise --at 0.3\n"
        "influence-fast evaluate audit/scores.csv --train audit/stores/train --queries audit/stores/queries"
    ),
)
@click.argument("scores", type=click.Path(path_type=Path))
@click.option("--score-column", default="score", help="Column of the scores, lowest for the most harmful sample.")
@click.option("--noise-column", default="noise", help="Column that is 1 or true where a sample is known to be bad.")
@click.option("--at", default=0.3, help="Share of the samples that are looked at.")
@click.option(
    "--train", type=click.Path(path_type=Path), help="Store of the samples in the file's order, for the whole table."
)
@click.option("--queries", type=click.Path(path_type=Path), help="Store of the queries, for the whole table.")
@click.option("--methods", default="dot,cosine,datainf", help=f"For the whole table. {methods_help()}")
@click.option("--aggregations", help="Aggregations of the whole table, such as mean,rank-c,vote-c.")
@click.option("--fraction", default=0.2, help="Share of the samples that a vote goes against.")
@click.option(
    "--rivals",
    help="Columns of SCORES to show beside as baselines, joined by commas, lowest for the most doubtful sample; by default "
    "those of an audit (cleanlab, neighbours) where they are there.",
)
@verify_option
@json_option
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
    rivals: str | None,
    as_json: bool,
) -> None:
    """Noise detection rate and its companions: of a file of scores, or of layer group x method x aggregation.

    With --train and --queries, stores of gradients, SCORES need only have the noise column.
    """
    from influence_fast.evaluation.comparison import compare
    from influence_fast.evaluation.evaluate import evaluate as whole_table
    from influence_fast.gradients.store import GradientStore

    if (train is None) != (queries is None):
        raise click.UsageError("--train and --queries go together.")
    if train is not None and queries is not None:
        check_methods(names(methods) or [])
        noise, beside = _numbers(scores, [noise_column])[0], _rivals(scores, rivals)
        stores = GradientStore.open(train), GradientStore.open(queries)
        found = whole_table(
            *stores,
            noise,
            methods=names(methods) or [],
            aggregations=names(aggregations),
            fraction=fraction,
            rivals=beside,
            levels=sorted({0.1, 0.2, 0.3, at}),
        )
        name = f"{100 * at:g}"
        rows = [{**row, "ndr": row[f"ndr@{name}"], "precision": row[f"precision@{name}"]} for row in found.rows]
        document: dict[str, Any] = {
            "rows": found.rows,
            "wins": found.wins.tolist(),
            "warnings": found.warnings,
            "winner": found.winner,
            "best": found.best,
        }

        def show() -> None:
            say(found.winner)
            show_evaluation(rows, at)
            show_wins(found)
            for warning in found.warnings:
                say(f"- {warning}")

        print_document(document, as_json, show)
        return
    values, noise = _numbers(scores, [score_column, noise_column])
    cells = {("scores", "all", ""): values}
    cells |= {(name, "", ""): some for name, some in _rivals(scores, rivals).items()}
    measured = compare(cells, noise, levels=[at])
    row, *others = measured.rows
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
    lines = [[key, value] for key, value in document.items()]
    lines += [[f"auc_ndr of {other['method']}", other["auc_ndr"]] for other in others]
    if others:
        document |= {"winner": measured.winner, "rivals": {other["method"]: other["auc_ndr"] for other in others}}

    def show_scores() -> None:
        if others:
            say(measured.winner)
        print_table(["metric", "value"], lines)

    print_document(document, as_json, show_scores)


def _rivals(path: Path, given: str | None) -> dict[str, Any]:
    """Columns that stand beside: those asked for, or the ones that an audit writes, where they are there."""
    from influence_fast.data.loading import read_table
    from influence_fast.evaluation.comparison import RIVALS

    columns = names(given)
    if columns is None:
        there = read_table("scores", path).columns
        columns = [name for name in RIVALS if name in there]
    return dict(zip(columns, _numbers(path, columns), strict=True)) if columns else {}


def _numbers(path: Path, columns: list[str]) -> list[Any]:
    """Columns of numbers, ``true`` and ``false`` among them: float64 ``(n,)`` each."""
    import torch

    from influence_fast.data.loading import read_table

    table = read_table("scores", path)
    for column in columns:
        if column not in table.columns:
            raise InputError(f"scores: has no column {column!r}; there are {', '.join(table.columns)}")
    try:
        return [
            torch.tensor(
                [float({"true": 1, "false": 0}.get(str(v).lower(), v)) for v in table.column(c)], dtype=torch.float64
            )
            for c in columns
        ]
    except (TypeError, ValueError) as error:
        raise InputError(f"scores: {' and '.join(map(repr, columns))} should be numbers ({error})") from None
