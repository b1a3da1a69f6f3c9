"""What every benchmark does alike: says how far it is, keeps what it has measured, and names the machine it ran on.

Progress goes to stderr and results to stdout, so that ``--json`` can be piped. What is in ``--out`` is a whole JSON document
after every finished case, with ``"partial": true`` until the last one: a killed run keeps what it measured.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import click
import torch
from tqdm import tqdm

from influence_fast.diagnostics import kernel_bench as bench

Item = TypeVar("Item")
RESULTS = Path(__file__).parent / "results"
_QUIET_SECONDS = 30


class OutOfTime(Exception):
    """The next step would pass the time that was given."""


class Progress:
    """Says what is done: a bar on a terminal, elsewhere one line for each finished step.

    With ``seconds`` given, a step that would pass them is refused, judging by how long one of its kind took before.
    """

    def __init__(self, total: int | None = None, seconds: float = math.inf) -> None:
        self.total, self.seconds, self.done = total, seconds, 0
        self._begin, self._took = time.monotonic(), dict[str, float]()
        self._bar = tqdm(total=total, unit="step", disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @contextmanager
    def step(self, name: str, kind: str = "step") -> Iterator[None]:
        """Everything done inside is one step.

        Raises:
            OutOfTime: naming the kind of step, before it begins.
        """
        begin = time.monotonic()
        if begin - self._begin + self._took.get(kind, 0.0) * 1.1 > self.seconds:
            raise OutOfTime(kind)
        self._bar.set_description(name)
        yield
        self.done += 1
        self._took[kind] = time.monotonic() - begin
        self._bar.update()
        count = str(self.done) if self.total is None else f"{self.done}/{self.total}"
        self._line(f"[{count}] {name}: {self._took[kind]:.1f} s ({time.monotonic() - self._begin:.0f} s in all)")

    def each(self, items: Sequence[Item], name: str) -> Iterator[Item]:
        """The items of a long step: a second bar on a terminal, a line every half minute elsewhere."""
        printed = time.monotonic()
        for count, item in enumerate(tqdm(items, desc=name, delay=2, leave=False, disable=None)):
            if time.monotonic() - printed > _QUIET_SECONDS:
                printed = time.monotonic()
                self._line(f"{name}: {count} of {len(items)}")
            yield item

    def _line(self, text: str) -> None:
        if self._bar.disable:
            click.echo(text, err=True)


class Results:
    """A JSON document that grows, whole in its file after every :meth:`add`; ``file`` None keeps it in memory alone.

    As a context it is marked ``partial`` until the context ends without an error.
    """

    def __init__(self, file: Path | None, document: dict[str, Any]) -> None:
        self.file, self.document = file, document

    def __enter__(self) -> Results:
        self.document["partial"] = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            del self.document["partial"]
            self.add()

    def add(self, **found: Any) -> None:
        """Set fields of the document and write it."""
        self.document.update(found)
        if self.file is not None:
            write_text(self.file, json.dumps(self.document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """At every moment the file is the old one or the new one, whole."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_section(page: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what stands in a page between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Raises:
        click.UsageError: the page has no such place.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(first)
    _, closed, after = rest.partition(last)
    if not found or not closed:
        raise click.UsageError(f"--page: {page} has no lines {first.strip()} and {last}")
    write_text(page, "\n".join([before + first, *lines, "", last + after]))


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """``make()``, once: its tensors, numbers and texts are kept in ``path``."""
    if not path.exists():
        save(path, make())
    return load(path)


def save(path: Path, value: Any) -> None:
    part = path.with_name(f"{path.name}.part")
    torch.save(value, part)
    part.replace(path)


def load(path: Path) -> Any:
    """What :func:`save` wrote: containers, tensors, numbers and texts; nothing else is ever unpickled."""
    return torch.load(path, weights_only=True)


def header(benchmark: str, device: str = "cpu") -> dict[str, Any]:
    """The first fields of a document: which benchmark, when, and on what."""
    return {"benchmark": benchmark, "date": datetime.date.today().isoformat(), "machine": bench.machine(device)}


def dated_name(header: dict[str, Any], *parts: str) -> str:
    """A result's name in a folder of many: the parts and the device in plain letters, and the date."""
    text = " ".join([parts[0], header["machine"]["device"], *parts[1:]])
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") + f"-{header['date']}"


def result_file(out: Path | None, name: str) -> Path | None:
    """``out`` itself where it is a file or is called ``*.json``, else ``NAME.json`` in the folder ``out``."""
    if out is None:
        return None
    if out.is_file() or (out.suffix == ".json" and not out.exists()):
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.resolve()
    return result_folder(out) / f"{name}.json"


def result_folder(out: Path) -> Path:
    """The folder ``out``, made where it is missing; an empty file in its place gives way."""
    if out.is_file() and out.stat().st_size == 0:
        out.unlink()
    if out.exists() and not out.is_dir():
        raise click.UsageError(f"--out: expected a folder, {out} is none")
    out.mkdir(parents=True, exist_ok=True)
    return out


def previous(file: Path | None, benchmark: str) -> dict[str, Any]:
    """The document that is in ``file`` already; empty where there is none or the file is empty.

    Raises:
        click.UsageError: the file holds something else, which is never overwritten.
    """
    text = file.read_bytes() if file is not None and file.exists() else b""
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    # Documents of version 0.1 do not name their benchmark.
    if not isinstance(found, dict) or found.get("benchmark", benchmark) != benchmark:
        raise click.UsageError(f"--out: {file} is not a result of this benchmark ({benchmark}); it is left as it is")
    return found


def begun(
    out: Path | None, benchmark: str, entries: str, settings: Mapping[str, Any] | None = None
) -> tuple[Path | None, dict[str, Any]]:
    """The file of a benchmark that adds entries to a list, and the document that is in it, or begins there.

    Raises:
        click.UsageError: the file holds something else, or entries of other settings.
    """
    file = result_file(out or RESULTS / f"{benchmark}.json", benchmark)
    there = previous(file, benchmark)
    if there and settings is not None and there["settings"] != settings:
        raise click.UsageError(f"--out: {file} has other settings ({there['settings']}); it is left as it is")
    given = {} if settings is None else {"settings": settings}
    return file, {**header(benchmark), **given, entries: [], **there}


def write_table(
    page: Path, out: Path | None, benchmark: str, entries: str, table: Callable[[list[dict[str, Any]]], Sequence[str]]
) -> None:
    """Put the table of a benchmark's entries into a page, between the lines of :func:`write_section`."""
    file = result_file(out or RESULTS / f"{benchmark}.json", benchmark)
    write_section(page, benchmark, table(previous(file, benchmark)[entries]))
    click.echo(f"wrote {page}")


def out_option(existing: str) -> Callable[[Any], Any]:
    """``--out`` of a benchmark; ``existing`` says what happens to a result that is there."""
    text = "JSON file for the results, or a folder where it gets a name of its own; whole after every case. " + existing
    return click.option("--out", type=click.Path(path_type=Path), help=text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
page_option = click.option(
    "--page", type=click.Path(path_type=Path, exists=True), help="Put the tables of the results into this page."
)
seconds_option = click.option(
    "--seconds", default=math.inf, help="Stop before a step that would take longer; run again to go on."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1),
    default=torch.get_num_threads,
    show_default="torch's own",
    help="Threads of torch and of the kernels.",
)


def show(document: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        json.dump(document, sys.stdout, indent=1)
        click.echo()
    else:
        table(document)
