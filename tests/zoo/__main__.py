"""``python -m tests.zoo``: run the cases that have no result of this code yet, print the counts, write the page.

Exit code 1 where a case gave wrong numbers and said nothing.
"""

from __future__ import annotations

import os

# Before torch: cases are tiny, and several processes share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sys
from pathlib import Path

import click

from . import run, situations
from .page import page, silent_errors, summary


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--write", type=click.Path(path_type=Path), help="Write the page here.")
@click.option("--only", multiple=True, metavar="NAME", help="A family, tuner or situation; may be given several times.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(run.MAKERS)), help="Cases of this kind alone.")
@click.option("--outcome", "outcomes", multiple=True, help="Cases that had this outcome before, again.")
@click.option("--missing", is_flag=True, help="Cases without any result, also of other code.")
@click.option("--again", is_flag=True, help="Run cases that have a result of this code already.")
@click.option("--jobs", default=1, show_default=True, help="Processes at a time.")
@click.option("--results", type=click.Path(path_type=Path), default=run.RESULTS, help="Where outcomes are kept.")
@click.option("--seconds", default=120.0, show_default=True, help="Most time of one case.")
def main(
    write: Path | None,
    only: tuple[str, ...],
    kinds: tuple[str, ...],
    outcomes: tuple[str, ...],
    missing: bool,
    again: bool,
    jobs: int,
    results: Path,
    seconds: float,
) -> None:
    """Capture against the literal loop on every family, adapter and situation."""
    kept = run.read(results)
    kept["versions"] = run.versions()
    everything = run.groups()
    known = {f"{group.kind}/{group.name}/{part}" for group in everything for part in group.parts}
    kept["total"] = len(known)
    kept["cases"] = {key: case for key, case in kept["cases"].items() if key in known}
    chosen = run.unfinished(run.groups(only, kinds or tuple(run.MAKERS)), kept, again, missing, outcomes)
    total = sum(len(group.parts) for group in chosen)
    for done, (group, part, outcome) in enumerate(run.outcomes(chosen, jobs, seconds), 1):
        kept["cases"][f"{group.kind}/{group.name}/{part}"] = outcome | {"code": run.code_digest()}
        error = f" {outcome['error']:.1e}" if "error" in outcome else ""
        said = f": {outcome['sentence']}" if outcome.get("sentence") else ""
        click.echo(f"[{done}/{total}] {group.name} {part} {outcome['outcome']}{error}{said}", err=True)
        run.write(kept, results)
    run.write(kept, results)
    wrong = silent_errors(kept)
    click.echo(summary(kept))
    click.echo(f"silent errors: {len(wrong)}{''.join(f'{chr(10)}  {key}' for key in wrong)}")
    if write:
        write.write_text(page(kept, situations.texts()), encoding="utf-8")
    sys.exit(bool(wrong))


main()
