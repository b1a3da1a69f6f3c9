"""Other kinds of wrong labels, and no trusted rows: an audit's default against the loss and other rivals on small tables.

scikit-learn's digits, wine and breast cancer, each column as one of 17 whole numbers; a network of two hidden layers learns
them with a fifth of the labels wrong: at random, more often in one class, at the boundary of another model, or on copies of
rows that stand in the set with their right label too. :func:`influence_fast.audit` ranks with its defaults, with trusted
rows and with none::

    python -m benchmarks.noise_kinds
    python -m benchmarks.noise_kinds --page docs/quality.md
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from benchmarks.paper_tables import interval
from influence_fast.attribution.representations import neighbour_count
from influence_fast.data import label_noise
from influence_fast.data.batching import collate
from influence_fast.evaluation.rivals import label_rivals

KINDS, TASKS = ("uniform", "by class", "boundary", "duplicates"), ("digits", "wine", "breast cancer")
LEVELS, WIDTH = 16, 32
BEST = "the best rival of each cell"
Rows = list[dict[str, Any]]


class Table(nn.Module):
    """Columns from 0 to 16 to classes. Its states are the same at every column, as a reader of sequences asks for them."""

    def __init__(self, columns: int, classes: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            output_hidden_states=False, hidden_size=WIDTH, num_hidden_layers=2, num_labels=classes
        )
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, WIDTH)) for width in (columns, WIDTH)])
        self.head = nn.Linear(WIDTH, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> SimpleNamespace:
        columns = input_ids.float() / LEVELS - 0.5
        states = [columns]
        for layer in self.layers:
            states.append(torch.relu(layer(states[-1])))
        spread = [state[:, None].expand(-1, columns.shape[1], -1) for state in states]
        return SimpleNamespace(
            logits=self.head(states[-1]), hidden_states=tuple(spread) if output_hidden_states else None
        )


@click.command()
@protocol.out_option("A cell that is in it stays as it is, others are added.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=500, show_default=True, help="Training rows at most.")
@click.option(
    "--trusted", default=100, show_default=True, help="Trusted rows at most; every cell is also run with none."
)
@click.option("--share", default=0.2, show_default=True, help="Share of wrong labels.")
@click.option("--epochs", default=30, show_default=True)
@click.option(
    "--page", type=click.Path(path_type=Path, exists=True), help="Put the table of the results into this page."
)
@protocol.threads_option
def main(out: Path | None, seeds: int, page: Path | None, threads: int, **settings: Any) -> None:
    """Run every kind of noise on every table, with trusted rows and without."""
    torch.set_num_threads(threads)
    if page is not None:
        protocol.write_table(page, out, "noise_kinds", "cells", table_of)
        return
    file, document = protocol.begun(out, "noise_kinds", "cells", settings)
    names = ("task", "kind", "trusted rows", "seed")
    done = {tuple(cell[name] for name in names) for cell in document["cells"]}
    # Seed by seed, so that what is there after a stop is of all tables and kinds.
    wanted = [(*cell, seed) for seed in range(seeds) for cell in itertools.product(TASKS, KINDS, (True, False))]
    with protocol.Results(file, document) as results, protocol.Progress(len(wanted)) as progress:
        for key in wanted:
            if key not in done:
                with progress.step(", ".join(map(str, key))):
                    document["cells"].append({**dict(zip(names, key, strict=True)), **one_cell(*key, settings)})
                results.add()
    click.echo(f"wrote {file}")


def table_rows(task: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns as whole numbers from 0 to 16, and classes."""
    from sklearn import datasets

    load = {"digits": datasets.load_digits, "wine": datasets.load_wine, "breast cancer": datasets.load_breast_cancer}
    x, y = load[task](return_X_y=True)
    low, high = x.min(0), x.max(0)
    return np.rint((x - low) / np.where(high > low, high - low, 1) * LEVELS).astype(np.int64), y


