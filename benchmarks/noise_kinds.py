"""Kinds and shares of wrong labels, many trusted rows, few and none: an audit's default against what needs no influence.

Eight data sets (:mod:`benchmarks.noise_tasks`), six kinds of wrong labels, 5 to 40 % of them. A model learns the rows as
they are given; :func:`influence_fast.audit` ranks them with its defaults. Where a fifth of the labels is flipped at random,
rows are left out or relabelled by each ranking, and the model is trained again::

    python -m benchmarks.noise_kinds
    python -m benchmarks.noise_kinds --data DATA_DIR --model MODEL_DIR
    python -m benchmarks.noise_kinds --page docs/quality.md

Texts need ``--data`` and ``--model``; image segments and languages need the packages river and wordfreq, and cleanlab's
rankings need cleanlab: what is missing is left out.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import joblib
import numpy as np
import torch
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import noise_tasks, protocol
from benchmarks.noise_tasks import KINDS, Part, Split, Task
from benchmarks.paper_tables import interval, verdict
from influence_fast.attribution.representations import neighbour_count
from influence_fast.auditing.result import AuditResult
from influence_fast.evaluation.rivals import FOLDS, has_cleanlab, label_quality, label_rivals, out_of_fold
from influence_fast.training.recorded import RecordedTraining

SHARE, TRUSTED = 0.2, 100
NOISES = (*((kind, SHARE) for kind in KINDS), ("uniform", 0.05), ("uniform", 0.1), ("uniform", 0.4))
# More of them where a fifth of the labels is flipped at random.
OTHER_TRUSTED = (20, 500)
PACKAGES = {"image segments": "river", "languages": "wordfreq"}
BEST = "the best rival of each cell, known only afterwards"
# What the default pools and how was chosen on these, with the wrong labels in view.
CHOSEN_ON = ("digits", "breast cancer", "languages", "cola")
# A model that has learned a trigger is as sure of its rows as of the others: no ranking by labels finds them.
UNFOUND = "backdoor"
ARMS = ("default", "loss", "cleanlab probe", "random", "oracle")
KEY = ("task", "kind", "share", "seed")
Cells = list[dict[str, Any]]


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of sst2, cola and mrpc.")
@click.option("--model", help="Folder of the pretrained encoder for these.")
@click.option("--tasks", help="Some of the data sets, by comma.")
@protocol.out_option("A cell that is in it stays as it is, others are added.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=500, show_default=True, help="Training rows at most.")
@click.option("--epochs", default=30, show_default=True, help="Of the network on tables.")
@click.option("--text-epochs", default=3, show_default=True, help="Of the encoder on texts.")
@click.option("--processes", default=1, show_default=True)
@protocol.page_option
@protocol.threads_option
def main(
    data: Path | None,
    model: str | None,
    tasks: str | None,
    out: Path | None,
    seeds: int,
    processes: int,
    page: Path | None,
    threads: int,
    **settings: Any,
) -> None:
    """Run every kind of noise on every data set, with trusted rows and without."""
    torch.set_num_threads(threads)
    if page is not None:
        protocol.write_table(page, out, "noise_kinds", "cells", table_of)
        return
    made = tasks_of(data, model, settings)
    chosen = list(made) if tasks is None else tasks.split(",")
    if unknown := [name for name in chosen if name not in made]:
        raise click.UsageError(f"--tasks: there are {', '.join(made)} here, not {unknown[0]!r}")
    file, document = protocol.begun(out, "noise_kinds", "cells", settings)
    done: dict[tuple[Any, ...], set[int]] = {}
    for cell in document["cells"]:
        done.setdefault(tuple(cell[name] for name in KEY), set()).add(cell["trusted"])
    # Seed by seed, so that what is there after a stop is of all data sets and kinds.
    every = [(task, *noise, seed) for seed in range(seeds) for task in chosen for noise in NOISES]
    lacking = {key: [n for n in (TRUSTED, 0) if n not in done[key]] if key in done else None for key in every}
    wanted = [key for key in every if lacking[key] != []]
    of_file = dict.fromkeys([*done, *every])
    places = [(*key, number) for key in of_file for number in (TRUSTED, 0, *OTHER_TRUSTED)]
    jobs = (joblib.delayed(one_noise)(key, data, model, settings, threads, lacking[key]) for key in wanted)
    pool = joblib.Parallel(n_jobs=processes, return_as="generator", batch_size=1)
    with protocol.Results(file, document) as results, protocol.Progress(len(wanted)) as progress:
        found = iter(pool(jobs))
        for key in wanted:
            with progress.step(", ".join(map(str, key))):
                document["cells"] += next(found)
            # Cells that were lacking go where they would have been.
            document["cells"].sort(key=lambda cell: places.index((*(cell[name] for name in KEY), cell["trusted"])))
            results.add()
    click.echo(f"wrote {file}")


def tasks_of(data: Path | None, model: str | None, settings: Mapping[str, Any]) -> dict[str, Task]:
    """Those that there is data for."""
    lacking = {name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None}
    out = noise_tasks.tables(settings["epochs"], lacking)
    if data is not None and model is not None:
        out |= noise_tasks.texts(data, model, settings["text_epochs"])
    return out


def one_noise(
    key: tuple[str, str, float, int],
    data: Path | None,
    model: str | None,
    settings: dict[str, Any],
    threads: int,
    numbers: Sequence[int] | None = None,
) -> Cells:
    """The cells of one data set with one noise by one seed: a model, and an audit for each number of trusted rows.

    ``numbers`` are those that are lacking; without them there are 100 and none, and 20 and 500 of uniform flips of a fifth.
    """
    torch.set_num_threads(threads)
    name, kind, share, seed = key
    task, usual = tasks_of(data, model, settings)[name], (kind, share) == NOISES[0]
    split = task.split(seed, settings["samples"], max(OTHER_TRUSTED) if usual else TRUSTED)
    given, wrong = noise_tasks.spoil(task, split.train, kind, share, seed)
    network, history = task.fit(given, seed)
    rivals = rivals_of(task, given, history, seed, folds=usual)
    cells = []
    for trusted in (TRUSTED, 0, *(OTHER_TRUSTED if usual else ())) if numbers is None else numbers:
        if trusted > len(split.trusted) and trusted > TRUSTED:
            continue
        asked = split.trusted.some(range(min(trusted, len(split.trusted))))
        queries = task.rows(asked) if trusted else None
        result = inf.audit(network, task.rows(given), queries, progress=False, seed=seed, evidence=0)
        # Rows that stand for trusted ones are not ranked.
        kept = torch.tensor([int(row) for row in result.ids])
        scores = {"default": result.rankings[result.main], **result.baselines}
        scores |= {rival: values[kept] for rival, values in rivals.items()}
        cell = {
            **dict(zip(KEY, key, strict=True)), "trusted": trusted, "trusted rows": len(asked), "rows": len(kept),
            "wrong": int(wrong[kept].sum()), "main": " ".join(filter(None, result.main)),
            "said": result.facts.get("wrong_labels"), "weights": result.facts.get("pool_weights"),
            "auc_ndr": {rival: inf.ndr_auc(values, wrong[kept]) for rival, values in scores.items()},
        }  # fmt: skip
        if usual and trusted == TRUSTED:
            orders = {arm: scores[arm].argsort(stable=True) for arm in ARMS if arm in scores}
            orders["oracle"] = wrong.int().argsort(descending=True, stable=True)
            cell["accuracy"] = cleaned(task, split, given, network, result, orders, int(wrong.sum()), seed)
        cells.append(cell)
    return cells


def rivals_of(task: Task, given: Part, history: Tensor, seed: int, folds: bool) -> dict[str, Tensor]:
    """What needs no influence: cleanlab by a probe and by models of folds, neighbours, and what training showed."""
    labels = torch.tensor(given.labels)
    every, last = task.states(given.items)
    agreement = inf.neighbours({"last": last}, labels, neighbour_count(len(labels)))["last"][0]
    out = label_rivals(labels, agreement, inf.probe_estimate(every, labels, every[:1])[0])
    right = nn.functional.one_hot(labels, history.shape[2]).bool()
    margins = history[:, right] - history.masked_fill(right, -torch.inf).amax(2)
    losses = torch.stack([nn.functional.cross_entropy(one, labels, reduction="none") for one in history])
    out |= RecordedTraining(losses, margins, torch.full((len(history),), torch.nan, dtype=torch.float64)).scores()
    if folds and has_cleanlab():

        def predict(learned: Tensor, left: Tensor) -> Tensor:
            model = task.fit(given.some(learned.tolist()), seed)[0]
            return task.logits(model, [given.items[i] for i in left.tolist()]).log_softmax(1)

        out[FOLDS] = label_quality(labels, out_of_fold(predict, labels))
    return out


def cleaned(
    task: Task, split: Split, given: Part, network: nn.Module, result: AuditResult, orders: dict[str, Tensor],
    count: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """Accuracy on rows that nothing else saw: as it is, and without or with other labels for each ranking's lowest rows.

    All rankings act on as many rows as there are wrong labels, so that they differ in which alone.
    """
    n, other = len(given), second_best(task.logits(network, given.items), given.labels)
    suggested = result.suggested if result.suggested is not None else given.labels

    def measured(model: nn.Module) -> float:
        right = task.logits(model, split.test.items).argmax(1) == torch.tensor(split.test.labels)
        return float(right.double().mean())

    def accuracy(part: Part) -> float:
        return measured(task.fit(part, seed)[0])

    out = {"nothing": measured(network)}
    for arm, order in orders.items():
        low = set(order[:count].tolist())
        out[f"{arm}, drop"] = accuracy(given.some([i for i in range(n) if i not in low]))
        labels = list(given.labels)
        for i in low:
            if arm == "oracle":
                labels[i] = split.train.labels[i]
            else:
                labels[i] = suggested[i] if arm == "default" and suggested[i] != labels[i] else other[i]
        out[f"{arm}, relabel"] = accuracy(Part(given.items, labels))
    return out


def second_best(logits: Tensor, labels: Sequence[int]) -> list[int]:
    """The most probable class that is not the given one."""
    return logits.scatter(1, torch.tensor(labels)[:, None], -torch.inf).argmax(1).tolist()


def table_of(cells: Cells) -> list[str]:
    """By data set, by noise and by trusted rows: who is best; the default against each rival; what cleaning is worth."""
    names = ["default", *dict.fromkeys(n for cell in cells for n in cell["auc_ndr"] if n not in ("default", "random"))]
    usual = [cell for cell in cells if cell["trusted"] in (0, TRUSTED)]
    found = [cell for cell in usual if cell["kind"] != UNFOUND]
    lines = [
        f"AUC_NDR by data set, means over {len(NOISES) - 1} kinds and shares of wrong labels (without backdoors):",
        "",
    ]
    lines += grouped(found, names, ("task", "trusted"))
    lines += ["", "By kind and share of wrong labels, means over data sets:", ""]
    lines += grouped(usual, names, ("kind", "share", "trusted"))
    lines += [
        "",
        "By the number of trusted rows, a fifth of the labels flipped at random, data sets with that many alone:",
        "",
    ]
    every = {cell["task"] for cell in cells if cell["trusted"] == max(OTHER_TRUSTED)}
    flipped = [c for c in cells if (c["kind"], c["share"]) == NOISES[0] and c["task"] in every]
    lines += grouped(sorted(flipped, key=lambda cell: cell["trusted"]), names, ("trusted",))
    lines += ["", *differences(usual, names[1:]), "", *losses_of(usual, names[1:]), "", *accuracies(cells), ""]
    return [*lines, *estimates_of(usual)]


def grouped(cells: Cells, names: Sequence[str], by: Sequence[str]) -> list[str]:
    """A line for each group: how many cells, and the mean of each ranking, the best in bold."""
    groups: dict[tuple[Any, ...], Cells] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[name] for name in by), []).append(cell)
    titles = {"task": "data", "kind": "wrong labels", "share": "share", "trusted": "trusted rows"}
    shown = [name for name in names if all(name in cell["auc_ndr"] for cell in cells)]
    lines = ["| " + " | ".join([*(titles[name] for name in by), "runs", *shown]) + " |"]
    lines += ["|" + "---|" * (len(by) + 1 + len(shown))]
    for key, some in groups.items():
        means = [f"{np.mean([cell['auc_ndr'][name] for cell in some]):.3f}" for name in shown]
        best = max(means, key=float)
        texts = [f"{part:.0%}" if isinstance(part, float) else str(part or "none") for part in key]
        lines.append(
            "| " + " | ".join([*texts, str(len(some)), *(f"**{m}**" if m == best else m for m in means)]) + " |"
        )
    return lines


def differences(cells: Cells, rivals: Sequence[str]) -> list[str]:
    """The default over each rival, with Student intervals over data sets, whose cells share their rows."""
    lines = ["| the default over | trusted rows | data | mean | 95 % interval over data sets | cells above 0 |"]
    lines += ["|---|---|---|---|---|---|"]
    parts = {
        "all": lambda cell: True,
        "those that it was not chosen on": lambda cell: cell["task"] not in CHOSEN_ON,
        "all, without backdoors": lambda cell: cell["kind"] != UNFOUND,
    }
    some = {str(TRUSTED): {TRUSTED}, "none": {0}, f"{TRUSTED} or none": {TRUSTED, 0}}
    for trusted, rival in itertools.product(some, [*rivals, BEST]):
        for title, wanted in parts.items():
            by_task: dict[str, list[float]] = {}
            for cell in cells:
                scores = cell["auc_ndr"]
                if cell["trusted"] in some[trusted] and wanted(cell) and (rival == BEST or rival in scores):
                    against = max(scores[name] for name in rivals if name in scores) if rival == BEST else scores[rival]
                    by_task.setdefault(cell["task"], []).append(scores["default"] - against)
            every = [value for some in by_task.values() for value in some]
            if every:
                mean, low, high = interval(float(np.mean(some)) for some in by_task.values())
                between = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "-"
                above = f"{sum(value > 0 for value in every)} of {len(every)}"
                lines.append(f"| {rival} | {trusted} | {title} | {mean:+.3f} | {between} | {above} |")
    return lines


def losses_of(cells: Cells, rivals: Sequence[str]) -> list[str]:
    """Where the default is clearly below the loss, and how often it is the best."""
    groups: dict[tuple[Any, ...], Cells] = {}
    for cell in cells:
        groups.setdefault((cell["task"], cell["kind"], cell["share"], cell["trusted"]), []).append(cell)
    below, best = [], dict.fromkeys((TRUSTED, 0), 0)
    for (task, kind, share, trusted), some in groups.items():
        over = [cell["auc_ndr"]["default"] - cell["auc_ndr"]["loss"] for cell in some]
        mean, _, high = interval(over)
        if high < 0:
            below.append(f"{task}, {share:.0%} {kind}, {trusted or 'no'} trusted rows: {mean:+.3f}")
        means = {n: np.mean([cell["auc_ndr"].get(n, -1) for cell in some]) for n in ("default", *rivals)}
        best[trusted] += max(means, key=lambda name: means[name]) == "default"
    count = len(groups) // 2
    lines = [
        f"The default is the best of all in {best[TRUSTED]} of {count} data sets with a noise where {TRUSTED} rows are "
        f"trusted, in {best[0]} of {count} where none is. Clearly below the loss (95 % interval over seeds below 0): "
        + (f"{len(below)} of {len(groups)}." if below else "nowhere.")
    ]
    return lines + ([""] + [f"- {text}" for text in below] if below else [])


def accuracies(cells: Cells) -> list[str]:
    """Accuracy of models that were trained again, and the difference to training on the rows as they were."""
    runs = [cell for cell in cells if "accuracy" in cell]
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    arms = [f"{arm}, {what}" for what in ("drop", "relabel") for arm in ARMS]
    lines = [
        "A fifth of the labels flipped at random; as many rows as there are flips are left out or relabelled, and the model "
        f"is trained again: accuracy on other rows, means over {max(run['seed'] for run in runs) + 1} seeds.",
        "",
        "| lowest rows by | " + " | ".join(tasks) + " | over nothing | 95 % interval over data sets |",
        "|" + "---|" * (3 + len(tasks)),
    ]
    for arm in ("nothing", *(arm for arm in arms if all(arm in run["accuracy"] for run in runs))):
        means = [float(np.mean([run["accuracy"][arm] for run in runs if run["task"] == task])) for task in tasks]
        over = [
            float(np.mean([r["accuracy"][arm] - r["accuracy"]["nothing"] for r in runs if r["task"] == task]))
            for task in tasks
        ]
        mean, low, high = interval(over)
        between = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) and arm != "nothing" else ""
        figures = " | ".join(f"{value:.3f}" for value in means)
        lines.append(f"| {arm} | {figures} | {f'{mean:+.3f}' if arm != 'nothing' else ''} | {between} |")
    return lines


def claims(cells: Cells) -> list[str]:
    """What the paper says of filtering, and what the default is worth: by data set, with Student intervals over these."""

    def predicts(cell: dict[str, Any]) -> float:
        arms = [arm for arm in ARMS if f"{arm}, drop" in cell["accuracy"]]
        quality = [1.0 if arm == "oracle" else cell["auc_ndr"][arm] for arm in arms]
        return inf.rank_correlation(quality, [cell["accuracy"][f"{arm}, drop"] for arm in arms])

    def arm(name: str, rival: str, margin: float = 0.0) -> Callable[[dict[str, Any]], float]:
        return lambda cell: cell["accuracy"][name] - cell["accuracy"][rival] + margin

    def over(rival: str) -> Callable[[dict[str, Any]], float]:
        return lambda cell: cell["auc_ndr"]["default"] - cell["auc_ndr"][rival]

    usual = [cell for cell in cells if cell["trusted"] in (0, TRUSTED)]
    again = [cell for cell in cells if "accuracy" in cell]
    figures: list[tuple[str, Cells, Callable[[dict[str, Any]], float]]] = [
        ("Paper: AUC_NDR predicts accuracy after filtering (Spearman over the arms, random and oracle among them)", again,
         predicts),
        ("Ours: the default beats the training loss (AUC_NDR)", usual, over("loss")),
        ("Ours: the default beats cleanlab on a probe (AUC_NDR)", usual, over("cleanlab probe")),
        ("Ours: the default beats the agreement of nearest neighbours (AUC_NDR)", usual, over("neighbours agree")),
        ("Ours: filtering by the default beats filtering by the loss (accuracy)", again, arm("default, drop", "loss, drop")),
        ("Ours: filtering by the default beats random filtering (accuracy)", again, arm("default, drop", "random, drop")),
        ("Ours: filtering by the default is within 1 point of the oracle (accuracy)", again,
         arm("default, drop", "oracle, drop", 0.01)),
        ("Ours: relabelling by the default beats nothing (accuracy)", again, arm("default, relabel", "nothing")),
    ]  # fmt: skip
    lines = ["| claim | runs | mean | 95 % interval over data sets | verdict |", "| --- | --- | --- | --- | --- |"]
    for text, some, figure in figures:
        by_task: dict[str, list[float]] = {}
        for cell in some:
            by_task.setdefault(cell["task"], []).append(figure(cell))
        # Where all arms are equally accurate nothing is foretold, and nothing is to be.
        known = [[value for value in values if not math.isnan(value)] for values in by_task.values()]
        mean, low, high = interval(float(np.mean(values)) for values in known if values)
        between = f"{low:+.3f} to {high:+.3f}"
        lines.append(f"| {text} | {len(some)} | {mean:+.3f} | {between} | {verdict(low, high)} |")
    return lines


def estimates_of(cells: Cells) -> list[str]:
    """How often the audit's interval for the number of wrong labels holds the truth, by noise."""
    lines = [
        "The audit's count of wrong labels, where it gives an interval, by kind and share:",
        "",
        "| wrong labels | share | audits | with an interval | which holds the truth | estimate less truth, rows, mean |",
        "|---|---|---|---|---|---|",
    ]
    for kind, share in NOISES:
        some = [c for c in cells if (c["kind"], c["share"], c["trusted"]) == (kind, share, TRUSTED)]
        said = [(c["said"], c["wrong"]) for c in some if c["said"] is not None and c["said"]["low"] is not None]
        held = sum(one["low"] <= wrong <= one["high"] for one, wrong in said)
        away = f"{np.mean([one['estimate'] - wrong for one, wrong in said]):+.0f}" if said else "-"
        lines.append(f"| {kind} | {share:.0%} | {len(some)} | {len(said)} | {held} | {away} |")
    return lines


if __name__ == "__main__":
    main()
