"""``inspect``."""

from __future__ import annotations

from typing import Any

import click

from influence_fast.cli.options import (
    Command,
    data_options,
    example,
    json_option,
    print_document,
    print_table,
    read_samples,
    say,
)
from influence_fast.errors import InputError

_PROBLEMS = 20


@click.command(
    cls=Command,
    epilog=example("influence-fast inspect data.jsonl --model my-model"),
)
@click.argument("data", nargs=-1, required=True)
@click.option("--model", required=True, help="Folder of a model or a PEFT adapter, or a hub name.")
@click.option("--rows", "shown", default=3, help="How many rows are printed as the model sees them.")
@data_options
@json_option
def inspect(data: tuple[str, ...], model: str, shown: int, as_json: bool, **options: Any) -> None:
    """Say what rows were recognised as, and how they became tokens and targets.

    DATA is as of --train in audit. Targets stand between « and ». Rows with a problem are listed; other commands refuse them
    unless --skip-bad is given.
    """
    from influence_fast.data.inspection import examined

    if shown < 0:
        raise InputError(f"rows: expected 0 or more, got {shown}")
    _, samples, _, tokenizer = read_samples("data", data, model, {**options, "skip_bad": True}, quiet=True)
    found = examined(samples, tokenizer, shown)

    def show() -> None:
        say(f"recognised: {found['recognised']} (task {found['task']})\n")
        for row in found["rows"]:
            say(f"row {row['row']}, {row['tokens']} tokens" + (f" ({row['where']})" if row["where"] else ""))
            say(f"{row['text']}\n")
        print_table(["what", "count"], [[name, f"{value:,}"] for name, value in found["counts"].items()])
        if found["labels"]:
            print_table(["label", "rows"], [[name, f"{value:,}"] for name, value in found["labels"].items()])
        for problem in found["problems"][:_PROBLEMS]:
            say(f"- {problem}")
        if len(found["problems"]) > _PROBLEMS:
            say(f"- and {len(found['problems']) - _PROBLEMS} more")

    print_document(found, as_json, show)
