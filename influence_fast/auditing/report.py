"""What a person looks at: one self-contained HTML file with plots, the worst samples, and how far to trust them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.auditing.self_check import sentences
from influence_fast.evaluation.comparison import BASELINES, ndr_curve

if TYPE_CHECKING:
    from influence_fast.auditing.run import AuditResult

_SHOWN = 50
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#64748b")


def write_report(path: str | Path, result: AuditResult) -> None:
    """Write ``report.html`` whole or not at all: no scripts, no fonts, no images from elsewhere."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("influence_fast", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    evaluation = result.evaluate() if result.noise is not None else []
    text = environment.get_template("report.html.j2").render(
        facts=_facts(result),
        findings=findings(result, evaluation),
        plots=_plots(result, evaluation),
        worst=_worst(result),
        main=result.main,
        evaluation=[row for row in evaluation if row["group"] in ("", "all")],
        config=json.dumps(result.config, indent=1),
        noise_known=result.noise is not None,
    )
    part = Path(path).with_name(Path(path).name + ".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def findings(result: AuditResult, evaluation: list[dict[str, Any]]) -> list[str]:
    """What the numbers say about themselves, in plain sentences."""
    facts, out = result.facts, []
    if "queries_correct" in facts:
        right, asked = facts["queries_correct"], facts["queries"]
        out.append(f"The model predicts {right} of {asked} queries correctly ({right / asked:.1%}).")
        if right < 50:
            out.append(f"{right} correct queries are few: the -c rankings rest on them alone and will be unstable.")
    if evaluation:
        out += _measured(result, evaluation)
    else:
        out.append("No column says which samples are bad, so the quality of the ranking is not measured here.")
    if result.main[0] == "pool" and "pool_weights" in facts:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in facts["pool_weights"].items())
        out.append(f"The ranking shown pools what is said of each label, weighed by the trusted queries: {weights}.")
    agreements = list(agreement(result).items())
    if agreements:
        text = ", ".join(f"{a} and {b} {value:.2f}" for (a, b), value in agreements)
        out.append(f"Rank correlation between methods ({' '.join(result.main[1:])}): {text}.")
        if min(value for _, value in agreements) < 0.3:
            out.append("The methods disagree widely: read the samples before removing any.")
    if facts["zero_gradients"]:
        out.append(f"{facts['zero_gradients']} gradients of training samples are zero; their cosine counts as 0.")
    if "self_check" in facts:
        out += sentences(facts["self_check"])
    return out


def _measured(result: AuditResult, evaluation: list[dict[str, Any]]) -> list[str]:
    baselines = [row for row in evaluation if row["method"] in BASELINES]
    ours = [row for row in evaluation if row["method"] not in BASELINES]
    best, rival = (max(rows, key=lambda row: row["auc_ndr"]) for rows in (ours, baselines))
    main = next(row for row in ours if (row["method"], row["group"], row["aggregation"]) == result.main)
    out = [
        f"The ranking shown ({_name(main)}) has AUC_NDR {main['auc_ndr']:.3f}; the best of {len(ours)} influence "
        f"rankings ({_name(best)}) has {best['auc_ndr']:.3f}, chosen after the fact, which flatters it."
    ]
    if rival["auc_ndr"] >= best["auc_ndr"]:
        out.append(
            f"The baseline {_name(rival)} wins: AUC_NDR {rival['auc_ndr']:.3f}, more than every influence ranking. "
            "For finding these flips, sorting by it is better and cheaper."
        )
    elif rival["auc_ndr"] >= main["auc_ndr"]:
        out.append(f"The baseline {_name(rival)} ({rival['auc_ndr']:.3f}) beats the ranking shown.")
    else:
        out.append(f"The best baseline, {_name(rival)}, has {rival['auc_ndr']:.3f}.")
    out.append(f"95 % bootstrap interval of the ranking shown: {main['low']:.3f} to {main['high']:.3f}.")
    for name, key in (("a random order", "over_random"), ("the loss", "over_loss")):
        worse = sum(row[key][0] <= 0 for row in ours)
        if worse:
            out.append(
                f"{worse} of {len(ours)} influence rankings are not clearly better than {name} (interval reaches 0)."
            )
    return out


def agreement(result: AuditResult) -> dict[tuple[str, str], float]:
    """Spearman correlation of the main ranking between each pair of methods."""
    from scipy.stats import spearmanr

    _, group, aggregation = result.main
    methods = [method for method, groups in result.scores.items() if aggregation in groups.get(group, {})]
    pairs = [(a, b) for i, a in enumerate(methods) for b in methods[i + 1 :]]
    found = {}
    for a, b in pairs:
        one, other = (result.scores[method][group][aggregation] for method in (a, b))
        if float(one.std()) and float(other.std()):
            found[a, b] = float(spearmanr(one, other).statistic)
    return found


def _name(row: dict[str, Any]) -> str:
    return " ".join(part for part in (row["method"], row["group"], row["aggregation"]) if part)


def _facts(result: AuditResult) -> list[tuple[str, str]]:
    facts = result.facts
    out = [
        ("Training samples", f"{facts['samples']:,}"),
        ("Queries", f"{facts['queries']:,}"),
        ("Layers", f"{facts['layers']:,}"),
        ("Numbers per sample", f"{facts['numbers_per_sample']:,}"),
        ("Store", f"{facts['bytes'] / 2**20:,.1f} MiB"),
    ]
    if "train_accuracy" in facts:
        out.append(("Accuracy on the training labels", f"{facts['train_accuracy']:.1%}"))
    return out + [(f"Time for {name}", f"{seconds:.1f} s") for name, seconds in facts["seconds"].items()]


