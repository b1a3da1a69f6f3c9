"""What holds of the paper: each of its claims on all the runs that are kept, as one page.

``python -m benchmarks.paper_page --out docs/paper.md`` makes it from ``benchmarks/results`` alone: the runs in ``paper`` and
``rivals``, ``noise_kinds.json``, ``generative.json`` and ``relevance.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks import generative, noise_kinds, protocol, relevance
from benchmarks.paper_tables import Run, claims_of, of_protocol, read_runs

_DIFFERS = (
    "The classifier is a MiniLM of six blocks, fine-tuned by LoRA on query and value for ten epochs; 4,500 training rows "
    "at most, and sst2, cola and mrpc are the only data sets. Under kinds of noise there are 500 rows at most, its last "
    "block alone is trained, for three epochs, and five of the data sets are tables for a small network.",
    "Queries are 500 held-out rows or fewer, and the epoch that is audited is the best of ten on another held-out split.",
    "The classifier's embedding is frozen under LoRA, so embedding and middle layers are compared on causal models alone: "
    "those fine-tuned whole, and those tuned by LoRA, which have LoRA matrices on embedding and head too.",
    "The causal models are small Llamas trained here; what they have learned, their losses say on the page on quality. "
    "A base model has not seen the data set that it is tuned on, which may favour embedding and head.",
    "Runs with the present default train on the same splits; one was retrained without its lowest rows. What it pools "
    "was chosen on four of the data sets under kinds of noise, cola among them.",
    "Of the claims on a query's class those over the middle blocks together were added after the others had been seen.",
    "Whether cancellation predicts accuracy is answered through AUC_NDR: a retraining for each layer group was not run.",
)


@click.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=protocol.RESULTS,
    help="Folder of the results; what is not there is left out.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("docs/paper.md"),
    help="The page; an earlier one is replaced.",
)
def main(results: Path, out: Path) -> None:
    """Write the page of the paper's claims."""

    def entries(name: str, field: str = "runs") -> list[dict[str, Any]]:
        file = results / f"{name}.json"
        return list(json.loads(file.read_text())[field]) if file.exists() else []

    runs, later = ([run for run in read_runs(results / name) if "rows" in run] for name in ("paper", "rivals"))
    text = page_of(runs, later, entries("noise_kinds", "cells"), entries("generative"), entries("relevance"))
    protocol.write_text(out, text)
    click.echo(f"wrote {out}")


def page_of(
    runs: list[Run],
    later: list[Run],
    cells: list[dict[str, Any]],
    spoilt: list[dict[str, Any]],
    tuned: list[dict[str, Any]],
) -> str:
    """The claims in sections: runs by the protocol, later ones with the present default, more noises, causal models."""
    uniform = of_protocol(runs)
    lines = [
        "# What holds of the paper",
        "",
        "The claims of [First is Not Really Better Than Last](https://arxiv.org/abs/2511.04715), on every run that is kept "
        "in `benchmarks/results`. Each line is one difference for each run, its mean, and a 95 % Student interval over "
        "runs. A claim is *held* where the interval lies above 0, *not held* where it lies below, else *undecided*. Runs of "
        "one data set share its rows, so the intervals are narrower than those of new data sets would be. "
        "`python -m benchmarks.paper_page` writes this page.",
    ]
    papers = partial(claims_of, ours=False)
    sections: list[tuple[str, list[dict[str, Any]], Callable[[list[dict[str, Any]]], list[str]]]] = [
        ("Classifiers, uniform flips", uniform, papers),
        ("Classifiers, all kinds of flips", runs, papers),
        ("Classifiers, uniform flips, the present default", of_protocol(later), partial(claims_of, papers=False)),
        ("Classifiers, kinds of noise", cells, noise_kinds.claims),
        ("Causal models, spoilt answers", spoilt, generative.claims),
        ("Causal models tuned by LoRA: a query's class", tuned, relevance.claims),
    ]
    for title, some, claims in sections:
        lines += ["", f"## {title} ({_which(some)})", "", *claims(some)] if some else []
    lines += ["", "## What was run, and where it may differ from the paper", "", *(f"- {text}" for text in _DIFFERS)]
    return "\n".join(lines) + "\n"


def _which(runs: list[dict[str, Any]]) -> str:
    tasks = dict.fromkeys(run["task"] for run in runs)
    return ", ".join(f"{task}: {sum(run['task'] == task for run in runs)} runs" for task in tasks)


if __name__ == "__main__":
    main()
