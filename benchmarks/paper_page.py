"""What holds of the paper: each of its claims on all the runs that are kept, as one page.

``python -m benchmarks.paper_page --out docs/paper.md`` makes it from ``benchmarks/results/paper``,
``benchmarks/results/generative.json`` and ``benchmarks/results/relevance.json`` alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks import generative, protocol, relevance
from benchmarks.paper_tables import Run, claims_of, of_protocol, read_runs

_DIFFERS = (
    "The classifier is a MiniLM of six blocks, fine-tuned by LoRA on query and value for ten epochs; 4,500 training rows "
    "at most, and sst2, cola and mrpc are the only data sets.",
    "Queries are 500 held-out rows or fewer, and the epoch that is audited is the best of ten on another held-out split.",
    "The classifier's embedding is frozen under LoRA, so embedding and middle layers are compared on causal models alone: "
    "those fine-tuned whole, and those tuned by LoRA, which have LoRA matrices on embedding and head too.",
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
    "--relevance",
    "lora",
    type=click.Path(path_type=Path),
    default=protocol.RESULTS / "relevance.json",
    help="Result of benchmarks.relevance; left out where there is none.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("docs/paper.md"),
    help="The page; an earlier one is replaced.",
)
def main(runs: Path, other: Path, lora: Path, out: Path) -> None:
    """Write the page of the paper's claims."""
    found = [run for run in read_runs(runs) if "rows" in run]
    spoilt, tuned = (json.loads(file.read_text())["runs"] if file.exists() else [] for file in (other, lora))
    protocol.write_text(out, page_of(found, spoilt, tuned))
    click.echo(f"wrote {out}")


def page_of(runs: list[Run], spoilt: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> str:
    """Claims over the runs with uniform flips, over all classification runs, and over those of causal models."""
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
    if spoilt:
        lines += ["", f"## Causal models, spoilt answers ({_which(spoilt)})", "", *generative.claims(spoilt)]
    if tuned:
        lines += [
            "",
            f"## Causal models tuned by LoRA: a query's class ({_which(tuned)})",
            "",
            *relevance.claims(tuned),
        ]
    lines += ["", "## What was run, and where it may differ from the paper", "", *(f"- {text}" for text in _DIFFERS)]
    return "\n".join(lines) + "\n"


# The first of the claims, in their order, are the paper's; the rest are ours.
_PAPER_CLAIMS = 7


def _which(runs: list[dict[str, Any]]) -> str:
    tasks = dict.fromkeys(run["task"] for run in runs)
    return ", ".join(f"{task}: {sum(run['task'] == task for run in runs)} runs" for task in tasks)


if __name__ == "__main__":
    main()
