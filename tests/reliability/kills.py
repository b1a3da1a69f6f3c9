"""Kill a command at every file operation that it makes, run it again, and compare with one that nobody disturbed.

``python -m tests.reliability.kills --write docs/reliability.md``; a sample is in ``test_kills.py``. An audit hook counts
what changes files within the folder (open for writing, rename, remove, truncate, mkdir) and a wrapper counts ``fsync``.
The process is killed (SIGKILL) right before the operation with a given number. At an ``fsync`` it is also killed after the
file lost its tail, as a file that was not synced may.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from tests.ranks import HEAVY

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [*HEAVY, "influence_fast.auditing.run", "influence_fast.search.influence_index", "tests.models"]
)
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_BEGIN, _END = "<!-- kills -->", "<!-- end of kills -->"


# ------------------------------------------------------------------------------------------------------- what is killed


def _rows(seed: int, count: int) -> list[dict[str, Any]]:
    from tests import models

    return models.rows(count=count, seed=seed)


def _store(path: Path, seed: int, count: int, **settings: Any) -> None:
    import influence_fast as inf
    from tests import models

    given = {"layers": "head,attention[0]", "projection": "rademacher:2x2", "shard_rows": 4, "progress": False}
    ids = [f"row {i}" for i in range(count)]
    rows = settings.pop("dataset", None) or _rows(seed, count)
    inf.build_store(path, models.make("bert"), rows, ids=ids, **{**given, **settings})


def _prepare_nothing(folder: Path) -> None:
    folder.mkdir()


def _prepare_stores(folder: Path) -> None:
    folder.mkdir()
    _store(folder / "train", 1, 10)
    _store(folder / "queries", 2, 5)


def _prepare_damage(folder: Path) -> None:
    """A shard of which a bit has changed, and one that is gone."""
    folder.mkdir()
    _store(folder / "out", 1, 10)
    shards = sorted((folder / "out").glob("shard-*"))
    data = bytearray(shards[0].read_bytes())
    data[-200] ^= 1
    shards[0].write_bytes(data)
    shards[1].unlink()


def _prepare_index(folder: Path) -> None:
    """An index of another metric, which the command replaces."""
    import influence_fast as inf

    _prepare_stores(folder)
    inf.InfluenceIndex.build(inf.GradientStore.open(folder / "train"), "Flat", "cosine", path=folder / "out")


def _prepare_old(folder: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "store-0.1" / "int8" / "train", folder / "out")


def _prepare_alive(folder: Path) -> None:
    """A store that was appended to and lost rows, with an index of what it was at first."""
    import influence_fast as inf

    _prepare_stores(folder)
    inf.InfluenceIndex.build(inf.GradientStore.open(folder / "train"), "Flat", "dot", path=folder / "index")
    append(folder)
    inf.GradientStore.open(folder / "train").delete(["row 3", "new 1"])


def _prepare_compacted(folder: Path) -> None:
    """As :func:`_prepare_alive`, compacted, so that the index is to be built anew."""
    _prepare_alive(folder)
    compact(folder)


def append(folder: Path) -> None:
    import influence_fast as inf
    from tests import models

    given = {"shard_rows": 4, "progress": False, "verify": False}
    inf.append_store(folder / "train", models.make("bert"), _rows(3, 6), ids=[f"new {i}" for i in range(6)], **given)


def stream(folder: Path) -> None:
    _store(folder / "out", 1, 10, dataset=iter(_rows(1, 10)), segment_rows=4, verify=False)


def delete(folder: Path) -> None:
    from influence_fast.cli import main

    _call(main, ["delete", folder / "train", "--ids", "row 0,new 2"])


def compact(folder: Path) -> None:
    from influence_fast.cli import main

    _call(main, ["compact", folder / "train"])


def merge(folder: Path) -> None:
    from influence_fast.cli import main

    # The queries have names of the training rows.
    (folder / "names").write_text("\n".join(f"row {i}" for i in range(5)), encoding="utf-8")
    _call(main, ["delete", folder / "train", "--file", folder / "names"])
    _call(main, ["merge", folder / "train", folder / "queries", "--out", folder / "out"])


def update(folder: Path) -> None:
    from influence_fast.cli import main

    _call(main, ["index", folder / "train", "--out", folder / "index", "--update"])


def build(folder: Path) -> None:
    _store(folder / "out", 1, 10)


def factors(folder: Path) -> None:
    _store(folder / "out", 1, 10, projection="rademacher:4x4", factors=1)


def adam(folder: Path) -> None:
    import torch

    import influence_fast as inf
    from influence_fast.gradients.layers import every_layer
    from tests import models

    draw = torch.Generator().manual_seed(4)
    moments = {
        name: inf.ops.AdamState(
            torch.randn(module.weight.shape, generator=draw), torch.rand(module.weight.shape, generator=draw)
        )
        for name, module in every_layer(models.make("bert"))[0].items()
    }
    _store(folder / "out", 1, 10, adam=moments)


def index(folder: Path) -> None:
    import influence_fast as inf

    inf.InfluenceIndex.build(inf.GradientStore.open(folder / "train"), "Flat", "dot", path=folder / "out")


def curvature(folder: Path) -> None:
    from influence_fast.cli import main

    _call(main, ["index", folder / "train", "--out", folder / "out", "--methods", "datainf,trak"])


def curvature_update(folder: Path) -> None:
    from influence_fast.cli import main

    _call(main, ["index", folder / "train", "--out", folder / "index", "--update", "--methods", "trak"])


def score(folder: Path) -> None:
    from influence_fast.attribution import aggregation
    from influence_fast.cli import main

    aggregation._SAVE_SECONDS = 0
    given = ["--train", folder / "train", "--queries", folder / "queries", "--aggregation", "vote", "--memory", "4096"]
    _call(main, ["score", *given, "--checkpoint", folder / "partial", "--out", folder / "scores.csv"])


def audit(folder: Path) -> None:
    import influence_fast as inf
    from tests import models

    rows = [_rows(1, 9), _rows(2, 5)]
    settings = {"methods": ["dot"], "layers": "head", "projection": "rademacher:2x2"}
    inf.audit(models.make("bert"), *rows, out=folder / "out", progress=False, **settings)


def upgrade(folder: Path) -> None:
    from influence_fast.cli import main

    _call(main, ["upgrade", folder / "out"])


def _call(main: Any, arguments: list[Any]) -> None:
    code = main([str(argument) for argument in arguments], standalone_mode=False)
    if isinstance(code, int) and code:
        raise RuntimeError(f"exit code {code}")


COMMANDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "build": (_prepare_nothing, build),
    "build over damage": (_prepare_damage, build),
    "build --factors": (_prepare_nothing, factors),
    "build --adam": (_prepare_nothing, adam),
    "index": (_prepare_stores, index),
    "index over another": (_prepare_index, index),
    "index --methods": (_prepare_index, curvature),
    "index --update --methods": (_prepare_alive, curvature_update),
    "score": (_prepare_stores, score),
    "upgrade": (_prepare_old, upgrade),
    "audit": (_prepare_nothing, audit),
    "append": (_prepare_stores, append),
    "stream": (_prepare_nothing, stream),
    "delete": (_prepare_alive, delete),
    "compact": (_prepare_alive, compact),
    "merge": (_prepare_alive, merge),
    "index update": (_prepare_alive, update),
    "index update after compact": (_prepare_compacted, update),
}


# ------------------------------------------------------------------------------------------------------------ the killing


class _Killer:
    """Counts file operations within a folder, and ends the process before the one with the number ``at``."""

    def __init__(self, folder: Path, at: int, torn: bool) -> None:
        self.folder, self.left, self.torn = os.path.realpath(folder) + os.sep, at, torn
        self._fsync = os.fsync
        os.fsync = self._syncing
        if not torn:
            sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITING:
                return
        elif event in _EVENTS:
            path = arguments[0]
        else:
            return
        if self._ours(path):
            self._count()

    def _syncing(self, number: Any) -> None:
        file = number if isinstance(number, int) else number.fileno()
        if self._ours(file):
            if not self.torn:
                self._count()
            elif stat.S_ISREG(os.fstat(file).st_mode):
                self.left -= 1
                if self.left < 0:
                    size, name = os.fstat(file).st_size, os.readlink(f"/proc/self/fd/{file}")
                    # What was appended may be torn, what was synced before is there.
                    os.truncate(name, size // 2 if name.endswith(".part") else max(0, size - 7))
                    os.kill(os.getpid(), signal.SIGKILL)
        self._fsync(number)

    def _ours(self, path: Any) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}") if path >= 0 else ""
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        # Locks stay where they are, and their files say nothing.
        return os.path.realpath(name).startswith(self.folder) and not name.endswith(".lock")

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _work(job: Callable[[Path], None], folder: Path, log: Path, at: int | None, torn: bool) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    # Its own lock is a semaphore of the system, which a killed process leaves behind.
    tqdm.set_lock(threading.RLock())
    if at is not None:
        _Killer(folder, at, torn)
    try:
        job(folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _run(job: Callable[[Path], None], folder: Path, log: Path, at: int | None = None, torn: bool = False) -> int:
    log.unlink(missing_ok=True)
    process = _server.Process(target=_work, args=(job, folder, log, at, torn))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{job.__name__} hangs")
    return process.exitcode or 0


class Outcome(NamedTuple):
    """What came of one kill: ``same bytes``, ``other bytes``, ``refused``, ``left over`` or ``half seen``: in between,
    neither the rows of before nor those of after could be read."""

    command: str
    at: int
    torn: bool
    what: str
    detail: str = ""


class Target:
    """A command with what it leaves when nobody disturbs it."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name, self.scratch = name, scratch / name.replace(" ", "-")
        self.scratch.mkdir()
        prepare, self.job = COMMANDS[name]
        self.log = self.scratch / "log"
        self._checked(prepare, self.scratch / "before")
        shutil.copytree(self.scratch / "before", self.scratch / "whole")
        self._checked(self.job, self.scratch / "whole")
        self.expected = contents(self.scratch / "whole")
        self.states = [seen(self.scratch / name) for name in ("before", "whole")]

    def _checked(self, job: Callable[[Path], None], folder: Path) -> None:
        code = _run(job, folder, self.log)
        assert code == 0, self.log.read_text(encoding="utf-8")

    def kill(self, at: int, torn: bool = False) -> Outcome | None:
        """The outcome of a kill at an operation, None where the command makes fewer."""
        folder = self.scratch / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.scratch / "before", folder)
        code = _run(self.job, folder, self.log, at, torn)
        if code == 0:
            return None
        assert code == -signal.SIGKILL, self.log.read_text(encoding="utf-8")
        if (between := seen(folder)) not in self.states:
            return Outcome(self.name, at, torn, "half seen", str(between))
        if _run(self.job, folder, self.log) != 0:
            last = self.log.read_text(encoding="utf-8").strip().splitlines()
            return Outcome(self.name, at, torn, "refused", last[-1] if last else "")
        found = contents(folder)
        extra = sorted(set(found) - set(self.expected))
        if extra:
            return Outcome(self.name, at, torn, "left over", ", ".join(extra))
        other = sorted(name for name in self.expected if found.get(name) != self.expected[name])
        return Outcome(self.name, at, torn, "other bytes" if other else "same bytes", ", ".join(other))

    def kills(self, step: int = 1) -> Iterator[Outcome]:
        """Every ``step``-th kill of either kind."""
        for torn in (False, True):
            at = 0
            while (outcome := self.kill(at, torn)) is not None:
                yield outcome
                at += step


