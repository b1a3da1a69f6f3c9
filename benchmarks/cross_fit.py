"""Does the pool gain if its model part is out of sample on the training rows too, as it is on the queries?

The default ranking weighs the audited model's probabilities by the trusted queries, which the model never saw, and uses them
on the rows that it was trained on. Here each training row has them from one of five networks that were trained without it,
and query j from network ``j % 5``; all else of the audit is as it is. Tables and network of ``benchmarks.noise_tasks``, a
fifth of the labels flipped, few epochs and many::

    python -m benchmarks.cross_fit
    python -m benchmarks.cross_fit --page docs/quality.md
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from benchmarks.noise_tasks import Rows, fit, table_rows
from benchmarks.paper_tables import interval
from influence_fast.attribution.model_passes import ModelPasses
from influence_fast.data import label_noise

# Which task chooses, and which one is reported.
TASKS, EPOCHS, FOLDS, FLIPS = {"digits": "chooses", "breast cancer": "reported"}, (30, 300), 5, 0.2
Key = tuple[tuple[int, ...], int]


@click.command()
@protocol.out_option("A run that is in it stays as it is, others are added.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=500, show_default=True, help="Training rows at most.")
@click.option("--trusted", default=100, show_default=True, help="Trusted rows at most.")
@protocol.page_option
@protocol.threads_option
def main(out: Path | None, seeds: int, page: Path | None, threads: int, **settings: Any) -> None:
    """Rank with the model's own probabilities and with those of networks that did not see the row."""
    torch.set_num_threads(threads)
    if page is not None:
        protocol.write_table(page, out, "cross_fit", "runs", table_of)
        return
    file, document = protocol.begun(out, "cross_fit", "runs", settings)
    done = {(run["task"], run["epochs"], run["seed"]) for run in document["runs"]}
    wanted = [(task, epochs, seed) for seed, task, epochs in itertools.product(range(seeds), TASKS, EPOCHS)]
    with protocol.Results(file, document) as results, protocol.Progress(len(wanted)) as progress:
        for task, epochs, seed in wanted:
            if (task, epochs, seed) not in done:
                with progress.step(f"{task}, {epochs} epochs, seed {seed}"):
                    found = one_run(task, epochs, seed, settings)
                    document["runs"].append({"task": task, "epochs": epochs, "seed": seed, **found})
                results.add()
    click.echo(f"wrote {file}")


def one_run(task: str, epochs: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """AUC_NDR of the loss, of the default, and of the default with a cross-fitted model part; what each part weighs."""
    x, y = table_rows(task)
    classes = int(y.max()) + 1
    order = np.random.default_rng([seed, 3]).permutation(len(y))
    asked = order[: min(settings["trusted"], len(y) // 4)]
    rows = order[len(asked) :][: settings["samples"]]
    labels, noise = label_noise.uniform(y[rows].tolist(), FLIPS, classes, seed)
    given = [{"input_ids": row.tolist(), "labels": int(label)} for row, label in zip(x[rows], labels, strict=True)]
    queries = [{"input_ids": x[i].tolist(), "labels": int(y[i])} for i in asked]
    model, _ = fit(given, classes, seed, epochs)
    others = out_of_sample(given, queries, classes, seed, epochs)

    def from_others(passes: ModelPasses, part: Any) -> Tensor:
        return torch.stack([others[key_of(row)] for row in part.rows])

    out: dict[str, Any] = {"auc_ndr": {}, "weights": {}}
    for name in ("default", "cross-fitted"):
        own = partial(inf.audit, model, given, queries, progress=False, seed=seed, methods=["pool"])
        if name == "default":
            result = own()
        else:
            with mock.patch.object(ModelPasses, "class_log_probabilities", from_others):
                result = own()
        wrong = noise[torch.tensor([int(row) for row in result.ids])]
        out["auc_ndr"] |= {"loss": inf.ndr_auc(result.baselines["loss"], wrong)}
        out["auc_ndr"][name] = inf.ndr_auc(result.rankings[result.main], wrong)
        out["weights"][name] = result.facts["pool_weights"]["model"]
    return out


def key_of(row: dict[str, Any]) -> Key:
    return tuple(row["input_ids"]), int(row["labels"])


def out_of_sample(given: Rows, queries: Rows, classes: int, seed: int, epochs: int) -> dict[Key, Tensor]:
    """Log-probabilities of the classes of each row, by a network that was trained without it."""
    out: dict[Key, Tensor] = {}
    folds = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed)).tensor_split(FOLDS)
    for number, left in enumerate(folds):
        without = set(left.tolist())
        model, _ = fit([row for i, row in enumerate(given) if i not in without], classes, seed, epochs)
        asked = [*(given[i] for i in sorted(without)), *queries[number::FOLDS]]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"] for row in asked])).logits
        out |= zip(map(key_of, asked), nn.functional.log_softmax(logits, 1), strict=True)
    return out


def table_of(runs: list[dict[str, Any]]) -> list[str]:
    """By task and epochs, means over seeds; and the gain on the task that chooses and on the one that is reported."""
    lines = [
        "| data | epochs | runs | loss | default | model part cross-fitted | gain | its weight, default | cross-fitted |"
    ]
    lines += ["|" + "---|" * 9]
    for task, epochs in itertools.product(TASKS, EPOCHS):
        some = [run for run in runs if (run["task"], run["epochs"]) == (task, epochs)]
        if some:
            means = {name: np.mean([run["auc_ndr"][name] for run in some]) for name in some[0]["auc_ndr"]}
            weights = [np.mean([run["weights"][name] for run in some]) for name in ("default", "cross-fitted")]
            figures = [*(f"{means[name]:.3f}" for name in ("loss", "default", "cross-fitted"))]
            figures += [f"{means['cross-fitted'] - means['default']:+.3f}", *(f"{weight:.2f}" for weight in weights)]
            lines.append(f"| {task} | {epochs} | {len(some)} | " + " | ".join(figures) + " |")
    lines += [
        "",
        "| gain in AUC_NDR over the default | runs | mean | 95 % interval | runs above 0 |",
        "|---|---|---|---|---|",
    ]
    for task, role in TASKS.items():
        over = [run["auc_ndr"]["cross-fitted"] - run["auc_ndr"]["default"] for run in runs if run["task"] == task]
        if over:
            mean, low, high = interval(over)
            above = f"{sum(value > 0 for value in over)} of {len(over)}"
            lines.append(f"| {task} ({role}) | {len(over)} | {mean:+.4f} | {low:+.4f} to {high:+.4f} | {above} |")
    return lines


if __name__ == "__main__":
    main()
