"""Runs cases, each group in a process of its own with a limit of time, and keeps what came of them as they come."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401 (loaded once, before processes are forked)

import influence_fast
from influence_fast.gradients import build  # noqa: F401 (likewise)

from . import adapters, cases, situations
from .check import Outcome, check, sentence

RESULTS = Path(__file__).parent / "results.json"


@dataclass(frozen=True)
class Group:
    """Cases of one process: a family and its tasks, a tuner and its models, or some situations."""

    kind: str
    name: str
    parts: tuple[str, ...]

    def outcome(self, part: str) -> Outcome:
        """What comes of one case; a model that cannot be made is an outcome too."""
        try:
            case = MAKERS[self.kind](self.name, part)
        except Exception as error:
            return Outcome("not built", sentence=f"{type(error).__name__}: {sentence(error)}")
        return check(case)


MAKERS: dict[str, Callable[[str, str], Any]] = {
    "family": cases.family_case,
    "adapter": adapters.adapter_case,
    "situation": situations.situation_case,
}


def groups(only: Sequence[str] = (), kinds: Sequence[str] = tuple(MAKERS)) -> list[Group]:
    """All groups, or those of the names (or ``kind``) given."""
    found = [Group("family", family, tuple(cases.tasks_of(family))) for family in cases.all_families()]
    found += [Group("adapter", tuner, adapters.bases_of(tuner)) for tuner in adapters.TUNERS]
    found += [Group("situation", name, ("",)) for name in situations.SITUATIONS]
    return [group for group in found if group.kind in kinds and (not only or group.name in only)]


def _work(group: Group, parts: Sequence[str], pipe: Connection) -> None:
    # What a library prints while a model is made is nothing for whoever reads the progress.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for part in parts:
        pipe.send((part, group.outcome(part).as_dict()))
    pipe.close()


def outcomes(chosen: Sequence[Group], jobs: int, seconds: float) -> Iterator[tuple[Group, str, dict[str, Any]]]:
    """Outcomes as they come. A case that takes longer than ``seconds``, or ends its process, is said to have done so."""
    context = multiprocessing.get_context("fork")
    waiting = [(group, list(group.parts)) for group in chosen][::-1]
    running: list[dict[str, Any]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            group, parts = waiting.pop()
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(group, parts, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append({"group": group, "left": parts, "pipe": mine, "process": process, "since": time.monotonic()})
        multiprocessing.connection.wait([task["pipe"] for task in running], timeout=1)
        for task in list(running):
            group, ended = task["group"], ""
            try:
                while task["left"] and task["pipe"].poll():
                    part, outcome = task["pipe"].recv()
                    task["left"].remove(part)
                    task["since"] = time.monotonic()
                    yield group, part, outcome
            except EOFError:
                task["process"].join()
                ended = f"its process ended with {task['process'].exitcode}"
            if not ended and task["left"] and time.monotonic() - task["since"] > seconds:
                task["process"].kill()
                ended = f"it took more than {seconds:g} s"
            if ended and task["left"]:
                part = task["left"].pop(0)
                yield group, part, Outcome("not finished", sentence=ended).as_dict()
                if task["left"]:
                    waiting.append((group, task["left"]))
            if ended or not task["left"]:
                task["process"].join()
                task["pipe"].close()
                running.remove(task)


@functools.cache
def code_digest() -> str:
    """What a result depends on of the package and of the zoo, in short."""
    digest = hashlib.sha256()
    package, here = Path(influence_fast.__file__).parent, Path(__file__).parent
    files = [file for folder in ("gradients", "data", "ops") for file in sorted((package / folder).rglob("*.py"))]
    for file in [*files, *(here / f"{name}.py" for name in ("check", "cases", "configs", "adapters", "situations"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}


def unfinished(
    chosen: Sequence[Group],
    results: dict[str, Any],
    again: bool = False,
    missing: bool = False,
    outcomes: Sequence[str] = (),
) -> list[Group]:
    """The groups with the cases that have no result of this code; with ``missing`` those that have none at all, with
    ``outcomes`` those that ended so before."""

    def wanted(key: str) -> bool:
        case = results["cases"].get(key, {})
        if outcomes:
            return case.get("outcome") in outcomes
        if missing:
            return not case
        return again or case.get("code") != code_digest()

    found = []
    for group in chosen:
        parts = tuple(part for part in group.parts if wanted(f"{group.kind}/{group.name}/{part}"))
        if parts:
            found.append(Group(group.kind, group.name, parts))
    return found


def read(path: Path = RESULTS) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"versions": {}, "total": 0, "cases": {}}


def write(results: dict[str, Any], path: Path = RESULTS) -> None:
    """One case a line, sorted, so that a change is seen in a diff."""
    lines = [f"{json.dumps(key)}: {json.dumps(case)}" for key, case in sorted(results["cases"].items())]
    heads = {name: results[name] for name in ("versions", "total")}
    text = f'{{\n{json.dumps(heads)[1:-1]},\n"cases": {{\n' + ",\n".join(lines) + "\n}\n}\n"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
