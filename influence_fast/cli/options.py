"""What commands share: options, and how arguments and results are written."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from influence_fast.attribution.registry import NEEDS, get_method, method_names
from influence_fast.cli.text import lines, visible
from influence_fast.data.settings import OPTIONS, TASKS, DataSettings
from influence_fast.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from influence_fast.data.samples import Samples

DATA = "A file (JSON lines, JSON, CSV, TSV, Parquet, also .gz or .zst), a glob, a folder or a hub name; repeat it for more."


def example(text: str) -> str:
    """An epilog with an example, which click leaves as it is."""
    return "\b\nExample:\n  " + text.replace("\n", "\n  ")


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")(command)


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that reads rows and makes samples of them."""
    options = [
        click.option(
            "--text-column",
            default="text",
            help="Column of the text, or several joined by commas. Where there is no column text, it is recognised by name.",
        ),
        click.option(
            "--label-column",
            default="label",
            help="Column of the label: a class by number or name, classes, tags of words, or a number.",
        ),
        click.option("--answer-column", help="Column of the text to predict after the prompt of --text-column."),
        click.option(
            "--label-names", help="Names of the classes joined by commas, in the order of the model's class numbers."
        ),
        click.option("--chat-template", help="File with the chat template that the model was trained with."),
        click.option("--as-chat", is_flag=True, help="Put prompts and answers into the chat template as turns."),
        click.option("--block-size", type=int, help="Pack plain texts into blocks of this many tokens."),
        click.option("--split", help="Read this split of a data set that has several."),
        click.option("--limit", type=int, help="Read no more rows than this."),
        click.option("--skip-bad", is_flag=True, help="Leave out rows that have a problem, and list them."),
        click.option(
            "--truncate", is_flag=True, help="Cut what is longer than the model takes, as the tokenizer does."
        ),
        click.option(
            "--task",
            default="auto",
            type=click.Choice(TASKS),
            help="What the model does. By default its class tells, or the labels of tokenised rows.",
        ),
        click.option(
            "--allow-new-weights", is_flag=True, help="Load a model whose files lack weights, drawn at random then."
        ),
    ]
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def verify_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--verify/--no-verify``, for every command that reads stores."""

    def chosen(context: click.Context, parameter: click.Parameter, verify: bool) -> None:
        if not verify:
            from influence_fast.gradients.store_records import unverified

            context.with_resource(unverified())

    option = click.option(
        "--verify/--no-verify",
        default=True,
        expose_value=False,
        callback=chosen,
        help="Check what is read of stores and indexes by their checksums.",
    )
    return option(command)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that takes gradients of a model over data."""
    options = [
        click.option(
            "--loss",
            default="auto",
            help="Whose gradient is taken: the model's own, one by name such as masked-lm, or package.module:function.",
        ),
        click.option("--beta", type=float, help="Strength of the loss of preferences.  [default: 0.1]"),
        click.option(
            "--reference",
            help="Folder of the model before preference training. By default the adapter is switched off.",
        ),
        click.option(
            "--layers",
            help="Layers such as attention[middle],head; by default those that training changed.",
        ),
        click.option(
            "--projection",
            default="auto",
            help="How to project gradients: identity, rademacher:16x16, sjlt:4096 and others. By default those of "
            "adapters and small layers stay whole, and those of a model that was trained as a whole become small.",
        ),
        click.option(
            "--dtype",
            default="float32",
            help="How stores keep numbers: float32, float16, bfloat16, int8, int8_block or int4 (a scale for every 32).",
        ),
        click.option(
            "--precision", type=click.Choice(["bfloat16", "float16"]), help="Run forward and backward under autocast."
        ),
        click.option("--batch-tokens", default="auto", help="Most tokens in a batch, padding included."),
    ]
    decorated = functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)
    return data_options(decorated)


def data_settings(options: dict[str, Any]) -> DataSettings:
    """Take the options of :func:`data_options` but ``task`` and ``allow_new_weights`` out of a command's."""
    options["label_names"] = names(options["label_names"])
    given = {name: options.pop(name) for name in OPTIONS if name in options}
    return DataSettings.from_options(given)


def read_samples(
    argument: str, source: Any, model: str, options: dict[str, Any], quiet: bool = False
) -> tuple[nn.Module, Samples, DataSettings, Any]:
    """A command's model and samples, and what else belongs to them: how rows were read, and the tokenizer."""
    from influence_fast.data.loading import read_table
    from influence_fast.data.models import load_model
    from influence_fast.data.samples import prepare, task_of

    settings = data_settings(options)
    task = options.pop("task")
    network, tokenizer = load_model(model, task, options.pop("allow_new_weights"))
    table = read_table(argument, source, settings.split, settings.limit, settings.skip_bad)
    task = task_of(task, network, table, settings.label)
    samples = prepare(argument, table, settings, task, network, tokenizer)
    samples.refuse_unused(argument)
    for problem in () if quiet else samples.skipped:
        say(f"left out: {problem}", err=True)
    return network, samples, settings, tokenizer


def chosen_loss(options: dict[str, Any], task: str) -> Any:
    """The loss that a command's options name, which are taken out of them."""
    from influence_fast.data.models import load_model
    from influence_fast.gradients.own_loss import find_loss

    reference, beta, loss = (options.pop(name) for name in ("reference", "beta", "loss"))
    other = None if reference is None else load_model(reference, task)[0]
    return find_loss(loss, task, beta, other)


def methods_help() -> str:
    """The one list of methods: those that two stores are enough for, and those that need the model too."""
    alone = method_names(without=NEEDS)
    others = [name for name in method_names() if name not in alone]
    return f"Of {', '.join(alone)}; in audit, which has the model, also of {', '.join(others)}."


def check_methods(chosen: Iterable[str]) -> None:
    """InputError for a method that two stores are not enough for."""
    for name in chosen:
        needs = get_method(name).needs
        if needs:
            raise InputError(
                f"method: {name} needs {'; '.join(NEEDS[need] for need in sorted(needs))}; audit has all of it, and "
                f"two stores are enough for {', '.join(method_names(without=NEEDS))}"
            )


_NOT_GIVEN = (None, click.core.ParameterSource.DEFAULT)


class Command(click.Command):
    """A command that names all missing options at once.

    ``replayed``: options that are needed too, unless --config gives them.
    """

    def __init__(self, *args: Any, replayed: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.replayed = replayed

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            left = super().parse_args(ctx, args)
        except click.MissingParameter as error:
            missing = self._missing(ctx)
            if len(missing) < 2:
                raise
            raise click.UsageError(f"Missing options: {', '.join(missing)}.", ctx) from error
        missing = self._missing(ctx)
        if missing and not ctx.resilient_parsing:
            raise click.UsageError(
                f"Missing option{'s' * (len(missing) > 1)}: {', '.join(missing)} (or --config).", ctx
            )
        return left

    def _missing(self, ctx: click.Context) -> list[str]:
        replayed = () if ctx.get_parameter_source("config") not in _NOT_GIVEN else self.replayed
        return [
            p.opts[0] if isinstance(p, click.Option) else p.make_metavar(ctx)
            for p in self.params
            if (p.required or p.name in replayed) and ctx.get_parameter_source(p.name or "") in _NOT_GIVEN
        ]


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
