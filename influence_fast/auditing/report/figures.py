"""The report's plots, as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from influence_fast.auditing.result import AuditResult
from influence_fast.evaluation.comparison import RankingKey
from influence_fast.evaluation.metrics import ndr_curve

# Of Okabe and Ito's colours for all kinds of sight, those that are seen on white and on black; with them a line style.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_STYLES = ("-", "--", "-.", ":")
# Stands for the page's own colour of text, which is another one in the dark.
_INK = "#010203"
_FAINT = "#7f8a99"
# In inches; a phone shows four fifths of it, where letters are 11 pixels high.
_WIDTH = 4.9


def plots(result: AuditResult, evaluation: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """``(caption, svg)`` of every plot."""
    main = result.rankings[result.main]
    found = []
    if result.noise is not None:
        found.append(
            ("Share of the noisy samples found, against the share of samples looked at.", _curves(result, evaluation))
        )
    found.append((f"Scores by {result.main}: the lowest are the most harmful.", _histogram(main, result.noise)))
    if result.noise is not None:
        found.append(("AUC_NDR of every layer group, method and aggregation.", _measured_heat(result, evaluation)))
    else:
        found.append(("Rank correlation of every layer group with the ranking shown.", _agreement_heat(result, main)))
    return found


def _draw(width: float, height: float, paint: Callable[[Any, Any], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same audit gives the same bytes, and no two of its drawings the same ids.
    settings: dict[str, Any] = {"svg.hashsalt": paint.__qualname__, "font.size": 11, "svg.fonttype": "none"}
    settings |= {"font.family": "sans-serif", "figure.facecolor": "none", "axes.facecolor": "none"}
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    settings |= dict.fromkeys(inks, _INK)
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure, figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    # From the drawing alone: the XML prolog names addresses, and this file points nowhere.
    text = (
        text[text.index("<svg") :]
        .replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1)
        .replace("xlink:href", "href")
        .replace(_INK, "currentColor")
    )
    # Groups are named alike in every drawing, and nothing points to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return text.replace("<svg ", '<svg class="large" ', 1) if width > _WIDTH else text


def _curves(result: AuditResult, evaluation: list[dict[str, Any]]) -> str:
    noise = result.noise
    assert noise is not None
    best = max((row for row in evaluation if row["group"]), key=lambda row: row["auc_ndr"])
    chosen = {result.main, (best["method"], best["group"], best["aggregation"])}
    lines = {str(key): scores for key, scores in result.rankings.items() if key.is_baseline or key in chosen}
    n, m = len(noise), int(noise.sum())

    def paint(figure: Any, axes: Any) -> None:
        share = np.arange(1, n + 1) / n
        axes.plot(share, np.minimum(np.arange(1, n + 1) / m, 1), color=_FAINT, lw=1.2, label="perfect")
        axes.plot([0, 1], [0, 1], color=_FAINT, lw=1.2, ls=":", label="random, expected")
        for i, (name, scores) in enumerate(lines.items()):
            # No two lines have the same colour and style.
            style = _STYLES[(i + i // len(_COLOURS)) % len(_STYLES)]
            axes.plot(share, ndr_curve(scores, noise), lw=2, color=_COLOURS[i % len(_COLOURS)], ls=style, label=name)
        axes.set(
            xlabel="share of samples looked at", ylabel="share of noisy samples found", xlim=(0, 1), ylim=(0, 1.02)
        )
        axes.legend(frameon=False, loc="lower right", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)

    return _draw(_WIDTH, 4.2, paint)


def heat(values: np.ndarray, rows: list[str], columns: list[str], low: float, high: float) -> str:
    """One cell for each row and column, as SVG; NaN stays empty."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    def paint(figure: Any, axes: Any) -> None:
        colours = ScalarMappable(Normalize(low, high), "cividis").to_rgba
        # Shapes, not a picture, which would be blurred where it is enlarged.
        axes.pcolormesh(np.ma.masked_invalid(values), cmap="cividis", vmin=low, vmax=high)
        axes.invert_yaxis()
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        for (i, j), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            # Black itself would be left out of the drawing, and become the page's own colour.
            ink = "#111111" if colours(value)[1] > 0.48 else "#ffffff"
            axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=10, color=ink)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    return _draw(max(5.0, 2 + 0.6 * len(columns)), max(2.5, 1.4 + 0.34 * len(rows)), paint)


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
    from matplotlib.ticker import NullFormatter

    def paint(figure: Any, axes: Any) -> None:
        # A few extreme gradients would squeeze the rest into one bar.
        low, high = np.quantile(scores, [0.005, 0.995])
        edges = np.linspace(low, high if high > low else low + 1, 61)
        if noise is None:
            axes.hist(scores.clamp(low, high).numpy(), edges, color=_COLOURS[0])
        else:
            known = [scores[rows].clamp(low, high).numpy() for rows in (~noise, noise)]
            axes.hist(known[0], edges, color=_COLOURS[0], label="clean")
            # An outline beside a filled shape, so that they are told apart without their colours.
            axes.hist(known[1], edges, color=_COLOURS[1], histtype="step", lw=2, label="noisy")
            axes.legend(frameon=False)
        # Few samples stand apart from many.
        axes.set(xlabel="score", ylabel="samples, log scale", yscale="log")
        # Plain numbers: powers of ten would be typeset as formulas, which takes longer than all else in a report.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)

    return _draw(_WIDTH, 4.2, paint)


def reliability(result: AuditResult) -> tuple[str, str] | None:
    """``(caption, svg)`` of how often labels were wrong that were said to be wrong with some probability."""
    bins = [one for one in result.facts.get("reliability") or () if one["count"]]
    if not bins:
        return None

    def paint(figure: Any, axes: Any) -> None:
        said, seen, many = (np.array([one[name] for one in bins], float) for name in ("predicted", "observed", "count"))
        axes.plot([0, 1], [0, 1], color=_FAINT, lw=1.2, ls=":", label="as said")
        axes.plot(said, seen, color=_COLOURS[0], lw=1.5)
        axes.scatter(said, seen, s=30 + 170 * many / many.max(), color=_COLOURS[0], label="found")
        for x, y, number in zip(said, seen, many, strict=True):
            axes.annotate(f"{number:.0f}", (x, y), xytext=(9, -11), textcoords="offset points", fontsize=10)
        axes.set(xlabel="said probability of a wrong label", ylabel="share that was wrong")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.05))
        axes.legend(frameon=False, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)

    caption = "How far the probability of a wrong label can be trusted: points near the dotted line were right."
    return f"{caption} Beside each point, the number of labels.", _draw(_WIDTH, 4.2, paint)
