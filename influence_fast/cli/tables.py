"""Tables of rankings."""

from __future__ import annotations

from typing import Any

from influence_fast.cli.options import print_table


def show_evaluation(evaluation: list[dict[str, Any]], at: float = 0.3) -> None:
    """The baselines, then a table of layer group x aggregation for each method."""
    cells = {(row["method"], row["group"], row["aggregation"]): row for row in evaluation}
    rows = [
        [method, row["ndr"], row["auc_ndr"], f"{row['low']:.3f} to {row['high']:.3f}"]
        for (method, group, _), row in cells.items()
        if not group
    ]
    level = f"NDR@{100 * at:g}"
    print_table(["baseline", level, "AUC_NDR", "95 % interval"], rows)
    for method in dict.fromkeys(method for method, group, _ in cells if group):
        groups = dict.fromkeys(g for m, g, _ in cells if m == method and g and not g.startswith("block"))
        aggregations = list(dict.fromkeys(a for m, _, a in cells if m == method))
        rows = [
            [group, *(cells[method, group, a][metric] for a in aggregations for metric in ("ndr", "auc_ndr"))]
            for group in groups
        ]
        print_table([method, *([a, metric] for a in aggregations for metric in (level, "AUC_NDR"))], rows)


def show_wins(found: Any, most: int = 8) -> None:
    """How often each of the best rankings, and each baseline, beats the others."""
    ours = sorted((i for i, row in enumerate(found.rows) if row["group"]), key=lambda i: -found.rows[i]["auc_ndr"])
    shown = [i for i, row in enumerate(found.rows) if not row["group"]] + ours[:most]
    names = [" ".join(filter(None, (row["method"], row["group"], row["aggregation"]))) for row in found.rows]
    rows = [[f"{i}: {names[a]}", *(f"{float(found.wins[a, b]):.2f}" for b in shown)] for i, a in enumerate(shown)]
    title = "Share of resamples in which the row's AUC_NDR beats the column's"
    print_table(["ranking", *(str(i) for i in range(len(shown)))], rows, title)
