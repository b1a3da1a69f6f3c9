"""The self-check beside the truth: AUC_NDR by planted flips against that of flips that the model was trained on.

The small network of ``benchmarks.noise_tasks`` learns scikit-learn's tables with a share of the labels flipped, for few
epochs and for many, which learn the flips by heart. ``inf.audit(..., self_check=0.05)`` plants flips in a copy that the
model never saw; beside what it says stands how well the flips that were there are found, which the audit does not know. A
third figure comes of a network that was trained on labels with planted flips: what a user does who trains once more.
``--audits DIR`` adds the runs of ``benchmarks.audit_sst2`` in its ``--work``: sentences, LoRA::

    python -m benchmarks.self_check_truth
    python -m benchmarks.self_check_truth --audits audit-runs
    python -m benchmarks.self_check_truth --page docs/quality.md
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

import influence_fast as inf
from benchmarks import protocol
from benchmarks.noise_tasks import fit, table_rows
from influence_fast.auditing.result import AuditResult
from influence_fast.data import label_noise

# Not wine: of its rows fewer than 50 can be trusted ones.
TASKS, FLIPS, EPOCHS = ("digits", "breast cancer"), (0.1, 0.2), (30, 300)
PLANTED = 0.05
PARTS = ("auc_ndr", "low", "high")
RANKINGS = {"default": "the default", "loss": "the loss"}


@click.command()
@protocol.out_option("A run that is in it stays as it is, others are added.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=500, show_default=True, help="Training rows at most.")
@click.option("--trusted", default=100, show_default=True, help="Trusted rows at most.")
@click.option(
    "--audits", type=click.Path(path_type=Path, exists=True), help="--work of benchmarks.audit_sst2, for its runs too."
)
@protocol.page_option
@protocol.threads_option
def main(out: Path | None, seeds: int, audits: Path | None, page: Path | None, threads: int, **settings: Any) -> None:
    """Hold self-checks against flips that are known."""
    torch.set_num_threads(threads)
    if page is not None:
        protocol.write_table(page, out, "self_check_truth", "runs", table_of)
        return
    file, document = protocol.begun(out, "self_check_truth", "runs", settings)
    wanted: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed, task, flips, epochs in itertools.product(range(seeds), TASKS, FLIPS, EPOCHS):
        name = f"{task}, {flips:.0%} flips, {epochs} epochs, seed {seed}"
        wanted[name] = partial(of_table, task, flips, epochs, seed, settings)
    for folder in sorted(audits.glob("seed*")) if audits else []:
        wanted[f"sst2, LoRA, {folder.name.replace('seed', 'seed ')}"] = partial(of_audit, folder)
    done = {run["run"] for run in document["runs"]}
    with protocol.Results(file, document) as results, protocol.Progress(len(wanted)) as progress:
        for name, make in wanted.items():
            if name not in done:
                with progress.step(name):
                    document["runs"].append({"run": name, "task": name.partition(",")[0], **make()})
                results.add()
    click.echo(f"wrote {file}")


def of_table(task: str, flips: float, epochs: int, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One self-check on a table of numbers."""
    x, y = table_rows(task)
    classes = int(y.max()) + 1
    order = np.random.default_rng([seed, 3]).permutation(len(y))
    asked = order[: min(settings["trusted"], len(y) // 4)]
    rows = order[len(asked) :][: settings["samples"]]
    labels, noise = label_noise.uniform(y[rows].tolist(), flips, classes, seed)
    given = [{"input_ids": row.tolist(), "labels": int(label)} for row, label in zip(x[rows], labels, strict=True)]
    queries = [{"input_ids": x[i].tolist(), "labels": int(y[i])} for i in asked]
    model, _ = fit(given, classes, seed, epochs)
    with torch.no_grad():
        learned = model(torch.from_numpy(x[rows])).logits.argmax(1) == torch.tensor(labels)
    result = inf.audit(model, given, queries, progress=False, seed=seed, self_check=PLANTED)
    copy, planted = label_noise.uniform(labels, PLANTED, classes, seed + 1000)
    changed = [{**row, "labels": label} for row, label in zip(given, copy, strict=True)]
    other = inf.audit(fit(changed, classes, seed, epochs)[0], changed, queries, progress=False, seed=seed)
    found = against_truth(result, noise)
    if (said := result.facts["wrong_labels"])["low"] is not None and said["estimate"] > 0:
        share, low, high = (said[name] / len(result.ids) for name in ("estimate", "low", "high"))
        marked = planted[ranked(other)]
        figures = {
            name: inf.ndr_auc_from_planted(values, marked, share, classes, between=(low, high))
            for name, values in rankings(other).items()
        }
        found["retrained"] = {name: dict(zip(PARTS, three, strict=True)) for name, three in figures.items()}
    return {"learned": float(learned[noise].double().mean()), **found}


def of_audit(folder: Path) -> dict[str, Any]:
    """One self-check of a run of ``benchmarks.audit_sst2``: its adapter, rows and trusted rows."""
    noise = torch.tensor([row["noise"] for row in protocol.load(folder / "split.pt")["train"]])
    files = [str(folder / f"{name}.jsonl") for name in ("train", "queries")]
    result = inf.audit(str(folder / "adapter"), *files, progress=False, self_check=PLANTED)
    assert result.predicted is not None
    assert result.labels is not None
    learned = [a == b for a, b, bad in zip(result.predicted, result.labels, noise.tolist(), strict=True) if bad]
    return {"learned": sum(learned) / len(learned), **against_truth(result, noise)}


def rankings(result: AuditResult) -> dict[str, Tensor]:
    return {"default": result.rankings[result.main], "loss": result.baselines["loss"]}


def ranked(result: AuditResult) -> Tensor:
    """Numbers of the rows that are ranked: those that stand for trusted ones are not."""
    return torch.tensor([int(name) for name in result.ids])


def against_truth(result: AuditResult, noise: Tensor) -> dict[str, Any]:
    """AUC_NDR of the main ranking and of the loss: what the self-check says, with intervals, and in truth."""
    wrong, check = noise[ranked(result)], result.facts["self_check"]
    said, estimate = check["planted"]["rows"], check["estimate"]
    out = {
        "flips": int(wrong.sum()), "estimated": result.facts["wrong_labels"]["estimate"],
        "truth": {name: inf.ndr_auc(values, wrong) for name, values in rankings(result).items()},
        "planted": {name: {part: said[name][part] for part in PARTS} for name in RANKINGS},
    }  # fmt: skip
    return out | ({"skipped": estimate["skipped"]} if "skipped" in estimate else {"estimate": estimate["rows"]})


def table_of(runs: list[dict[str, Any]]) -> list[str]:
    """How often the truth lies within what is said, and each run."""
    kinds = {
        "planted": "planted, not learned (what the self-check compares)",
        "estimate": "the self-check's estimate",
        "retrained": "planted and learned, `inf.ndr_auc_from_planted`",
    }
    lines = ["| figure | model | ranking | runs | truth inside the 95 % interval | mean difference to the truth |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind, model, name in itertools.product(kinds, ("has not learned the flips", "has learned them"), RANKINGS):
        some = [run for run in runs if kind in run and (run["learned"] > 0.5) == (model == "has learned them")]
        if some:
            inside = sum(run[kind][name]["low"] <= run["truth"][name] <= run[kind][name]["high"] for run in some)
            away = float(np.mean([run[kind][name]["auc_ndr"] - run["truth"][name] for run in some]))
            lines.append(f"| {kinds[kind]} | {model} | {RANKINGS[name]} | {len(some)} | {inside} | {away:+.3f} |")
    lines += [
        "",
        "| run | flips learned | flips (estimated) | AUC_NDR of | truth | " + " | ".join(kinds.values()) + " |",
    ]
    lines += ["|" + "---|" * 8]
    for run in runs:
        for name, title in RANKINGS.items():
            cells = [
                f"{run[kind][name]['auc_ndr']:.3f} ({run[kind][name]['low']:.3f} to {run[kind][name]['high']:.3f})"
                if kind in run
                else "-"
                for kind in kinds
            ]
            start = f"| {run['run']} | {run['learned']:.2f} | {run['flips']} ({run['estimated']:.0f}) | {title} "
            lines.append(start + f"| {run['truth'][name]:.3f} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
