"""What commands share: options, and how arguments and results are written."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from influence_fast.cli.text import lines, visible
from influence_fast.errors import InputError


def example(text: str) -> str:
    """An epilog with an example, which click leaves as it is."""
    return "\b\nExample:\n  " + text.replace("\n", "\n  ")


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")(command)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that runs a model over data."""
    options = [
        click.option("--text-column", default="text", help="Column of the text; two joined by a comma are a pair."),
        click.option(
            "--label-column", default="label", help="Column of the class: a number, or a name the model knows."
        ),
        click.option("--answer-column", help="For causal models: the text to predict after --text-column's prompt."),
        click.option(
            "--task",
            default="auto",
            type=click.Choice(["auto", "classification", "causal-lm"]),
            help="What the model does; auto tells by its class, or by the labels of tokenised rows.",
        ),
        click.option("--layers", help="Such as attention[middle],head, or trained; what training changed by default."),
        click.option("--projection", default="identity", help="identity, rademacher:16x16, sjlt:4096, ..."),
        click.option("--dtype", default="float32", help="On disk: float32, float16, bfloat16 or int8."),
        click.option("--precision", type=click.Choice(["bfloat16", "float16"]), help="Autocast forward and backward."),
        click.option("--batch-tokens", default="auto", help="Most tokens in a batch, padding included."),
        click.option(
            "--allow-new-weights", is_flag=True, help="Load a model whose files lack weights, drawn at random then."
        ),
        click.option("--truncate", is_flag=True, help="Cut texts that are longer than the model's context."),
    ]
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def verify_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--verify/--no-verify``, for every command that reads stores."""

    def chosen(context: click.Context, parameter: click.Parameter, verify: bool) -> None:
        if not verify:
            from influence_fast.gradients.store import unverified

            context.with_resource(unverified())

    option = click.option(
        "--verify/--no-verify",
        default=True,
        expose_value=False,
        callback=chosen,
        help="Check what is read of stores and indexes by their checksums.",
    )
    return option(command)


def names(text: str | None) -> list[str] | None:
    """Names joined by commas."""
    return [part.strip() for part in text.split(",")] if text else None


def token_count(text: str) -> int | str:
    """The value of ``--batch-tokens``."""
    if text == "auto":
        return text
    if not text.isdigit():
        raise InputError(f"batch_tokens: expected 'auto' or a positive int, got {text!r}")
    return int(text)


def print_document(document: Any, as_json: bool, show: Callable[[], None]) -> None:
    """One JSON document, or what ``show`` prints."""
    if as_json:
        click.echo(json.dumps(document, indent=1, default=str))
    else:
        show()


def print_table(columns: list[Any], rows: list[list[Any]], title: str | None = None) -> None:
    """A table on standard output. A cell or column of several lines is a list; text is printed as it is, no markup in it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def plain(value: Any) -> Text:
        if isinstance(value, list):
            return Text("\n").join(map(plain, value))
        return Text(f"{value:.3f}" if isinstance(value, float) else visible(value))

    table = Table(title=None if title is None else plain(title), title_justify="left")
    for column in columns:
        table.add_column(plain(column))
    for row in rows:
        table.add_row(*map(plain, row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def say(message: str, err: bool = False) -> None:
    """A message of one or more lines, in which names and texts of the user may stand."""
    click.echo(lines(message), err=err)
