"""Long runs: ``python -m tests.reliability --minutes 30 --write docs/reliability.md``."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

import click

from tests.reliability import corruption

_BEGIN, _END = "<!-- corruption -->", "<!-- end of corruption -->"
_STEP = 5000


@click.command()
@click.option("--minutes", default=30.0, show_default=True, help="Stop after this time, or after --count.")
@click.option("--count", default=100_000, show_default=True, help="Changes, a quarter of them read with checks off.")
@click.option("--first", default=0, help="Number of the first change.")
@click.option("--seed", default=0, show_default=True)
@click.option("--no-verify", is_flag=True, help="All of them read with checks off.")
@click.option("--write", type=click.Path(path_type=Path), help="Put the counts into this page.")
def main(minutes: float, count: int, first: int, seed: int, no_verify: bool, write: Path | None) -> None:
    """Damage files, read them back, and count what comes of it."""
    begin = time.monotonic()
    totals: dict[bool, Counter[tuple[str, str]]] = {True: Counter(), False: Counter()}
    number, last = first, first + count
    while number < last and time.monotonic() - begin < 60 * minutes:
        step = min(_STEP, last - number)
        checked = not no_verify and number // _STEP % 4 != 3
        for how, outcome, file, detail, which in corruption.run(seed, number, step, checked):
            totals[checked][how, outcome] += 1
            # Without checks other numbers are what was asked for.
            fine = outcome == "silent wrong" and not checked
            if outcome not in ("right error", "same numbers") and not fine:
                click.echo(f"{which}: {how} of {file}: {outcome} {detail}")
        number += step
        click.echo(f"{number - first:,} changes in {time.monotonic() - begin:,.0f} s", err=True)
    text = report(totals, seed)
    click.echo(text)
    if write is not None:
        page = write.read_text(encoding="utf-8") if write.exists() else f"# Reliability\n\n{_BEGIN}\n{_END}\n"
        found = re.sub(f"{_BEGIN}.*?{_END}", lambda _: f"{_BEGIN}\n{text}\n{_END}", page, flags=re.S)
        write.write_text(found, encoding="utf-8")


def report(totals: dict[bool, Counter[tuple[str, str]]], seed: int) -> str:
    """Both tables."""
    parts = []
    for checked, title in ((True, "Checked, as by default"), (False, "With `--no-verify`")):
        if totals[checked]:
            made = sum(totals[checked].values())
            parts.append(f"{title}: {made:,} changes (seed {seed}).\n\n{corruption.table(totals[checked])}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
