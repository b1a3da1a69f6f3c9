"""Tables, plots and verdicts of ``python -m benchmarks.paper``, made from its JSON files alone.

``python -m benchmarks.paper_tables`` writes them beside the runs in ``benchmarks/results/paper``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np

import influence_fast as inf
from benchmarks import protocol
from benchmarks.paper_tasks import ARMS, DEFAULT, unusual

Run = dict[str, Any]
PAPER_METHODS, PAPER_AGGREGATIONS = ("dot", "cosine", "datainf"), ("mean", "rank-c", "vote-c")
_RANDOM, _ORACLE = "random", "oracle"


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=protocol.RESULTS / "paper",
    help="Folder of the runs; README.md and the plots there are replaced.",
)
def main(out: Path) -> None:
    """Make README.md and the plots of all finished runs in a folder."""
    write_tables(out)


def write_tables(folder: Path) -> None:
    """``README.md`` and one SVG for each plot, in ``folder``, from every finished ``*.json`` there; says what it wrote."""
    runs = read_runs(folder)
    noisy, generative = [run for run in runs if "rows" in run], [run for run in runs if "relevance" in run]
    parts = ["# The paper's protocol on real data", "", _lead(runs), "", *_summary(noisy)]
    tasks, relevances = _by(noisy, _label), _by(generative, lambda run: run["task"])

    def keep(path: Path, text: str) -> None:
        protocol.write_text(path, text)
        click.echo(f"wrote {path}")

    with protocol.Progress(total=len(tasks) + len(relevances) + 1) as progress:
        for name, some in tasks.items():
            with progress.step(name):
                sections = [section(some) for section in (_sizes, _rankings, _groups, _arms)]
                parts += ["", f"## {name}", *(line for section in sections for line in ("", *section))]
                path = folder / f"{name.replace(' ', '-').replace(',', '')}.svg"
                keep(path, _heat(some))
                parts += ["", f"![AUC_NDR by layer group]({path.name})"]
        for name, some in relevances.items():
            with progress.step(name):
                parts += ["", f"## {name}", "", *_sizes(some), "", *_relevance(some)]
        with progress.step("claims"):
            parts += ["", "## Claims", "", *claims_of(of_protocol(noisy))]
        keep(folder / "README.md", "\n".join(parts) + "\n")


def read_runs(folder: Path) -> list[Run]:
    """The finished runs of a folder, their tables by ranking; says how many are partial."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stat().st_size]
    runs = [run for run in found if "partial" not in run]
    for run in runs:
        if "rows" in run:
            run["rows"] = {(row["method"], row["group"], row["aggregation"]): row for row in run["rows"]}
    if len(runs) < len(found):
        click.echo(f"{len(found) - len(runs)} partial runs are left out", err=True)
    return runs


def interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student interval of one figure per run; an infinite interval from fewer than two runs."""
    from scipy import stats

    found = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    if len(found) < 2:
        return (float(found[0]) if len(found) else math.nan), -math.inf, math.inf
    mean, error = float(found.mean()), float(stats.sem(found))
    if error == 0:
        return mean, mean, mean
    low, high = stats.t.interval(level, len(found) - 1, mean, error)
    return mean, float(low), float(high)


def verdict(low: float, high: float) -> str:
    """Of the claim that a difference is positive."""
    return "held" if low > 0 else "not held" if high < 0 else "undecided"


def cell(run: Run, method: str, group: str = "", aggregation: str = "", metric: str = "auc_ndr") -> float:
    """One figure of a run's table; NaN where the run has no such ranking."""
    row = run["rows"].get((method, group, aggregation))
    return row[metric] if row else math.nan


def _lead(runs: list[Run]) -> str:
    earlier = [run for run in runs if "rows" in run and ("aum", "", "") not in run["rows"]]
    of_pool = (
        f" The `pool` of {len(earlier)} of them is an earlier one, before its estimates were stacked; the present "
        "one's is on the page on quality."
    )
    return (
        f"{len(runs)} runs; every number below comes from the JSON files beside this one. AUC_NDR: 1 is best, chance is "
        "about 0.556 at 20 % noise. A claim is *held* or *not held* where the 95 % interval over runs lies on one side of "
        "0, else *undecided*; it takes at least two runs to decide."
    ) + (of_pool if earlier else "")


