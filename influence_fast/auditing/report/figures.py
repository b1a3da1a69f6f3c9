"""The report's plots, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.auditing.result import AuditResult
from influence_fast.evaluation.comparison import RankingKey
from influence_fast.evaluation.metrics import ndr_curve

_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#64748b")


def plots(result: AuditResult, evaluation: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """``(caption, svg)`` of every plot."""
    main = result.rankings[result.main]
    found = []
    if result.noise is not None:
        found.append(
            ("Share of the noisy samples found, against the share of samples looked at.", _curves(result, evaluation))
        )
        found.append(("AUC_NDR of every layer group, method and aggregation.", _measured_heat(result, evaluation)))
    else:
        found.append(("Rank correlation of every layer group with the ranking shown.", _agreement_heat(result, main)))
    found.append((f"Scores by {result.main}: the lowest are the most harmful.", _histogram(main, result.noise)))
    return found


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
    best = max((row for row in evaluation if row["group"]), key=lambda row: row["auc_ndr"])
    chosen = {result.main, (best["method"], best["group"], best["aggregation"])}
    lines = {str(key): scores for key, scores in result.rankings.items() if key.is_baseline or key in chosen}
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


def _cells(result: AuditResult, value: Callable[[RankingKey], float]) -> tuple[np.ndarray, list[str], list[str]]:
    """A cell for each layer group (row) and method with its aggregation (column)."""
    keys = [key for key in result.rankings if not key.is_baseline]
    rows = list(dict.fromkeys([*result.groups, *(key.group for key in keys)]))
    columns = list(dict.fromkeys((key.method, key.aggregation) for key in keys))
    # A method that has its own layers leaves the others' groups empty.
    cells = np.full((len(rows), len(columns)), np.nan)
    for key in keys:
        cells[rows.index(key.group), columns.index((key.method, key.aggregation))] = value(key)
    return cells, rows, [" ".join(column) for column in columns]


def _measured_heat(result: AuditResult, evaluation: list[dict[str, Any]]) -> str:
    found = {(row["method"], row["group"], row["aggregation"]): row["auc_ndr"] for row in evaluation}
    cells, rows, columns = _cells(result, lambda key: found[key])
    return heat(cells, rows, columns, min(0.5, float(np.nanmin(cells))), 1.0)


def _agreement_heat(result: AuditResult, main: Tensor) -> str:
    from scipy.stats import spearmanr

    def value(key: RankingKey) -> float:
        other = result.rankings[key]
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
