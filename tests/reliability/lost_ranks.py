"""Builds of several processes of which one is killed at a random moment: ``python -m tests.reliability.lost_ranks``.

The others end as under ``torchrun``; the store that is there then opens whole or not at all, and a second run ends in the
bytes that one process writes, whichever rank was lost and however often.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

import influence_fast as inf
from influence_fast import _distributed as processes

# The processes that ``ranks`` forks find the tests' helpers by their plain names.
sys.path[:0] = [str(Path(__file__).parents[1])]

import integers  # noqa: E402
from ranks import run_ranks  # noqa: E402

ROWS = 60


def build(path: Path) -> None:
    """A store of integers, whose bytes do not depend on who computed which rows."""
    model, rows = integers.IntegerModel(), integers.integer_rows(ROWS)
    with processes.joined():
        inf.build_store(
            path,
            model,
            rows,
            "all",
            "rademacher:4x4",
            integers.integer_loss,
            batch_tokens=24,
            shard_rows=2,
            progress=False,
        )


def files(path: Path) -> dict[str, bytes]:
    """What a store is made of; lock files stay behind and hold nothing."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if not p.name.endswith(".lock")}


def losses(folder: Path, rounds: int, ranks: int, seed: int) -> Iterator[str]:
    """Of each round what came of it: ``same bytes``, and how far the build was; anything else is a fault."""
    log, alone = folder / "log", folder / "alone"
    assert run_ranks(build, alone, log=log, ranks=1) == 0, log.read_text(encoding="utf-8")
    wanted = files(alone)
    begin = time.monotonic()
    assert run_ranks(build, folder / "whole", log=log, ranks=ranks) == 0, log.read_text(encoding="utf-8")
    longest = time.monotonic() - begin
    if files(folder / "whole") != wanted:
        yield "other bytes without a kill"
    draw = random.Random(seed)
    for number in range(rounds):
        path = folder / f"store-{number}"
        yield _round(path, log, wanted, ranks, draw, longest)


def _round(path: Path, log: Path, wanted: dict[str, bytes], ranks: int, draw: random.Random, longest: float) -> str:
    before = "nothing begun"
    # Twice: what a second loss finds is half a store.
    for _ in range(2):
        run_ranks(build, path, log=log, ranks=ranks, kill=(draw.randrange(ranks), draw.uniform(0.2, 1) * longest))
        if not path.exists() or not any(path.glob("*.safetensors")):
            continue
        try:
            whole = len(inf.GradientStore.open(path)) == ROWS
        except inf.StoreError as error:
            if "unfinished" not in str(error) and "no gradient store" not in str(error):
                return f"a damaged store: {error}"
            before = "half a store"
        else:
            there = files(path)
            others = {name for name in {*there, *wanted} if there.get(name) != wanted.get(name)}
            # Lines of the journal come as shards are done; the last thing that a build does is to put them in order.
            if not whole or others - {"journal", "journal.part"}:
                return f"opened {'other files' if whole else 'half a store'}: {', '.join(sorted(others))}"
            before = "all rows there, their journal in another order" if others else "finished before the kill"
    code = run_ranks(build, path, log=log, ranks=ranks)
    if code:
        return f"exit code {code} of the run after it"
    return f"same bytes ({before})" if files(path) == wanted else "other bytes"


@click.command()
@click.option("--rounds", default=50, show_default=True, help="Builds, each of which loses a process twice.")
@click.option("--ranks", default=4, show_default=True, help="Processes of a build.")
@click.option("--seed", default=0, show_default=True)
def main(rounds: int, ranks: int, seed: int) -> None:
    """Kill a random process of a build at random moments, run it again, and count what comes of it."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Counter(losses(Path(folder), rounds, ranks, seed))
    for outcome, count in counts.most_common():
        click.echo(f"{count} of {rounds}: {outcome}")
    sys.exit(not all(outcome.startswith("same bytes") for outcome in counts))


if __name__ == "__main__":
    main()
