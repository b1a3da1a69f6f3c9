"""``search --interactive``: one question after another, on a terminal or from a pipe."""

from __future__ import annotations

from typing import Any

import click

from influence_fast.cli.options import print_table, say
from influence_fast.errors import InfluenceError
from influence_fast.serving.lookup import Lookup, Question

_HELP = """A text asks for the rows that help and harm most. Also:
  :row ID        neighbours of a training row
  :query NUMBER  a held-out query of --queries
  :tokens ID     which tokens of the last question a row explains
  :method NAME   another method
  :k NUMBER      how many rows
  :quit          end, as the end of the input does"""


def ask_on_terminal(lookup: Lookup, k: int, method: str | None) -> None:
    """Read questions until the input ends; what is wrong with one is said, and the next is read."""
    say(f"{len(lookup.index)} rows; methods {', '.join(lookup.methods)}. :help says what can be asked.")
    if lookup.note:
        say(lookup.note, err=True)
    last: Question | None = None
    while (line := _read("ask")) is not None:
        command, _, value = line.partition(" ")
        try:
            if command == ":quit":
                return
            if command == ":help":
                say(_HELP)
            elif command == ":method":
                method = value
                say(f"method {method}")
            elif command == ":k":
                k = int(value) if value.isdecimal() else 0
                say(f"{k} rows")
            elif command == ":tokens":
                _show_tokens(lookup, last, value)
            elif command.startswith(":") and command not in (":row", ":query"):
                say(f"{command}: unknown; :help says what can be asked", err=True)
            elif line:
                last = _question(lookup, command, value, line)
                _show(lookup.answer(last, k, method))
        except InfluenceError as error:
            say(f"error: {error}", err=True)


def _question(lookup: Lookup, command: str, value: str, line: str) -> Question:
    if command == ":row":
        return Question(row=value)
    if command == ":query":
        return Question(query=value)
    if lookup.task == "classification":
        return Question(line, label=_read(f"class ({', '.join(lookup.classes)}, or its number)") or "")
    return Question(line, answer=_read("completion (empty: the text alone)") or None)


def _read(prompt: str) -> str | None:
    try:
        return click.prompt(prompt, default="", show_default=False, prompt_suffix="> ").strip()
    except click.Abort:
        return None


def _show(found: dict[str, Any]) -> None:
    asked = found["question"]
    for kind in ("helpful", "harmful"):
        rows = []
        for one in found[kind]:
            top = sorted(one["groups"].items(), key=lambda item: -abs(item[1]))[:3]
            shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in top)
            rows.append([one["id"], f"{one['score']:.6g}", one["effect"], one["label"], shares, one["text"]])
        title = f"most {kind} to {asked['text']!r} {asked['label']}"
        print_table(["id", "influence", "effect", "label", "layers", "text"], rows, title)
    say(f"{found['method']}, {'exact' if found['exact'] else 'approximate'}, {found['seconds']:.2f} s")


def _show_tokens(lookup: Lookup, last: Question | None, name: str) -> None:
    if last is None:
        say("ask something first", err=True)
        return
    found = lookup.tokens(last, [name])
    rows = [[one["text"], f"{one['influence']:.3g}"] for one in found["tokens"]]
    print_table(["token", "influence"], rows, f"row {name}, {found['note']}")
