"""Every public name says what it is and what it raises; every option of the command line says what it does."""

from __future__ import annotations

import ast
import inspect
import runpy
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from influence_fast.cli import main

DOCS = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "generate.py"))
ERRORS = {"InputError", "StoreError", "BackendError", "InfluenceError"}


def functions() -> Iterator[tuple[str, Any, str, str]]:
    """Public functions, methods and properties: name, code, own docstring, and those of the class and module around it."""
    for name, value in DOCS["documented"]():
        module = sys.modules[value.__module__].__doc__ or ""
        if not inspect.isclass(value):
            yield name, value, value.__doc__ or "", module
            continue
        for member, found in DOCS["members"](value):
            code = getattr(found, "fget", None) or getattr(found, "func", None) or getattr(found, "__func__", found)
            yield f"{name}.{member}", code, found.__doc__ or "", f"{value.__doc__} {module}"


def raised(function: Any) -> set[str]:
    """This package's errors that a function's own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)} & ERRORS


def test_every_public_name_has_a_docstring() -> None:
    classes = [(name, value) for name, value in DOCS["documented"]() if inspect.isclass(value)]
    # A dataclass without a docstring of its own has its signature for one.
    bare = [n for n, v in classes if not v.__doc__ or v.__doc__.startswith(f"{v.__name__}(")]
    assert bare + [name for name, _, own, _ in functions() if not own] == []


def test_every_public_function_says_what_it_raises() -> None:
    # Where functions share their errors, the docstring of the class or module says them once, or "errors as of" another.
    silent = {
        name: missing
        for name, code, own, around in functions()
        if "errors as of" not in " ".join(own.split())
        and (missing := [error for error in sorted(raised(code)) if error not in own + around])
    }
    assert silent == {}


def test_every_option_has_a_help() -> None:
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in main.list_commands(context)}
    options = [(name, p) for name, command in commands.items() for p in command.params if isinstance(p, click.Option)]
    assert [f"{name} {option.opts[0]}" for name, option in options if not option.help] == []
