"""What needs no influence, on the very splits and flips of the runs of ``benchmarks.paper``: who ranks best, by how much.

The split of every finished classification run in ``benchmarks/results/paper`` is drawn again, and the run's own ``random``
ranking is held against it, so that another draw of flips cannot pass for the run's. cleanlab's label quality (by out-of-fold
probabilities by a probe of the pretrained model's states) and the neighbours' agreement stand beside the loss and the
default that the run recorded::

    python -m benchmarks.rivals --model MODEL_DIR --data DATA_DIR
    python -m benchmarks.rivals --page docs/quality.md
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import influence_fast as inf
from benchmarks import protocol
from benchmarks.paper_tables import interval
from benchmarks.paper_tasks import DEFAULT, encoded, make_split
from influence_fast.attribution.representations import neighbour_count
from influence_fast.evaluation.rivals import has_cleanlab, label_rivals

RECORDED = {"default": DEFAULT, "loss": ("loss", "", ""), "self-influence": ("self-influence", "", "")}
SHOWN = {
    "default": "the default (`pool`)", "loss": "training loss", "self-influence": "self-influence",
    "cleanlab probe": "cleanlab, probe of the pretrained states", "neighbours agree": "agreement of nearest neighbours",
    "random": "random",
}  # fmt: skip


@click.command()
@click.option("--model", help="Folder of the pretrained encoder that the runs took.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of the data sets, one folder each.")
@click.option(
    "--runs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=protocol.RESULTS / "paper",
    help="Folder of the runs' JSON files.",
)
@protocol.out_option("A run that is in it stays as it is, others are added.")
@click.option(
    "--page", type=click.Path(path_type=Path, exists=True), help="Put the table of the results into this page."
)
@protocol.threads_option
def main(model: str | None, data: Path | None, runs: Path, out: Path | None, page: Path | None, threads: int) -> None:
    """Score rivals on the splits of the runs there are."""
    torch.set_num_threads(threads)
    if page is not None:
        protocol.write_table(page, out, "rivals", "runs", table_of)
        return
    if model is None or data is None:
        raise click.UsageError("--model and --data are needed (or --page).")
    if not has_cleanlab():
        raise click.UsageError("cleanlab is not installed; pip install cleanlab")
    file, document = protocol.begun(out, "rivals", "runs")
    done = {run["run"] for run in document["runs"]}
    # Uniform flips first, seed by seed: what is there after a stop is of all tasks.
    every = sorted(
        runs.glob("*.json"), key=lambda path: ("uniform" not in path.stem, path.stem.rpartition("seed")[2], path.stem)
    )
    waiting = [path for path in every if path.stem not in done]
    with protocol.Results(file, document) as results, protocol.Progress(len(waiting)) as progress:
        for path in waiting:
            recorded = json.loads(path.read_text())
            if "rows" not in recorded or "partial" in recorded:
                continue
            with progress.step(path.stem):
                document["runs"].append({"run": path.stem, **scored(recorded, model, data)})
            results.add()
    click.echo(f"wrote {file}")


def scored(run: dict[str, Any], model: str, data: Path) -> dict[str, Any]:
    """AUC_NDR and NDR@30 of what the run recorded and of the rivals on its split.

    Raises:
        click.ClickException: the split is not the one that the run saw.
    """
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    begin = time.monotonic()
    split = make_split(run["task"], run["seed"], {**run["settings"], "data": str(data)})
    noise = torch.tensor([row["noise"] for row in split["train"]])
    rows = {(row["method"], row["group"], row["aggregation"]): row for row in run["rows"]}
    random = torch.rand(len(noise), generator=torch.Generator().manual_seed(run["seed"]), dtype=torch.float64)
    redrawn, seen = inf.ndr_auc(random, noise), rows["random", "", ""]["auc_ndr"]
    if int(noise.sum()) != run["noisy"] or abs(redrawn - seen) > 1e-9:
        raise click.ClickException(f"another split than the run's: random has AUC_NDR {redrawn}, the run's {seen}")
    labels = [row["label"] for row in split["train"]]
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    states = inf.hidden_states(base.eval(), encoded(model, split["train"]), "mean", progress=False)
    every, last = torch.cat(list(states.values()), 1), list(states)[-1]
    agreement = inf.neighbours({last: states[last]}, labels, neighbour_count(len(labels)))[last][0]
    probe = inf.probe_estimate(every, labels, every[:1])[0]
    found = {name: rows[key] for name, key in {**RECORDED, "random": ("random", "", "")}.items() if key in rows}
    out = {name: {"auc_ndr": row["auc_ndr"], "ndr@30": row["ndr@30"]} for name, row in found.items()}
    for name, values in label_rivals(labels, agreement, probe).items():
        out[name] = {"auc_ndr": inf.ndr_auc(values, noise), "ndr@30": inf.ndr(values, noise, 0.3)}
    return {
        "task": run["task"], "kind": run["settings"]["kind"], "seed": run["seed"], "samples": len(noise),
        "noisy": int(noise.sum()), "seconds": time.monotonic() - begin, "scores": out,
    }  # fmt: skip


def table_of(runs: list[dict[str, Any]]) -> list[str]:
    """Who is best on each task, first; the default against the loss and against the best rival."""
    names, lines = list(SHOWN), []
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(f"{run['task']}, {run['kind']}", []).append(run)
    rivals = [name for name in names if name not in ("default", "random")]
    lines += ["| data, flips | runs | best | " + " | ".join(SHOWN[name] for name in names) + " |"]
    lines += ["|" + "---|" * (3 + len(names))]
    for label, some in groups.items():
        means = {name: mean_of(some, name) for name in names}
        best = max(means, key=lambda name: means[name])
        cells = " | ".join(f"**{means[n]:.3f}**" if n == best else f"{means[n]:.3f}" for n in names)
        lines.append(f"| {label} | {len(some)} | {SHOWN[best]} | {cells} |")
    lines += ["", "Differences in AUC_NDR over the runs with uniform flips, with Student intervals over runs:", ""]
    lines += ["| the default over | mean | 95 % interval | runs above 0 |", "|---|---|---|---|"]
    uniform = [run for run in runs if run["kind"] == "uniform"]
    for title, some in (
        ("", uniform),
        (" (uniform flips, seed 2 alone)", [run for run in uniform if run["seed"] == 2]),
    ):
        for rival in [*rivals, "best"] if some else []:
            over = [auc(run, "default") - against(run, rival, rivals) for run in some]
            mean, low, high = interval(over)
            between = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "-"
            name = "the best rival of each run, known only afterwards" if rival == "best" else SHOWN[rival]
            above = f"{sum(value > 0 for value in over)} of {len(over)}"
            lines.append(f"| {name}{title} | {mean:+.3f} | {between} | {above} |")
    return lines


def auc(run: dict[str, Any], name: str) -> float:
    return float(run["scores"][name]["auc_ndr"])


def mean_of(runs: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([auc(run, name) for run in runs]))


def against(run: dict[str, Any], rival: str, rivals: list[str]) -> float:
    return max(auc(run, name) for name in rivals) if rival == "best" else auc(run, rival)


if __name__ == "__main__":
    main()