def _summary(runs: list[Run]) -> list[str]:
    """Each task in a line: the default beside the loss and the best cell of the paper, and what filtering by it is worth."""
    if not runs:
        return []
    best, filtered = _best_of_paper(of_protocol(runs)), _default_arm()
    arms = {"nothing": "all", "default": filtered, "loss": "loss", _RANDOM: _RANDOM, _ORACLE: _ORACLE}
    rows = []
    for name, some in _by(runs, _label).items():
        over = [run["rows"][DEFAULT]["over_loss"] for run in some]
        row: list[Any] = [name, len(some), *(_mean(some, *key) for key in (DEFAULT, ("loss", "", ""), best))]
        row.append(f"{sum(low > 0 for low, _ in over)} / {sum(high < 0 for _, high in over)}")
        whole = [run for run in some if filtered in run["arms"]]
        row.append(len(whole))
        row += [
            float(np.mean([run["arms"][arm]["accuracy"] for run in whole])) if whole else "-" for arm in arms.values()
        ]
        rows.append(row)
    head = ["task", "runs", "default", "loss", " ".join(best), "default over / under loss", "retrained"]
    return [
        f"Mean AUC_NDR of the default of an audit ({' '.join(DEFAULT)}), of the training loss and of the cell of dot, "
        "cosine and datainf that is best over the runs with uniform noise; in how many runs the 95 % interval of the "
        "difference to the loss is above and below 0; how many runs were retrained, and their mean accuracy after dropping "
        "the lowest 30 % by each:",
        "",
        *_table([*head, *(f"accuracy: {name}" for name in arms)], rows),
    ]


def _by(runs: list[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    out: dict[str, list[Run]] = {}
    for run in runs:
        out.setdefault(key(run), []).append(run)
    return out


def of_protocol(runs: list[Run]) -> list[Run]:
    """Uniform flips at the paper's settings; where there are none, whatever there is."""
    return [run for run in runs if run["settings"]["kind"] == "uniform" and not unusual(run["settings"])] or runs


def _label(run: Run) -> str:
    settings = run["settings"]
    parts = [run["task"], f"{settings['kind']} noise", f"n {run['sizes']['train']}", f"{settings['epochs']} epochs"]
    return ", ".join(parts + unusual(settings))


def _table(head: list[str], rows: Iterable[list[Any]]) -> list[str]:
    shown = [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *shown]]


def _sizes(runs: list[Run]) -> list[str]:
    sizes = ", ".join(f"{name} {count}" for name, count in runs[0]["sizes"].items())
    return [f"Seeds {', '.join(str(run['seed']) for run in runs)}; {sizes}."]


def _mean(runs: list[Run], *key: str) -> float:
    return float(np.mean([cell(run, *key) for run in runs]))


def _keys(runs: list[Run]) -> list[tuple[str, str, str]]:
    return list(runs[0]["rows"])


def _best_of_paper(runs: list[Run]) -> tuple[str, str, str]:
    return max((key for key in _keys(runs) if key[0] in PAPER_METHODS), key=lambda key: _mean(runs, *key))


def _default_arm() -> str:
    return next(name for name, key in ARMS.items() if key == DEFAULT)


def _rankings(runs: list[Run], most: int = 12) -> list[str]:
    keys = _keys(runs)
    ours = sorted((key for key in keys if key[1]), key=lambda key: -_mean(runs, *key))
    default = [key for key in ours if key == DEFAULT]
    shown = [key for key in keys if not key[1]] + default + [key for key in ours if key != DEFAULT][:most]
    rows = []
    for key in sorted(shown, key=lambda key: -_mean(runs, *key)):
        ndr = float(np.mean([cell(run, *key, metric="ndr@30") for run in runs]))
        low, high = runs[0]["rows"][key]["over_loss"]
        name = " ".join(part for part in key if part) + (" (default)" if key == DEFAULT else "")
        rows.append([name, ndr, _mean(runs, *key), f"{low:+.3f} to {high:+.3f}"])
    head = ["ranking", "NDR@30", "AUC_NDR", f"over loss, 95 % interval (seed {runs[0]['seed']})"]
    return [
        f"Baselines, the default, and the {most} best of {len(ours)} (chosen after the fact, which flatters them), the "
        "highest AUC_NDR first:",
        "",
        *_table(head, rows),
    ]


def _groups(runs: list[Run]) -> list[str]:
    groups = list(dict.fromkeys(g for m, g, _ in _keys(runs) if m == "dot"))
    columns = [(method, a) for method in PAPER_METHODS for a in PAPER_AGGREGATIONS]
    rows = [[group, *(_mean(runs, method, group, a) for method, a in columns)] for group in groups]
    return ["AUC_NDR by layer group:", "", *_table(["layers", *(f"{m} {a}" for m, a in columns)], rows)]


def _arms(runs: list[Run]) -> list[str]:
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run["arms"]):
        there = [run["arms"][name] for run in runs if name in run["arms"]]
        left = [arm["noise_left"] for arm in there if "noise_left" in arm]
        accuracy = float(np.mean([arm["accuracy"] for arm in there]))
        rows.append([name, there[0]["rows"], accuracy, float(np.mean(left)) if left else "-"])
    return [
        "Retrained without the lowest 30 % (all: nothing dropped); test accuracy at the epoch chosen on another split:",
        "",
        *_table(["dropped by", "rows", "accuracy", "noise left"], rows),
    ]


