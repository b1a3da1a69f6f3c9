"""The command line: one module per family of commands."""

from influence_fast.cli.main import main as main
