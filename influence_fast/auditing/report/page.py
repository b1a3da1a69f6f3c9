"""What a person reads: one self-contained HTML file with plots, the worst samples, and how far to trust them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from influence_fast._files import atomic_write
from influence_fast.auditing.report.figures import plots
from influence_fast.auditing.report.self_check_text import sentences
from influence_fast.auditing.result import AuditResult
from influence_fast.evaluation.comparison import RankingKey

_SHOWN = 50


def write_report(path: str | Path, result: AuditResult) -> None:
    """Write ``report.html`` whole or not at all: no scripts, no fonts, no images from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    evaluation = result.evaluate() if result.noise is not None else []
    text = environment.get_template("report.html.j2").render(
        facts=_facts(result),
        findings=findings(result, evaluation),
        plots=plots(result, evaluation),
        worst=_worst(result),
        main=result.main,
        evaluation=[row for row in evaluation if row["group"] in ("", "all")],
        config=json.dumps(result.config, indent=1),
        noise_known=result.noise is not None,
    )
    atomic_write(path, text)


def findings(result: AuditResult, evaluation: list[dict[str, Any]]) -> list[str]:
    """How far to trust the ranking, in plain sentences."""
    facts, out = result.facts, []
    if "held_out" in facts:
        out.append(f"{facts['held_out']}.")
    if "skipped" in facts:
        problems = facts["skipped"]
        more = f"; and {len(problems) - 5} more (skipped.txt)" if len(problems) > 5 else ""
        out.append(f"{len(problems)} rows were left out: {'; '.join(problems[:5])}{more}.")
    if "queries_correct" in facts:
        right, queries = facts["queries_correct"], facts["queries"]
        out.append(f"The model predicts {right} of {queries} queries correctly ({right / queries:.1%}).")
        if right < 50:
            out.append(f"{right} correct queries are few: the -c rankings rest on them alone and will be unstable.")
    if evaluation:
        out += _measured(result, evaluation)
    else:
        out.append("No column says which samples are bad, so the quality of the ranking is not measured here.")
    if "wrong_labels" in facts:
        out.append(_wrong_labels(facts["wrong_labels"], len(result.ids)))
    if "not_calibrated" in facts:
        out.append(f"No label has a calibrated probability of being wrong: {facts['not_calibrated']}.")
    if result.main.method == "pool" and "pool_weights" in facts:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in facts["pool_weights"].items())
        out.append(
            f"The ranking shown pools estimates of each label's quality, weighed by the trusted queries: {weights}."
        )
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


def _wrong_labels(found: Any, samples: int) -> str:
    """The estimate for the whole set, from a share alone or with its interval and what it was calibrated on."""
    if not isinstance(found, Mapping):
        return (
            f"By the pool's estimate {found:.1%} of the labels are wrong, about {round(found * samples)}. "
            "Labels that the model has learned by heart look right to it, so there may be more."
        )
    text = f"About {round(found['estimate']):,} of {samples:,} labels are wrong"
    if found.get("low") is not None and found.get("high") is not None:
        text += f", {round(found['low']):,} to {round(found['high']):,}"
    if found.get("calibrated_on"):
        return f"{text}; calibrated on {found['calibrated_on']}."
    return (
        f"{text}. There was nothing to calibrate this on: labels that the model has learned by heart look right to it."
    )


def _measured(result: AuditResult, evaluation: list[dict[str, Any]]) -> list[str]:
    baselines = [row for row in evaluation if _key(row).is_baseline]
    ours = [row for row in evaluation if not _key(row).is_baseline]
    best, rival = (max(rows, key=lambda row: row["auc_ndr"]) for rows in (ours, baselines))
    main = next(row for row in ours if _key(row) == result.main)
    out = [
        f"The ranking shown ({_key(main)}) has AUC_NDR {main['auc_ndr']:.3f}; the best of {len(ours)} influence "
        f"rankings ({_key(best)}) has {best['auc_ndr']:.3f}, chosen after the fact, which flatters it."
    ]
    if rival["auc_ndr"] >= best["auc_ndr"]:
        out.append(
            f"The baseline {_key(rival)} wins: AUC_NDR {rival['auc_ndr']:.3f}, more than every influence ranking. "
            "For finding these flips, sorting by it is better and cheaper."
        )
    elif rival["auc_ndr"] >= main["auc_ndr"]:
        out.append(f"The baseline {_key(rival)} ({rival['auc_ndr']:.3f}) beats the ranking shown.")
    else:
        out.append(f"The best baseline, {_key(rival)}, has {rival['auc_ndr']:.3f}.")
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

    alike = {key.method: scores for key, scores in result.rankings.items() if key[1:] == result.main[1:]}
    found = {}
    for a, b in itertools.combinations(alike, 2):
        if float(alike[a].std()) and float(alike[b].std()):
            found[a, b] = float(spearmanr(alike[a], alike[b]).statistic)
    return found


def _key(row: dict[str, Any]) -> RankingKey:
    return RankingKey(row["method"], row["group"], row["aggregation"])


def _facts(result: AuditResult) -> list[tuple[str, str]]:
    facts = result.facts
    out = [
        ("Training samples", f"{facts['samples']:,}"),
        ("Queries", f"{facts['queries']:,}"),
        ("Layers", f"{facts['layers']:,}"),
        ("Numbers per sample", f"{facts['numbers_per_sample']:,}"),
        ("Store", f"{facts['bytes'] / 2**20:,.1f} MiB"),
    ]
    if facts.get("trained"):
        share = facts["covered"] / facts["trained"]
        out.append(("Trained numbers in these layers", f"{facts['covered']:,} of {facts['trained']:,} ({share:.1%})"))
    if "captured" in facts:
        out.append(("Captured", facts["captured"]))
    if "train_accuracy" in facts:
        out.append(("Accuracy on the training labels", f"{facts['train_accuracy']:.1%}"))
    return out + [(f"Time for {name}", f"{seconds:.1f} s") for name, seconds in facts["seconds"].items()]


def _worst(result: AuditResult) -> list[dict[str, Any]]:
    scores, loss = result.rankings[result.main], result.baselines["loss"]
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
