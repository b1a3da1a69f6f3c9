"""Writes the pages that follow from the code: ``api.md``, ``cli.md``, ``store.md``, and the tables of ``dropin.md``.

    python docs/generate.py            # write them
    python docs/generate.py --check    # exit with 1 where one is stale

What a page says is a docstring, a signature or an option, so that is where it is changed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ForwardRef

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # this tree, whichever copy is installed

import click  # noqa: E402

import influence_fast as inf  # noqa: E402
from influence_fast import ops  # noqa: E402
from influence_fast.attribution.registry import NEEDS, get_method, method_names  # noqa: E402
from influence_fast.cli import main  # noqa: E402

# Folder -> heading, and the module whose docstring opens the section.
SECTIONS = {
    "ops": ("Operations and projections", "ops.specs"),
    "gradients": ("Per-sample gradients and their stores", "gradients"),
    "attribution": ("Influence and its aggregation", "attribution.aggregation"),
    "search": ("Search", "search"),
    "evaluation": ("Evaluation", "evaluation.metrics"),
    "auditing": ("Audits", "auditing"),
    "training": ("Inside training", "training"),
    "compat": ("In the place of other libraries", "compat"),
    "_c_library": ("From C", "_c_library"),
    "errors": ("Errors", "errors"),
    "_renamed": ("Deprecated names", "_renamed"),
}
# What public functions return, though it has no public name of its own.
RETURNED = (
    "attribution.influence_matrix.InMemory",
    "attribution.label_quality.ClassEstimate",
    "attribution.model_passes.WordGradients",
    "auditing.result.AuditResult",
    "training.recorded.Checkpoint",
)
# Other libraries' faces that users import themselves.
FACES = (
    "bergson.BergsonStore",
    "bergson.export_store",
    "bergson.import_store",
    "bergson.open_store",
    "captum.TracInCP",
    "captum.TracInCPFast",
    "kronfluence.read_pairwise_scores",
)
# Made by functions and class methods alone: their constructors are not for users.
MADE_ELSEWHERE = (
    "InfluenceIndex",
    "InfluenceMatrix",
    "GradientStore",
    "InMemory",
    "AuditResult",
    "WordGradients",
    "BergsonStore",
)


def named() -> Iterator[tuple[str, Any]]:
    """Every documented name as users write it, with what it stands for; constants are left out."""
    for name in inf.__all__:
        yield f"inf.{name}", getattr(inf, name)
    for name in ops.__all__:
        yield f"inf.ops.{name}", getattr(ops, name)
    for path in FACES:
        module, _, name = path.rpartition(".")
        yield f"inf.compat.{path}", getattr(importlib.import_module(f"influence_fast.compat.{module}"), name)
    for path in RETURNED:
        module, _, name = path.rpartition(".")
        yield name, getattr(importlib.import_module(f"influence_fast.{module}"), name)


def documented() -> list[tuple[str, Any]]:
    """Functions and classes of :func:`named`, sorted by name."""
    found = [(name, value) for name, value in named() if inspect.isfunction(value) or inspect.isclass(value)]
    return sorted(found, key=lambda pair: pair[0].lower())


def members(owner: type) -> list[tuple[str, Any]]:
    """Public methods and properties that a class of this package defines, sorted; inherited ones of ours among them."""
    found: dict[str, Any] = {}
    for base in reversed(owner.__mro__):
        if base.__module__.startswith("influence_fast"):
            found |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    kinds = (property, functools.cached_property, classmethod, staticmethod)
    return [(n, v) for n, v in sorted(found.items()) if isinstance(v, kinds) or inspect.isfunction(v)]


def api() -> str:
    """One section a folder: what opens it, then every name with signature, docstring and members."""
    sections: dict[str, list[tuple[str, Any]]] = {folder: [] for folder in SECTIONS}
    for name, value in documented():
        sections[value.__module__.split(".")[1]].append((name, value))
    out = ["# API", _note(), "`inf` is `import influence_fast as inf`; names without it are what others return.", ""]
    for folder, names in sections.items():
        links = ", ".join(f"[{name}](#{_anchor(name)})" for name, _ in names)
        out.append(f"- [{SECTIONS[folder][0]}](#{_anchor(SECTIONS[folder][0])}): {links}")
    for folder, names in sections.items():
        title, opening = SECTIONS[folder]
        out += ["", f"## {title}"]
        module = importlib.import_module(f"influence_fast.{opening}")
        out += ["", markdown(inspect.getdoc(module) or "")]
        if folder == "ops":
            out += [f"\nConstants: `inf.ops.BACKENDS` is {_listed(ops.BACKENDS)}; `inf.ops.OPS` is {_listed(ops.OPS)}."]
        if folder == "attribution":
            out += ["", _methods()]
        for name, value in names:
            out += ["", f"### {name}", "", *_entry(name.rpartition(".")[2], value)]
    return "\n".join(out) + "\n"


def _entry(name: str, value: Any) -> Iterator[str]:
    if not (inspect.isclass(value) and (name in MADE_ELSEWHERE or issubclass(value, Exception))):
        yield _signature(name, value)
        yield ""
    yield markdown(inspect.getdoc(value) or "")
    if not inspect.isclass(value):
        return
    callables = []
    for member, found in members(value):
        if isinstance(found, property | functools.cached_property):
            yield f"\n`{member}` (property): {markdown(inspect.getdoc(found) or '')}"
        else:
            callables.append(member)
    for member in callables:
        yield f"\n#### {name}.{member}\n"
        yield _signature(f"{name}.{member}", getattr(value, member))
        yield ""
        yield markdown(inspect.getdoc(getattr(value, member)) or "")


def _signature(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    parts, star = [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self" or parameter.name.startswith("_"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
        star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = f"{stars}{parameter.name}"
        if parameter.annotation is not parameter.empty:
            text += f": {_annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            default = repr(parameter.default)
            text += f" = {'...' if default.startswith('<') else default}"
        parts.append(text)
    returns = "" if inspect.isclass(value) or signature.return_annotation is signature.empty else signature
    arrow = f" -> {_annotation(signature.return_annotation)}" if returns else ""
    line = f"{name}({', '.join(parts)}){arrow}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){arrow}"
    return f"```python\n{line}\n```"


def _annotation(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return inspect.formatannotation(annotation)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _methods() -> str:
    """The registered methods, and what each needs beside gradients."""
    rows = [
        [f"`{name}`", get_method(name).summary, ", ".join(need for need in NEEDS if need in get_method(name).needs)]
        for name in method_names()
    ]
    needs = "\n".join(f"- {need}: {meaning}" for need, meaning in NEEDS.items())
    return (
        "Methods, by the names that `influence`, `audit`, `evaluate` and the command line take:\n\n"
        + _table(["method", "what it computes", "needs beside gradients"], rows)
        + f"\n\nNeeds:\n\n{needs}"
    )


def cli() -> str:
    """Every command: usage, what it does, arguments and options with their defaults, an example."""
    top = click.Context(main, info_name="influence-fast")
    names = main.list_commands(top)
    codes = "Exit code 1: an error, whose message says what to mend; 2: wrong usage."
    out = ["# Command line", _note(), f"`influence-fast COMMAND --help` prints the same. {codes}\n"]
    out += [f"- [{name}](#{_anchor(name)}): {_first_sentence(_command(top, name))}" for name in names]
    for name in names:
        command = _command(top, name)
        context = click.Context(command, parent=top, info_name=name)
        usage = " ".join(["influence-fast", name, *command.collect_usage_pieces(context)])
        out += ["", f"## {name}", "", f"    {usage}", "", inspect.cleandoc(command.help or "")]
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        out += ["", _table(["option", "default", "meaning"], [_option(option) for option in options])]
        example = textwrap.dedent((command.epilog or "").replace("\b\nExample:\n", ""))
        out += ["", "```", *example.splitlines(), "```"]
    return "\n".join(out) + "\n"


def _command(context: click.Context, name: str) -> click.Command:
    command = main.get_command(context, name)
    assert command is not None  # the group listed it
    return command


def _first_sentence(command: click.Command) -> str:
    return re.split(r"(?<=\.)\s", inspect.cleandoc(command.help or ""), maxsplit=1)[0]


def _option(option: click.Option) -> list[str]:
    names = " ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    choices = getattr(option.type, "choices", None)
    kind = "" if option.is_flag else " " + ("one of " + ", ".join(choices) if choices else option.type.name)
    default = option.to_info_dict()["default"]
    shown = "required" if option.required else "" if option.is_flag or default is None else f"`{default}`"
    meaning = (option.help or "") + (" May be given several times." if option.multiple else "")
    return [names + kind, shown, meaning]


def store() -> str:
    """The bytes of a gradient store, as a docstring says that the reader and the writer follow."""
    module = importlib.import_module("influence_fast.gradients.store_format")
    return f"# Gradient stores\n{_note()}\n{markdown(inspect.getdoc(module) or '')}\n"


def markdown(doc: str) -> str:
    """A docstring (Google's sections, roles, literal blocks and simple tables of reStructuredText) as Markdown."""
    lines = doc.splitlines()
    out: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if re.fullmatch(r"=+( +=+)+", line):
            end = next((i for i in range(at, len(lines)) if not lines[i]), len(lines))
            out.append(_simple_table(line, lines[at : end - 1]))
            at = end
        elif line.endswith("::"):
            body, at = _indented(lines, at)
            out += [_inline(line[:-1]), "", "```python", *body, "```"]
        elif section := re.fullmatch(r"(Args|Attributes|Returns|Raises):", line):
            body, at = _indented(lines, at)
            out += [f"**{section[1]}**", "", *_items(body)]
        else:
            out.append(_inline(line))
    return "\n".join(out).strip()


def _indented(lines: list[str], at: int) -> tuple[list[str], int]:
    """The indented block that begins at a line, and the number of the line behind it."""
    end = at
    while end < len(lines) and (not lines[end] or lines[end].startswith(" ")):
        end += 1
    body = inspect.cleandoc("\n" + "\n".join(lines[at:end])).splitlines()
    # A blank line behind the block parts it from what follows.
    return body, end - (end < len(lines))


def _items(body: list[str]) -> Iterator[str]:
    for line in body:
        entry = re.fullmatch(r"([\w*]+(?:, [\w*]+)*): (.*)", line)
        if entry:
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            yield f"- {names}: {_inline(entry[2])}"
        else:
            yield ("  " + _inline(line.strip())) if line.startswith(" ") else _inline(line)


def _inline(text: str) -> str:
    text = re.sub(r":\w+:`~?(?:influence_fast\.)?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def _simple_table(rule: str, lines: list[str]) -> str:
    edges = [match.span() for match in re.finditer("=+", rule)]
    rows: list[list[str]] = []
    for line in lines:
        if line == rule:
            continue
        cells = [line[begin : end if end < len(rule) else None].strip() for begin, end in edges]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            # A first cell that is empty continues the row above.
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
    head, body = (rows[0], rows[1:]) if rule in lines else ([""] * len(edges), rows)
    return _table(head, [[_inline(cell) for cell in row] for row in body])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _note() -> str:
    return "\n<!-- Written by docs/generate.py from the code: change it there. -->\n"


def dropin() -> str:
    """The page as it is, with its tables of what was run."""
    page = (HERE / "dropin.md").read_text(encoding="utf-8")
    for what, table in (("tests", _peer_tests), ("times", _peer_times)):
        begin = page.index("-->\n", page.index(f"<!-- {what.capitalize()} of peers:")) + 4
        page = page[:begin] + "\n".join(["", *table(), ""]) + page[page.index(f"<!-- End of {what}. -->") :]
    return page


def _result(name: str) -> dict[str, Any]:
    path = HERE.parent / "benchmarks" / "results" / name
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _peer_tests() -> Iterator[str]:
    found = _result("peer-tests.json")
    yield "| library | tests | on stock: passed, failed, skipped | seconds | on ours: passed, failed, skipped | seconds |"
    yield "|---|---|---|---|---|---|"
    failures: dict[str, tuple[str, list[str]]] = {}
    for name, peer in found.get("peers", {}).items():
        ways = [peer.get("stock"), peer["ours"]]
        cells = []
        for way in ways:
            counts = ", ".join(str(way[kind]) for kind in ("passed", "failed", "skipped")) if way else "not run"
            cells += [counts, str(way["seconds"]) if way else ""]
        total = sum(peer["ours"][kind] for kind in ("passed", "failed", "skipped"))
        yield f"| {name} ({peer['distribution']} {peer['version']}) | {total} | {' | '.join(cells)} |"
        for test, reason in peer["ours"]["failures"].items():
            where = "on stock too" if test in (peer.get("stock") or {}).get("failures", {}) else "on ours alone"
            failures[test] = (where, [reason])
    yield ""
    yield f"torch {found.get('torch')}, {found.get('threads')} thread, {'a GPU' if found.get('cuda') else 'no GPU'}."
    yield ""
    yield "Tests that fail on ours:" if failures else "No test fails on ours."
    yield ""
    for test, (where, [reason]) in failures.items():
        yield f"- `{test}` ({where}): `{reason.replace('`', chr(39))}`"


def _peer_times() -> Iterator[str]:
    found = _result("peers.json")
    yield "| case | theirs | ours | times as fast |"
    yield "|---|---|---|---|"
    for name, case in found.get("cases", {}).items():
        yield f"| {name} | {1000 * case['theirs_s']:.1f} ms | {1000 * case['ours_s']:.1f} ms | {case['ratio']:.2f} |"
    yield ""
    yield f"{found.get('processor', 'Not run')}, {found.get('threads')} thread; medians of {found.get('runs')} runs of each."


PAGES: dict[str, Callable[[], str]] = {"api.md": api, "cli.md": cli, "store.md": store, "dropin.md": dropin}


def stale() -> list[str]:
    """Pages that say something else than the code."""
    paths = {HERE / name: make for name, make in PAGES.items()}
    return [p.name for p, make in paths.items() if not p.exists() or p.read_text(encoding="utf-8") != make()]


@click.command()
@click.option("--check", is_flag=True, help="Exit with 1 where a page is stale; write nothing.")
def _generate(check: bool) -> None:
    """Write the pages that follow from the code."""
    if check:
        names = stale()
        if names:
            click.echo(f"stale: {', '.join(names)}; run python docs/generate.py", err=True)
        sys.exit(bool(names))
    for name, make in PAGES.items():
        (HERE / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    _generate()
