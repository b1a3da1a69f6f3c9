"""Where a person works: one self-contained HTML file to review samples in, with plots and how far to trust them."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from influence_fast._files import atomic_write
from influence_fast.auditing.report.figures import plots, reliability
from influence_fast.auditing.report.rows import as_script, page_data
from influence_fast.auditing.report.self_check_text import sentences
from influence_fast.auditing.result import AuditResult
from influence_fast.evaluation.comparison import RankingKey

_HERE = Path(__file__).parent


def write_report(path: str | Path, result: AuditResult) -> None:
    """Write ``report.html`` whole or not at all: no fonts, images or scripts from elsewhere, and no script but its own."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    evaluation = result.evaluate() if result.noise is not None else []
    script = _script()
    text = environment.get_template("report.html.j2").render(
        headline=_headline(result),
        facts=_facts(result),
        findings=findings(result, evaluation),
        reliability=reliability(result),
        plots=plots(result, evaluation),
        main=result.main,
        evaluation=[row for row in evaluation if row["group"] in ("", "all")],
        config=json.dumps(result.config, indent=1),
        data=as_script(page_data(result)),
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    )
    atomic_write(path, text)


def _script() -> str:
    files = ("decisions.js", "page.js")
    # Names of a function's own: the page's elements are names of the window.
    code = "".join((_HERE / name).read_text(encoding="utf-8") for name in files)
    return f'(() => {{\n"use strict";\n{code}}})();\n'


def findings(result: AuditResult, evaluation: list[dict[str, Any]]) -> list[str]:
    """How far to trust the ranking, in plain sentences."""
    facts, out = result.facts, []
    out += [f"{facts[name]}." for name in ("held_out", "copies") if name in facts]
    if "skipped" in facts:
        problems = facts["skipped"]
        more = f"; and {len(problems) - 5} more (skipped.txt)" if len(problems) > 5 else ""
        left = "1 row was" if len(problems) == 1 else f"{len(problems)} rows were"
        out.append(f"{left} left out: {'; '.join(problems[:5])}{more}.")
    if "queries_correct" in facts:
        right, queries = facts["queries_correct"], facts["queries"]
        out.append(f"The model predicts {right} of {queries} queries correctly ({right / queries:.1%}).")
        if right < 50:
            few = "1 correct query is little" if right == 1 else f"{right} correct queries are few"
            out.append(f"{few}: the -c rankings rest on that alone and will be unstable.")
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
        how = "with weights that no query was asked for" if "held_out" in facts else "weighed by the trusted queries"
        out.append(f"The ranking shown pools estimates of each label's quality, {how}: {weights}.")
    agreements = list(agreement(result).items())
    if agreements:
        text = ", ".join(f"{a} and {b} {value:.2f}" for (a, b), value in agreements)
        out.append(f"Rank correlation between methods ({' '.join(result.main[1:])}): {text}.")
        if min(value for _, value in agreements) < 0.3:
            out.append("The methods disagree widely: read the samples before removing any.")
    if "training" in facts:
        out.append(_training(result))
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
        return (
            f"{text}; calibrated on {found['calibrated_on']}. Any row counts as equally likely to be wrong: where those are "
            "wrong whose right label is hard to tell, there are more."
        )
    return (
        f"{text}. There was nothing to calibrate this on: labels that the model has learned by heart look right to it."
    )


def _training(result: AuditResult) -> str:
    """How the ranking stands to what training itself told, with noise known or not."""
    from scipy.stats import spearmanr

    about, main = result.facts["training"], result.rankings[result.main]
    found = [
        f"{name} {float(spearmanr(main, result.baselines[name]).statistic):.2f}"
        for name in ("aum", "mean_loss")
        if name in result.baselines and float(main.std()) and float(result.baselines[name].std())
    ]
    text = f"Losses and margins of {about['epochs']} epochs of training were recorded"
    if about["never_seen"]:
        text += f", without {about['never_seen']} rows that no epoch saw, which count as average"
    return f"{text}. Rank correlation with the ranking shown: {', '.join(found) or 'not defined'}."


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


def _headline(result: AuditResult) -> list[tuple[str, str]]:
    facts = result.facts
    out = [("Training samples", f"{len(result.ids):,}"), ("Trusted queries", f"{facts['queries']:,}")]
    wrong = facts.get("wrong_labels")
    if isinstance(wrong, Mapping):
        interval = "" if wrong.get("low") is None else f" ({round(wrong['low']):,} to {round(wrong['high']):,})"
        out.append(("Labels likely wrong", f"{round(wrong['estimate']):,}{interval}"))
    elif wrong is not None:
        out.append(("Labels likely wrong", f"{round(wrong * len(result.ids)):,} ({wrong:.1%})"))
    if "train_accuracy" in facts:
        out.append(("Training accuracy", f"{facts['train_accuracy']:.1%}"))
    if facts.get("queries_correct") is not None:
        out.append(("Query accuracy", f"{facts['queries_correct'] / facts['queries']:.1%}"))
    return out


def _facts(result: AuditResult) -> list[tuple[str, str]]:
    facts = result.facts
    out = [
        ("Layers", f"{facts['layers']:,}"),
        ("Numbers per sample", f"{facts['numbers_per_sample']:,}"),
        ("Store", f"{facts['bytes'] / 2**20:,.1f} MiB"),
    ]
    if facts.get("trained"):
        share = facts["covered"] / facts["trained"]
        out.append(("Trained numbers in these layers", f"{facts['covered']:,} of {facts['trained']:,} ({share:.1%})"))
    if "captured" in facts:
        out.append(("Captured", facts["captured"]))
    return out + [(f"Time for {name}", f"{seconds:.1f} s") for name, seconds in facts["seconds"].items()]