def _worst(result: AuditResult) -> list[dict[str, Any]]:
    method, group, aggregation = result.main
    scores, loss = result.scores[method][group][aggregation], result.baselines["loss"]
    return [
        {
            "place": place,
            "id": result.ids[i],
            "label": None if result.labels is None else result.labels[i],
            "noise": None if result.noise is None else bool(result.noise[i]),
            "score": f"{float(scores[i]):.4g}",
            "loss": f"{-float(loss[i]):.3f}",
            "text": "" if result.texts is None else result.texts[i],
        }
        for place, i in enumerate(result.ranking[:_SHOWN].tolist())
    ]


def _plots(result: AuditResult, evaluation: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """``(caption, svg)`` of every plot."""
    method, group, aggregation = result.main
    main = result.scores[method][group][aggregation]
    title = " ".join(result.main)
    plots = []
    if result.noise is not None:
        plots.append(
            ("Share of the noisy samples found, against the share of samples looked at.", _curves(result, evaluation))
        )
        plots.append(("AUC_NDR of every layer group, method and aggregation.", _measured_heat(result, evaluation)))
    else:
        plots.append(("Rank correlation of every layer group with the ranking shown.", _agreement_heat(result, main)))
    plots.append((f"Scores by {title}: the lowest are the most harmful.", _histogram(main, result.noise)))
    return plots


def _draw(width: float, height: float, paint: Callable[[Any, Any], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same audit gives the same bytes.
    settings = {"svg.hashsalt": "influence_fast", "font.size": 9, "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure, figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    # From the drawing alone: the XML prolog names addresses, and this file points nowhere.
    return (
        text[text.index("<svg") :]
        .replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1)
        .replace("xlink:href", "href")
    )


def _curves(result: AuditResult, evaluation: list[dict[str, Any]]) -> str:
    noise = result.noise
    assert noise is not None
    ours = [row for row in evaluation if row["method"] not in BASELINES]
    best = max(ours, key=lambda row: row["auc_ndr"])
    chosen = {result.main, (best["method"], best["group"], best["aggregation"])}
    lines = {
        " ".join(part for part in key if part): scores
        for *key, scores in result.rankings()
        if key[0] in BASELINES or tuple(key) in chosen
    }
    n, m = len(noise), int(noise.sum())

    def paint(figure: Any, axes: Any) -> None:
        share = np.arange(1, n + 1) / n
        axes.plot(share, np.minimum(np.arange(1, n + 1) / m, 1), color="#94a3b8", lw=1, ls=":", label="perfect")
        axes.plot([0, 1], [0, 1], color="#94a3b8", lw=1, ls="--", label="random, expected")
        for (name, scores), colour in zip(lines.items(), _COLOURS * 3, strict=False):
            axes.plot(share, ndr_curve(scores, noise), lw=1.5, color=colour, label=name)
        axes.set(
            xlabel="share of samples looked at", ylabel="share of noisy samples found", xlim=(0, 1), ylim=(0, 1.02)
        )
        axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)

    return _draw(7, 4, paint)


def heat(values: np.ndarray, rows: list[str], columns: list[str], low: float, high: float) -> str:
    """One cell for each row and column, as SVG; NaN stays empty."""

    def paint(figure: Any, axes: Any) -> None:
        image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        for (i, j), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            light = value > (low + high) / 2
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="black" if light else "white")
        figure.colorbar(image, ax=axes, fraction=0.03)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    return _draw(max(5.0, 2 + 0.65 * len(columns)), max(2.5, 1.2 + 0.3 * len(rows)), paint)


def _cells(result: AuditResult, value: Callable[[str, str, str], float]) -> tuple[np.ndarray, list[str], list[str]]:
    columns = [(method, a) for method, groups in result.scores.items() for a in next(iter(groups.values()))]
    rows = list(dict.fromkeys([*result.groups, *(group for groups in result.scores.values() for group in groups)]))
    # A method that has its own layers leaves the others' groups empty.
    there = {(method, group) for method, groups in result.scores.items() for group in groups}
    cells = np.array([[value(m, group, a) if (m, group) in there else np.nan for m, a in columns] for group in rows])
    return cells, rows, [f"{method} {a}" for method, a in columns]


def _measured_heat(result: AuditResult, evaluation: list[dict[str, Any]]) -> str:
    found = {(row["method"], row["group"], row["aggregation"]): row["auc_ndr"] for row in evaluation}
    cells, rows, columns = _cells(result, lambda *key: found[key])
    return heat(cells, rows, columns, min(0.5, float(np.nanmin(cells))), 1.0)


def _agreement_heat(result: AuditResult, main: Tensor) -> str:
    from scipy.stats import spearmanr

    def value(method: str, group: str, aggregation: str) -> float:
        other = result.scores[method][group][aggregation]
        return float(spearmanr(main, other).statistic) if float(other.std()) and float(main.std()) else 0.0

    return heat(*_cells(result, value), -1.0, 1.0)


def _histogram(scores: Tensor, noise: Tensor | None) -> str:
    def paint(figure: Any, axes: Any) -> None:
        # A few extreme gradients would squeeze the rest into one bar.
        low, high = np.quantile(scores, [0.005, 0.995])
        edges = np.linspace(low, high if high > low else low + 1, 61)
        parts = (
            {"all": torch.ones(len(scores), dtype=torch.bool)} if noise is None else {"clean": ~noise, "noisy": noise}
        )
        for (name, rows), colour in zip(parts.items(), _COLOURS, strict=False):
            axes.hist(scores[rows].clamp(low, high).numpy(), edges, color=colour, alpha=0.6, label=name)
        axes.set(xlabel="score", ylabel="samples")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)

    return _draw(7, 2.6, paint)
