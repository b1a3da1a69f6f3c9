"""``demo`` and ``audit``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from influence_fast.cli.options import (
    DATA,
    Command,
    example,
    json_option,
    methods_help,
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
@click.option("--samples", default=1200, help="How many training samples are made.")
@click.option("--seed", default=0, help="Seed of the reviews, the flips and the model's initial weights.")
@json_option
def demo(out: Path, samples: int, seed: int, as_json: bool) -> None:
    """Train a small transformer on labels of which 20 % are flipped, and find them. Offline, about a minute."""
    from influence_fast.auditing.demo import next_commands, run_demo

    result = run_demo(out, samples=samples, seed=seed)
    _print_audit(result, out, as_json, next_commands(out))


@click.command(
    cls=Command,
    replayed=("model", "train"),
    epilog=example(
        "influence-fast audit --model my-model --train train.jsonl --queries trusted.jsonl \\\n"
        "  --text-column sentence --label-column label --out audit"
    ),
)
@click.option("--model", help="Folder of a model or a PEFT adapter, or a hub name.")
@click.option("--train", multiple=True, help=DATA)
@click.option(
    "--queries",
    multiple=True,
    help="A small trusted set, in any of these forms. Without it rows of --train are held out in its place.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for scores, report and stores.")
@click.option(
    "--noise-column", help="Column that is true for samples known to have a wrong label; used to measure alone."
)
@model_options
@click.option(
    "--methods",
    help=f"{methods_help()}  [default: dot,cosine,datainf, and pool for classifiers]",
)
@click.option("--aggregations", help="How to aggregate: mean,rank-c,vote-c where predictions are known, or others.")
@click.option("--rank-by", help="Ranking that orders scores.csv, as METHOD:GROUP:AGGREGATION.")
@click.option("--fraction", default=0.2, help="Share of the samples that a vote goes against.")
@click.option("--seed", default=0, help="Seed of the random baseline, of planted flips and of held-out rows.")
@click.option(
    "--self-check", type=float, help="Plant flips in this share of a copy (such as 0.05): how far to trust the ranking."
)
@click.option("--checkpoints", help="Folders of the model at other times of its training, for --self-check.")
@click.option("--max-disk", default="20GB", help="Most that the audit may write; beyond it a terminal is asked.")
@click.option("--evidence", default=2000, help="How many of the most harmful rows get evidence.")
@click.option("--query-group", help="Column of the queries with their group, to find rows that hurt one group alone.")
@click.option(
    "--training",
    type=click.Path(),
    help="Folder that InfluenceCallback recorded in: to rank by training dynamics too, and for tracin and less.",
)
@click.option("--dry-run", is_flag=True, help="Say what the audit would take in time and disk; write nothing.")
@click.option("--config", type=click.Path(path_type=Path), help="Replay this config.json; other options are ignored.")
@verify_option
@json_option
def audit(out: Path, config: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Rank training samples from most harmful to most helpful, with a report on how far to trust it."""
    if config is not None:
        options = _replayed(config)
    else:
        for name in ("methods", "aggregations", "checkpoints", "label_names"):
            options[name] = names(options[name])
        options["batch_tokens"] = token_count(options["batch_tokens"])
        options["queries"] = options["queries"] or None
    _run_audit(out, dry_run, as_json, options)


def _run_audit(out: Path, dry_run: bool, as_json: bool, options: dict[str, Any]) -> None:
    from influence_fast.auditing.disk import TooLarge, check_disk
    from influence_fast.auditing.run import check_out, plan_audit, run_plan

    model, train, queries = (options.pop(name, None) for name in ("model", "train", "queries"))
    if not dry_run:
        check_out(out, model, train, queries)
    plan = plan_audit(model, train, queries, None, options)
    if dry_run:
        _show_plan(plan, out, as_json)
        return
    try:
        check_disk(plan, out)
    except TooLarge as error:
        if not _somebody_is_there() or not click.confirm(f"{str(error).removeprefix('out: ')}.\nWrite it?", err=True):
            raise
    _print_audit(run_plan(plan, out), out, as_json)


def _somebody_is_there() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _show_plan(plan: Any, out: Path, as_json: bool) -> None:
    """What an audit would take, from a few of its batches."""
    from influence_fast.auditing.disk import as_text, free_disk, stored_bytes, stored_rows
    from influence_fast.gradients.estimate import estimate_of

    found = estimate_of(plan.model, plan.samples.rows, plan.build, ids=plan.samples.ids)
    size, free = stored_bytes(plan), free_disk(out)
    seconds = found.seconds * stored_rows(plan) / len(plan.samples)
    document = {
        "samples": len(plan.samples),
        "queries": len(plan.trusted),
        "recognised": plan.samples.form,
        "task": plan.task,
        "methods": list(plan.config.methods),
        "layers": plan.layers,
        "projection": str(plan.build.projection),
        "disk_bytes": size,
        "free_bytes": free,
        "seconds": seconds,
        "memory_bytes": found.memory_bytes,
        "held_out": plan.held_out,
        "copies": plan.copies,
    }
    rows = [
        ["rows", f"{len(plan.samples):,} and {len(plan.trusted):,} queries ({plan.samples.form})"],
        ["layers", f"{len(plan.layers)}, projection {plan.build.projection}"],
        ["methods", ", ".join(plan.config.methods)],
        ["time for gradients", f"{seconds:,.0f} s"],
        ["disk", f"{as_text(size)} of {as_text(free)} free"],
        ["memory", f"{found.memory_bytes / 2**20:,.0f} MiB"],
    ]

    def show() -> None:
        print_table(["what", "estimate"], rows)
        for text in filter(None, (plan.held_out, plan.copies)):
            say(f"- {text}.")

    print_document(document, as_json, show)


def _replayed(path: Path) -> dict[str, Any]:
    """The settings that a ``config.json`` holds, checked, so that an error names the file."""
    from influence_fast._json import read_object
    from influence_fast.auditing.config import AuditConfig

    options = read_object(path, "config")
    missing = [name for name in _SOURCES if name != "queries" and name not in options]
    if missing:
        raise InputError(f"config: {path}: {missing[0]!r} is missing")
    try:
        settings = {name: value for name, value in options.items() if name not in _SOURCES}
        AuditConfig.from_options(options["model"], options["train"], options.get("queries"), settings)
    except InputError as error:
        raise InputError(f"config: {path}: {error}") from None
    return options


def _print_audit(result: Any, out: Path, as_json: bool, then: Sequence[str] = ()) -> None:
    from influence_fast.auditing.report.page import findings

    files = {name: str(out / name) for name in ("scores.csv", "findings.jsonl", "report.html", "config.json")}
    evaluation = result.evaluate() if result.noise is not None else []
    document = {"facts": result.facts, "main": result.main, "evaluation": evaluation, "files": files}
    if then:
        document["next"] = list(then)

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
        if then:
            say("\nTry next:\n" + "\n".join(f"  {command}" for command in then))

    print_document(document, as_json, show)
