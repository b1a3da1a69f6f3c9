"""What holds of the paper: each of its claims on all the runs that are kept, as one page.

``python -m benchmarks.paper_page --out docs/paper.md`` makes it from ``benchmarks/results`` alone: the runs in ``paper``,
``noise_kinds.json`` and ``generative.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks import generative, noise_kinds, protocol
from benchmarks.paper_tables import Run, claims_of, of_protocol, read_runs

_DIFFERS = (
    "The classifier is a MiniLM of six blocks, fine-tuned by LoRA on query and value for ten epochs; 4,500 training rows "
    "at most, and sst2, cola and mrpc are the only data sets.",
    "Queries are 500 held-out rows or fewer, and the epoch that is audited is the best of ten on another held-out split.",
    "The embedding is frozen under LoRA, so embedding and middle layers are compared on the generative runs alone, where a "
    "small Llama is fine-tuned whole.",
    "The causal models are small Llamas trained here; what they have learned, their losses say on the page on quality.",
    "Lines that begin with *Ours* are of an earlier pool, before its estimates were stacked; what the present one gains "
    "is on the page on quality.",
    "Whether cancellation predicts accuracy is answered through AUC_NDR: a retraining for each layer group was not run.",
)


@click.command()
@click.option(
    "--runs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=protocol.RESULTS / "paper",
    help="Folder of the runs of benchmarks.paper.",
)
@click.option(
    "--generative",
    "other",
    type=click.Path(path_type=Path),
    default=protocol.RESULTS / "generative.json",
    help="Result of benchmarks.generative; left out where there is none.",
)
@click.option(
    "--noise",
    type=click.Path(path_type=Path),
    default=protocol.RESULTS / "noise_kinds.json",
    help="Result of benchmarks.noise_kinds; left out where there is none.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("docs/paper.md"),
    help="The page; an earlier one is replaced.",
)
def main(runs: Path, other: Path, noise: Path, out: Path) -> None:
    """Write the page of the paper's claims."""
    found = [run for run in read_runs(runs) if "rows" in run]
    spoilt: list[dict[str, Any]] = json.loads(other.read_text())["runs"] if other.exists() else []
    cells: list[dict[str, Any]] = json.loads(noise.read_text())["cells"] if noise.exists() else []
    protocol.write_text(out, page_of(found, cells, spoilt))
    click.echo(f"wrote {out}")


def page_of(runs: list[Run], cells: list[dict[str, Any]], spoilt: list[dict[str, Any]]) -> str:
    """Claims over the runs with uniform flips, over all runs by the protocol, over more noises, over the generative ones."""
    uniform = of_protocol(runs)
    lines = [
        "# What holds of the paper",
        "",
        "The claims of [First is Not Really Better Than Last](https://arxiv.org/abs/2511.04715), on every run that is kept "
        "in `benchmarks/results`. Each line is one difference for each run, its mean, and a 95 % Student interval over "
        "runs. A claim is *held* where the interval lies above 0, *not held* where it lies below, else *undecided*. Runs of "
        "one data set share its rows, so the intervals are narrower than those of new data sets would be. "
        "`python -m benchmarks.paper_page` writes this page.",
        "",
        f"## Classifiers, uniform flips ({_which(uniform)})",
        "",
        *claims_of(uniform),
        "",
        f"## Classifiers, all kinds of flips ({_which(runs)})",
        "",
        *claims_of(runs)[: 2 + _PAPER_CLAIMS],
    ]
    if cells:
        lines += [
            "",
            f"## Classifiers, kinds of noise ({', '.join(dict.fromkeys(cell['task'] for cell in cells))})",
            "",
            *noise_kinds.claims(cells),
        ]
    if spoilt:
        lines += ["", f"## Causal models, spoilt answers ({_which(spoilt)})", "", *generative.claims(spoilt)]
    lines += ["", "## What was run, and where it may differ from the paper", "", *(f"- {text}" for text in _DIFFERS)]
    return "\n".join(lines) + "\n"


# The first of the claims, in their order, are the paper's; the rest are ours.
_PAPER_CLAIMS = 7


def _which(runs: list[dict[str, Any]]) -> str:
    tasks = dict.fromkeys(run["task"] for run in runs)
    return ", ".join(f"{task}: {sum(run['task'] == task for run in runs)} runs" for task in tasks)


if __name__ == "__main__":
    main()