def _relevance(runs: list[Run]) -> list[str]:
    """Layers by methods, ROC-AUC before recall@90; representations have blocks for layers."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        for row in run["relevance"]:
            found.setdefault((row["method"], row["layer"]), []).append(row)
    methods = list(dict.fromkeys(method for method, _ in found))
    layers = list(dict.fromkeys(layer for _, layer in found))

    def figures(method: str, layer: str) -> str:
        rows = found.get((method, layer), [])
        return " / ".join(f"{np.mean([row[m] for row in rows]):.3f}" for m in ("roc_auc", "recall@90")) if rows else ""

    rows = [[layer, *(figures(method, layer) for method in methods)] for layer in layers]
    return ["ROC-AUC / recall@90 (chance: 0.5 / 0.1):", "", *_table(["layer", *methods], rows)]


def claims_of(runs: list[Run], papers: bool = True, ours: bool = True) -> list[str]:
    """A line for each claim, of the paper and of ours on the default."""

    def over(run: Run, one: Callable[[str, str], float], other: Callable[[str, str], float]) -> float:
        cells = [one(m, a) - other(m, a) for m in PAPER_METHODS for a in PAPER_AGGREGATIONS]
        return float(np.nanmean(cells)) if not np.isnan(cells).all() else math.nan

    def groups(run: Run) -> list[str]:
        return list(dict.fromkeys(group for method, group, _ in run["rows"] if method == "dot"))

    def lift(run: Run, aggregation: str, methods: Iterable[str] = PAPER_METHODS) -> float:
        return float(
            np.mean([cell(run, m, g, aggregation) - cell(run, m, g, "mean") for m in methods for g in groups(run)])
        )

    def weak(run: Run) -> float:
        pairs = [(cell(run, m, g, "mean"), cell(run, m, g, "vote-c")) for m in ("dot", "datainf") for g in groups(run)]
        return -inf.rank_correlation([mean for mean, _ in pairs], [vote - mean for mean, vote in pairs])

    def cancels(run: Run) -> float:
        known = [group for group in groups(run) if group != "all"]
        quality = [
            float(np.mean([cell(run, m, g, a) for m in PAPER_METHODS for a in PAPER_AGGREGATIONS])) for g in known
        ]
        return -inf.rank_correlation([run["cancellation"][group] for group in known], quality)

    def predicts(run: Run) -> float:
        arms = [arm for arm in run["arms"].values() if "noise_left" in arm]
        found = [1 - arm["noise_left"] * arm["rows"] / run["noisy"] for arm in arms]
        return inf.rank_correlation(found, [arm["accuracy"] for arm in arms]) if len(arms) > 2 else math.nan

    def arm(run: Run, name: str, rival: str, margin: float = 0.0) -> float:
        arms = run["arms"]
        return arms[name]["accuracy"] - arms[rival]["accuracy"] + margin if name in arms and rival in arms else math.nan

    default = " ".join(DEFAULT)
    filtered, best = _default_arm(), _best_of_paper(runs)
    claims: list[tuple[str, Callable[[Run], float]]] = [
        (
            "Paper: middle attention layers beat the head (AUC_NDR, mean over dot, cosine, datainf and aggregations)",
            lambda run: over(
                run, lambda m, a: cell(run, m, "attention middle", a), lambda m, a: cell(run, m, "head", a)
            ),
        ),
        ("Paper: rank-c beats mean (AUC_NDR, mean over methods and layer groups)", lambda run: lift(run, "rank-c")),
        ("Paper: vote-c beats mean (AUC_NDR, mean over methods and layer groups)", lambda run: lift(run, "vote-c")),
        ("Paper: vote lifts weak layers most (minus Spearman of a group's mean and its lift; dot, datainf)", weak),
        ("Paper: vote hurts cosine (AUC_NDR lost)", lambda run: -lift(run, "vote-c", ["cosine"])),
        (
            "Yeh et al. 2022, which the paper doubts: layer groups with less cancellation rank better (minus Spearman of "
            "cancellation and AUC_NDR, mean over methods and aggregations)",
            cancels,
        ),
        (
            "Paper: NDR@30 predicts accuracy after filtering (Spearman over the arms, random and oracle among them)",
            predicts,
        ),
        (
            f"Ours: {default} beats the training loss (AUC_NDR)",
            lambda run: cell(run, *DEFAULT) - cell(run, "loss"),
        ),
        (
            "Ours: cosine with the loss as one more voter beats the loss (AUC_NDR)",
            lambda run: cell(run, "cosine+loss", "all", "rank-c") - cell(run, "loss"),
        ),
        (
            f"Ours: {default} beats {' '.join(best)}, the best cell of dot, cosine and datainf over these runs (AUC_NDR)",
            lambda run: cell(run, *DEFAULT) - cell(run, *best),
        ),
        (f"Ours: filtering by {default} beats random filtering (accuracy)", lambda run: arm(run, filtered, _RANDOM)),
        (
            f"Ours: filtering by {default} is within 1 point of the oracle (accuracy)",
            lambda run: arm(run, filtered, _ORACLE, 0.01),
        ),
    ]
    rows = []
    for text, figure in claims:
        if not (ours if text.startswith("Ours") else papers):
            continue
        values = [figure(run) for run in runs]
        count = sum(not math.isnan(value) for value in values)
        if not count:
            continue
        mean, low, high = interval(values)
        between = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "-"
        rows.append([text, count, f"{mean:+.3f}", between, verdict(low, high) if count > 1 else "undecided"])
    notes = [
        "",
        "The embedding is frozen under LoRA, so it is not ranked here; whether cancellation predicts accuracy takes a "
        "retraining for each layer group and was not measured.",
    ]
    return _table(["claim", "runs", "mean", "95 % interval", "verdict"], rows) + (notes if papers else [])


def _heat(runs: list[Run]) -> str:
    from influence_fast.auditing.report.figures import heat

    methods = list(dict.fromkeys(m for m, g, _ in _keys(runs) if g))
    groups = list(dict.fromkeys(g for m, g, _ in _keys(runs) if m in ("dot", "repsim") and g))
    aggregations = list(dict.fromkeys(a for _, g, a in _keys(runs) if g))
    columns = [(m, a) for m in methods for a in aggregations]
    values = np.array([[_mean(runs, m, group, a) for m, a in columns] for group in groups])
    return heat(values, groups, [f"{m} {a}" for m, a in columns], min(0.5, float(np.nanmin(values))), 1.0)


if __name__ == "__main__":
    main()