def seen(folder: Path) -> str:
    """What a reader finds in the store that was there before: a hash of its rows and names, or the error."""
    import influence_fast as inf

    if not (folder / "train").exists():
        return ""
    try:
        store = inf.GradientStore.open(folder / "train")
        digest = hashlib.sha256(repr(list(store.ids)).encode())
        for name in store.layers:
            digest.update(store.read(name).numpy().tobytes())
    except inf.InfluenceError as error:
        return str(error)
    return digest.hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but locks; of reports what does not depend on the clock, of an index what its files are called."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.endswith(".lock"):
            continue
        data, name = path.read_bytes(), str(path.relative_to(folder))
        if path.suffix == ".html":
            data = re.sub(rb"[\d.]+ s\b", b"", data)
        # An index that replaces another takes names that are free, and its seal is over the names.
        if path.name == "index.json":
            data = re.sub(rb'(scan|curvature)-\d+|"seal": "\w+"', b"", data)
        if numbered := re.fullmatch(r"(.*(?:scan|curvature))-\d+(.*)", name):
            kind, end = numbered.groups()
            name = f"{kind}-{sum(other.startswith(f'{kind}-') for other in found)}{end}"
        found[name] = data
    return found


_KINDS = ("same bytes", "other bytes", "left over", "refused", "half seen")


