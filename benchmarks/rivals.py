"""Who ranks best in the runs of ``benchmarks.paper``: the default beside what needs no influence.

Loss, area under the margin and mean loss of the recorded training, self-influence, cleanlab's label quality (by out-of-fold
probabilities of a probe of the pretrained model's states) and the agreement of nearest neighbours::

    python -m benchmarks.paper --task sst2 --epochs 10 --no-checkpoints --arms "" --out benchmarks/results/rivals ...
    python -m benchmarks.rivals
    python -m benchmarks.rivals --page docs/quality.md
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import numpy as np

from benchmarks import protocol
from benchmarks.paper_tables import Run, cell, interval, read_runs
from benchmarks.paper_tasks import DEFAULT
from influence_fast.evaluation.rivals import NEIGHBOURS, PROBE

NAMES = {
    DEFAULT: "the default (`pool`)", ("loss", "", ""): "training loss", ("aum", "", ""): "area under the margin",
    ("mean_loss", "", ""): "mean loss", ("self-influence", "", ""): "self-influence",
    (PROBE, "", ""): "cleanlab, probe of the pretrained states",
    (NEIGHBOURS, "", ""): "agreement of nearest neighbours", ("random", "", ""): "random",
}  # fmt: skip
RIVALS = tuple(key for key in NAMES if key not in (DEFAULT, ("random", "", "")))
BEST = "the best rival of each run, known only afterwards"
Key = tuple[str, str, str]


@click.command()
@click.option(
    "--runs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=protocol.RESULTS / "rivals",
    help="Folder of the runs' JSON files.",
)
@click.option(
    "--page",
    type=click.Path(path_type=Path, exists=True),
    help="Put the tables into this page, where earlier ones are replaced; else they are printed.",
)
def main(runs: Path, page: Path | None) -> None:
    """Make the tables of the finished runs that have every ranking."""
    found = [run for run in read_runs(runs) if "rows" in run and all(key in run["rows"] for key in NAMES)]
    if not found:
        raise click.UsageError(f"--runs: no finished run in {runs} has all of {', '.join(key[0] for key in NAMES)}")
    lines = table_of(found)
    if page is None:
        click.echo("\n".join(lines))
        return
    protocol.write_section(page, "rivals", lines)
    click.echo(f"wrote {page}")


def table_of(runs: list[Run]) -> list[str]:
    """Who is best on each task, first; the default over each rival."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(f"{run['task']}, {run['settings']['kind']}", []).append(run)
    lines = ["| data, flips | runs | best | " + " | ".join(NAMES.values()) + " |"]
    lines += ["|" + "---|" * (3 + len(NAMES))]
    for label, some in groups.items():
        means = {key: float(np.mean([cell(run, *key) for run in some])) for key in NAMES}
        best = max(means, key=lambda key: means[key])
        cells = " | ".join(f"**{means[key]:.3f}**" if key == best else f"{means[key]:.3f}" for key in NAMES)
        lines.append(f"| {label} | {len(some)} | {NAMES[best]} | {cells} |")
    lines += ["", "Differences in AUC_NDR over the runs with uniform flips, with Student intervals over runs:", ""]
    lines += ["| the default over | mean | 95 % interval | runs above 0 |", "|---|---|---|---|"]
    uniform = [run for run in runs if run["settings"]["kind"] == "uniform"]
    for name, keys in [*((NAMES[key], [key]) for key in RIVALS), (BEST, list(RIVALS))]:
        over = [cell(run, *DEFAULT) - max(cell(run, *key) for key in keys) for run in uniform]
        mean, low, high = interval(over)
        between = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "-"
        lines.append(f"| {name} | {mean:+.3f} | {between} | {sum(value > 0 for value in over)} of {len(over)} |")
    return lines


if __name__ == "__main__":
    main()
