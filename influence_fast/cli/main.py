"""The command line: ``influence-fast COMMAND``.

Results go to stdout (tables, or one JSON document with ``--json``), progress and notes to stderr. Exit code 1 for an
error that the user can mend, with its message alone; 2 for wrong usage; 128 and the number of a signal that asked to stop,
with a sentence on how to go on. A command's module is loaded when it is asked for.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shutil
import warnings
from typing import Any

import click

from influence_fast import __version__
from influence_fast.cli.stopping import ending, stopping_by_signals
from influence_fast.cli.text import PlainFormatter, escape_what_cannot_be_written, lines
from influence_fast.errors import InfluenceError

# Command -> its module beside this one.
COMMANDS = {
    "demo": "audit",
    "audit": "audit",
    "inspect": "inspect",
    "clean": "cleaning",
    "select": "cleaning",
    "build": "stores",
    "index": "stores",
    "search": "stores",
    "serve": "serve",
    "verify": "maintenance",
    "upgrade": "maintenance",
    "delete": "maintenance",
    "compact": "maintenance",
    "merge": "maintenance",
    "score": "evaluate",
    "evaluate": "evaluate",
    "doctor": "diagnostics",
    "bench": "diagnostics",
}


_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    # As wide as the terminal, and no wider than a page for who has none.
    "max_content_width": shutil.get_terminal_size((100, 24)).columns,
}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"influence_fast.cli.{COMMANDS[cmd_name]}"), cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        escape_what_cannot_be_written()
        try:
            with stopping_by_signals():
                return super().invoke(ctx)
        except InfluenceError as error:
            click.echo(lines(f"error: {error}"), err=True)
            ctx.exit(1)
        except OSError as error:
            if error.errno == errno.EPIPE:
                # Whoever read the output has read enough; click ends quietly.
                raise
            click.echo(lines(f"error: {_of_system(error)}"), err=True)
            ctx.exit(1)
        except KeyboardInterrupt as error:
            text, code = ending(error, ctx.invoked_subcommand)
            click.echo(f"\n{text}", err=True)
            ctx.exit(code)


def _of_system(error: OSError) -> str:
    """What the system refused, by file."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    where = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{' -> '.join(where)}: {reason}" if where else f"{type(error).__name__}: {reason}"


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="influence-fast")
def main() -> None:
    """Find which training samples help or harm a language model."""
    # Libraries announce deprecations of their own inner calls; a user of this command can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter())
    logging.getLogger("influence_fast").addHandler(handler)
