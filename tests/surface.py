"""The public surface as text: one line a name, with parameters and defaults, and one a command-line option.

``python -m tests.surface`` rewrites the files of ``tests/pinned`` that ``test_public_surface.py`` compares with. A line that
goes or changes breaks somebody's code: that needs a reason and a line in the changelog; new lines are welcome.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import influence_fast as inf
from influence_fast import ops

PINNED = Path(__file__).parent / "pinned"
# Made by functions and class methods: how they are constructed is nobody's business.
_MADE_ELSEWHERE = ("inf.InfluenceIndex", "inf.InfluenceMatrix", "inf.GradientStore")


def python() -> list[str]:
    """Names of ``influence_fast.__all__`` and ``influence_fast.ops``, with signatures and public members of classes."""
    lines = [line for name in inf.__all__ for line in _described(f"inf.{name}", getattr(inf, name))]
    return sorted(lines + [line for name in ops.__all__ for line in _described(f"ops.{name}", getattr(ops, name))])


def command_line() -> list[str]:
    """Every command with its arguments and options: flags, type, default."""
    from influence_fast.cli import main

    context = click.Context(main)
    lines = []
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            spelled = "|".join(parameter.opts + parameter.secondary_opts)
            choices = getattr(parameter.type, "choices", None)
            facts = [f"one of {', '.join(choices)}" if choices else parameter.type.name]
            given = parameter.to_info_dict()["default"]
            facts.append("required" if parameter.required else f"default={given!r}")
            facts += ["flag"] * getattr(parameter, "is_flag", False) + ["multiple"] * parameter.multiple
            lines.append(f"{name} {spelled} {' '.join(facts)}")
    return lines


def _described(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        if issubclass(value, Exception):
            yield f"{name} is {' '.join(base.__name__ for base in value.__mro__[1:-1])}"
            return
        yield name if name in _MADE_ELSEWHERE else name + _signature(value)
        for member, found in sorted(inspect.getmembers_static(value)):
            # What comes with a class of another library changes with its version.
            if member.startswith("_") or getattr(found, "__module__", "influence_fast").startswith("transformers"):
                continue
            if isinstance(found, property):
                yield f"{name}.{member} property"
            elif isinstance(found, staticmethod | classmethod) or inspect.isfunction(found):
                yield f"{name}.{member}{_signature(getattr(value, member))}"
    elif callable(value):
        yield name + _signature(value)
    else:
        yield f"{name} {type(value).__name__}"


def _signature(value: Any) -> str:
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(value).parameters.values()]
    return str(inspect.Signature(parameters))


FILES = {"python.txt": python, "command_line.txt": command_line}

if __name__ == "__main__":
    PINNED.mkdir(exist_ok=True)
    for file, make in FILES.items():
        (PINNED / file).write_text("\n".join(make()) + "\n", encoding="utf-8")
