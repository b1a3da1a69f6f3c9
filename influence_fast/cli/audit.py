"""``demo`` and ``audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from influence_fast.attribution.registry import method_names
from influence_fast.cli.options import (
    example,
    json_option,
    model_options,
    names,
    print_document,
    print_table,
    say,
    token_count,
    verify_option,
)
from influence_fast.cli.tables import show_evaluation
from influence_fast.errors import InputError

_SOURCES = ("model", "train", "queries")


@click.command(epilog=example("influence-fast demo --out demo"))
@click.option("--out", default="influence-fast-demo", type=click.Path(path_type=Path), help="Folder of the report.")
@click.option("--samples", default=1200, help="Training samples.")
@click.option("--seed", default=0, help="Of the reviews, the flips and the model's initial weights.")
@json_option
def demo(out: Path, samples: int, seed: int, as_json: bool) -> None:
    """Train a small transformer on labels of which 20 % are flipped, and find them. Offline, about a minute."""
    from influence_fast.auditing.demo import run_demo

    result = run_demo(out, samples=samples, seed=seed)
    _print_audit(result, out, as_json)


@click.command(
    epilog=example(
        "influence-fast audit --model my-model --train train.jsonl --queries trusted.jsonl \\\n"
        "  --text-column sentence --label-column label --out audit"
    )
)
@click.option("--model", help="Folder of a model or a PEFT adapter, or a hub name.")
@click.option("--train", help="JSONL, CSV or Parquet file, saved data set, or hub name.")
@click.option("--queries", help="A small trusted set, in any of these forms.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for scores, report and stores.")
@click.option("--noise-column", help="If known: true for samples with a wrong label. Only used to measure.")
@model_options
@click.option(
    "--methods",
    help=f"Of {', '.join(method_names())}.  [default: dot,cosine,datainf, and pool for classifiers]",
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
@verify_option
@json_option
def audit(out: Path, config: Path | None, as_json: bool, **options: Any) -> None:
    """Rank training samples from most harmful to most helpful, with a report on how far to trust it."""
    from influence_fast.auditing.run import audit as run

    if config is not None:
        options = _replayed(config)
    else:
        missing = [f"--{name}" for name in _SOURCES if not options[name]]
        if missing:
            raise click.UsageError(f"Missing option {missing[0]!r} (or --config).")
        options["methods"] = names(options["methods"])
        options["aggregations"] = names(options["aggregations"])
        options["checkpoints"] = names(options["checkpoints"])
        options["batch_tokens"] = token_count(options["batch_tokens"])
    _print_audit(
        run(options.pop("model"), options.pop("train"), options.pop("queries"), out=out, **options), out, as_json
    )


def _replayed(path: Path) -> dict[str, Any]:
    """The settings that a ``config.json`` holds, checked, so that an error names the file."""
    from influence_fast._json import read_object
    from influence_fast.auditing.config import AuditConfig

    options = read_object(path, "config")
    missing = [name for name in _SOURCES if name not in options]
    if missing:
        raise InputError(f"config: {path}: {missing[0]!r} is missing")
    try:
        settings = {name: value for name, value in options.items() if name not in _SOURCES}
        AuditConfig.from_options(options["model"], options["train"], options["queries"], settings)
    except InputError as error:
        raise InputError(f"config: {path}: {error}") from None
    return options


def _print_audit(result: Any, out: Path, as_json: bool) -> None:
    from influence_fast.auditing.report.page import findings

    files = {name: str(out / name) for name in ("scores.csv", "report.html", "config.json")}
    evaluation = result.evaluate() if result.noise is not None else []
    document = {"facts": result.facts, "main": result.main, "evaluation": evaluation, "files": files}

    def show() -> None:
        if evaluation:
            show_evaluation(evaluation)
        worst = result.ranking[:10].tolist()
        texts = result.texts or [""] * len(result.ids)
        label = " ".join(result.main)
        print_table(
            ["rank", "id", "label", "text"],
            [
                [place, result.ids[i], "" if result.labels is None else result.labels[i], texts[i][:70]]
                for place, i in enumerate(worst)
            ],
            f"Most harmful by {label}",
        )
        for finding in findings(result, evaluation):
            say(f"- {finding}")
        say("\n" + "\n".join(f"wrote {file}" for file in files.values()))

    print_document(document, as_json, show)