def counts(outcomes: list[Outcome]) -> dict[str, Counter[str]]:
    """What came of the kills of each command, and how often."""
    found: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.command, Counter())[outcome.what] += 1
    return found


def table(found: dict[str, Counter[str]]) -> str:
    """Counts by command, as Markdown."""
    lines = [f"| command | kills | {' | '.join(_KINDS)} |", "| --- |" + " ---: |" * (len(_KINDS) + 1)]
    for command, of in sorted(found.items(), key=lambda item: list(COMMANDS).index(item[0])):
        cells = [str(of.total()), *(str(of[kind]) for kind in _KINDS)]
        lines.append(f"| {command} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _counts_in(text: str) -> dict[str, Counter[str]]:
    """Counts of a table, of commands that there still are."""
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|"))
    return {
        command: Counter(dict(zip(_KINDS, map(int, cells), strict=True)))
        for command, _, *cells in rows
        if command in COMMANDS
    }


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(COMMANDS)), help="Commands; all by default.")
@click.option("--every", default=1, show_default=True, help="Of the operations, every so many.")
@click.option("--write", type=click.Path(path_type=Path), help="Put the counts into this page.")
def main(only: tuple[str, ...], every: int, write: Path | None) -> None:
    """Kill commands at their file operations, run them again, and count what comes of it."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in only or COMMANDS:
            begin = time.monotonic()
            for outcome in Target(name, Path(scratch)).kills(every):
                outcomes.append(outcome)
                if outcome.what != "same bytes":
                    torn = ", torn" if outcome.torn else ""
                    click.echo(f"{name} killed at operation {outcome.at}{torn}: {outcome.what} {outcome.detail}")
            click.echo(f"{name}: {time.monotonic() - begin:.0f} s", err=True)
            if write is not None:
                _write(write, counts(outcomes))
    click.echo(table(counts(outcomes)))
    sys.exit(any(outcome.what != "same bytes" for outcome in outcomes))


def _write(path: Path, found: dict[str, Counter[str]]) -> None:
    """Put counts into a page; those of other commands stay."""
    page = path.read_text(encoding="utf-8") if path.exists() else "# Reliability\n"
    if _BEGIN not in page:
        about = "Killed at every file operation, and run again (`python -m tests.reliability.kills`)"
        page += f"\n## Kills\n\n{about}:\n\n{_BEGIN}\n{_END}\n"
    before, rest = page.split(_BEGIN, 1)
    known, after = rest.split(_END, 1)
    path.write_text(f"{before}{_BEGIN}\n{table({**_counts_in(known), **found})}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    # Under its own name, so that the processes that do the work can find the jobs.
    from tests.reliability.kills import main as run

    run()