def one_cell(task: str, kind: str, with_trusted: bool, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """AUC_NDR of the default and of its rivals in one cell."""
    x, y = table_rows(task)
    random = np.random.default_rng([seed, 3])
    order = random.permutation(len(y))
    asked = order[: min(settings["trusted"], len(y) // 4)]
    rows = order[len(asked) :][: settings["samples"]]
    columns, labels, noise = spoil(x[rows], y[rows].tolist(), kind, settings["share"], int(y.max()) + 1, seed)
    given = [{"input_ids": row.tolist(), "labels": int(label)} for row, label in zip(columns, labels, strict=True)]
    queries = [{"input_ids": x[i].tolist(), "labels": int(y[i])} for i in asked]
    model = fit(given, int(y.max()) + 1, seed, settings["epochs"])
    result = inf.audit(model, given, queries if with_trusted else None, progress=False, seed=seed)
    # Rows that stand for trusted ones are not ranked.
    kept = torch.tensor([int(name) for name in result.ids])
    wrong, shown = noise[kept], torch.tensor(labels)[kept]
    states = torch.from_numpy(columns)[kept].float()
    agreement = inf.neighbours({"columns": states}, shown, neighbour_count(len(kept)))["columns"][0]
    scores = {"default": result.rankings[result.main], **result.baselines}
    scores |= label_rivals(shown, agreement, inf.probe_estimate(states, shown, states[:1])[0])
    return {
        "rows": len(kept), "wrong": int(wrong.sum()), "main": " ".join(filter(None, result.main)),
        "auc_ndr": {name: inf.ndr_auc(values, wrong) for name, values in scores.items()},
    }  # fmt: skip


def spoil(
    x: np.ndarray, labels: list[int], kind: str, share: float, classes: int, seed: int
) -> tuple[np.ndarray, list[int], Tensor]:
    """Columns, labels and which labels are wrong; of duplicates the wrong copies stand behind the rows."""
    if kind == "uniform":
        return x, *label_noise.uniform(labels, share, classes, seed)
    if kind == "by class":
        rates = [3.0] + [1.0] * (classes - 1)
        return x, *label_noise.by_class(labels, share, classes, rates, seed)
    if kind == "boundary":
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_predict

        judge = LogisticRegression(max_iter=1000)
        found = torch.from_numpy(cross_val_predict(judge, x / LEVELS, labels, cv=3, method="predict_proba"))
        return x, *label_noise.boundary(labels, found, share)
    random = np.random.default_rng([seed, 5])
    chosen = random.permutation(len(labels))[: round(share * len(labels))]
    shift = random.integers(1, classes, len(chosen))
    wrong = [(labels[i] + int(by)) % classes for i, by in zip(chosen, shift, strict=True)]
    # One step up or down in a few columns: near-duplicates.
    moved = x[chosen] + random.integers(-1, 2, x[chosen].shape) * (random.random(x[chosen].shape) < 0.1)
    mask = torch.arange(len(labels) + len(chosen)) >= len(labels)
    return np.concatenate([x, moved.clip(0, LEVELS)]), [*labels, *wrong], mask


def fit(rows: Rows, classes: int, seed: int, epochs: int) -> nn.Module:
    """The network after some epochs of Adam."""
    torch.manual_seed(seed)
    model = Table(len(rows[0]["input_ids"]), classes)
    batch = collate(rows, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(rows)).split(32):
            loss = nn.functional.cross_entropy(model(batch["input_ids"][part]).logits, batch["labels"][part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def table_of(cells: list[dict[str, Any]]) -> list[str]:
    """By table, kind and trusted rows: who is best, and by how much the default is above the loss and the best rival."""
    names = [name for name in cells[0]["auc_ndr"] if name != "random"]
    names = [name for name in names if all(name in cell["auc_ndr"] for cell in cells)]
    rivals = [name for name in names if name != "default"]
    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["task"], cell["kind"], cell["trusted rows"]), []).append(cell)
    lines = [
        "| data | wrong labels | trusted rows | best | " + " | ".join(names) + " | default over loss, 95 % interval |"
    ]
    lines.append("|" + "---|" * (5 + len(names)))
    lost: list[str] = []
    for (task, kind, trusted), some in groups.items():
        means = {name: float(np.mean([cell["auc_ndr"][name] for cell in some])) for name in names}
        best = max(means, key=lambda name: means[name])
        _, low, high = interval(cell["auc_ndr"]["default"] - cell["auc_ndr"]["loss"] for cell in some)
        figures = " | ".join(f"{means[name]:.3f}" for name in names)
        said = "yes" if trusted else "none"
        between = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "-"
        lines.append(f"| {task} | {kind} | {said} | {best} | {figures} | {between} |")
        if best != "default":
            lost.append(f"{task}, {kind}, {'with' if trusted else 'without'} trusted rows: {best} {means[best]:.3f}, "
                        f"default {means['default']:.3f}")  # fmt: skip
    lines += [
        "",
        "| the default over | trusted rows | mean | 95 % interval over cells | cells above 0 |",
        "|---|---|---|---|---|",
    ]
    for rival, trusted in itertools.product([*rivals, BEST], (True, False)):
        kept = [cell["auc_ndr"] for cell in cells if cell["trusted rows"] == trusted]
        over = [one["default"] - (max(one[name] for name in rivals) if rival == BEST else one[rival]) for one in kept]
        mean, low, high = interval(over)
        above = f"{sum(value > 0 for value in over)} of {len(over)}"
        between = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "-"
        lines.append(f"| {rival} | {'yes' if trusted else 'none'} | {mean:+.3f} | {between} | {above} |")
    lines += ["", f"Where the default is not the best ({len(lost)} of {len(groups)}), mean over seeds:", ""]
    return [*lines, *(f"- {text}" for text in lost)]


if __name__ == "__main__":
    main()
