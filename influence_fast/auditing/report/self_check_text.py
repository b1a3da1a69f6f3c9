"""What a self-check found, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What a self-check found, for a person who has not read the paper."""
    trial, steady, true = found["planted"], found["stability"], found["fidelity"]
    rows = trial["rows"]
    figure = {name: f"{row['auc_ndr']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for name, row in rows.items()}
    out = [
        f"Self-check: {trial['flips']} labels of a copy of {trial['samples']} samples were changed on purpose. The model "
        "never trained on them, and among the others there are mistakes too: compare the figures only with each other, and "
        "that with the loss not where the model has learned labels by heart.",
        f"Of {trial['candidates']} settings, {trial['chosen']} did best on one half of the queries. On the other it "
        f"has AUC_NDR {figure['chosen']}; the ranking shown here ({trial['default']}) {figure['default']}, the loss alone "
        f"{figure['loss']}, a random order {figure['random']}.",
        f"How much the choice matters: on that half the settings range from {trial['worst']:.3f} (worst) over "
        f"{trial['median']:.3f} (median) to {trial['best_in_hindsight']:.3f} (best, known only afterwards).",
    ]
    if rows["default"]["over_loss"][0] <= 0:
        out.append("For planted flips the ranking shown is not clearly better than sorting by the loss.")
    said = found["estimate"]
    if "skipped" in said:
        out.append(f"How well the wrong labels that are there are found: not estimated, {said['skipped']}.")
    else:
        figures = {
            name: f"{row['auc_ndr']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for name, row in said["rows"].items()
        }
        out.append(
            f"How well the wrong labels that are there are found, {said['share']:.0%} of all by the estimate above: AUC_NDR "
            f"{figures['default']} by the ranking shown, {figures['loss']} by the loss alone."
        )
    if "skipped" in steady:
        out.append(f"Stability over queries: not measured, {steady['skipped']}.")
    else:
        mean = sum(steady["overlaps"]) / len(steady["overlaps"])
        out.append(
            f"Stability: two disjoint halves of the queries agree on {mean:.0%} of the {steady['drop']:.0%} that would be "
            f"dropped ({min(steady['overlaps']):.0%} to {max(steady['overlaps']):.0%} over "
            f"{len(steady['overlaps'])} splits; {steady['chance']:.0%} by chance)."
            + (" More queries would help." if mean < 0.7 else "")
        )
    for path, share in found["checkpoints"].items():
        out.append(f"Stability: at the checkpoint {path}, {share:.0%} of what would be dropped is the same.")
    if "skipped" in true:
        return [*out, f"Fidelity: not measured, {true['skipped']}."]
    for name, values in true["correlation"].items():
        text = ", ".join(
            f"{method} {rho:.3f} (same {true['overlap'][name][method]:.0%} dropped)" for method, rho in values.items()
        )
        out.append(f"Fidelity of scores {name}, rank correlation with exact ones on {true['samples']} samples: {text}.")
    index = true["index"]
    if "recall" in index:
        out.append(
            f"Fidelity of the index that this store gets ({index['factory']}, {index['rows']:,} rows): "
            f"recall@10 {index['recall']:.3f} on the queries."
        )
    else:
        out.append(f"Fidelity of the index: not measured, {index['skipped']}.")
    return out
