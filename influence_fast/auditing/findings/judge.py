"""All findings of an audit: labels calibrated where trusted rows allow it, duplicates, and the kind of each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_fast.attribution.method_inputs import CLASSES, PROBE, VOTES, MethodInputs
from influence_fast.auditing.findings.calibration import LEAST_TRUSTED, calibrate
from influence_fast.auditing.findings.duplicates import compared, find_duplicates
from influence_fast.auditing.findings.estimates import untouched_estimates
from influence_fast.auditing.findings.finding import Evidence, Finding
from influence_fast.auditing.findings.kinds import far_away, name_kind
from influence_fast.auditing.findings.labels import label_findings

# Duplicates named of a row; trusted rows that a calibration takes.
_COPIES, _CALIBRATED_ON = 20, 2000


@dataclass
class Judged:
    """What an audit knows of the labels of all rows.

    Attributes:
        suggested: numbers of the suggested classes, int64 ``(n,)``.
        right, wrong: probability that a label is right, and calibrated that it is wrong, float64 ``(n,)``.
        facts: ``wrong_labels`` and ``reliability`` for the report.
    """

    suggested: Tensor | None
    right: Tensor | None
    wrong: Tensor | None
    facts: dict[str, Any]


def judge_labels(inputs: MethodInputs, trusted: bool) -> Judged:
    """Of a classifier: suggestions and probabilities, and how many labels are wrong, with an interval.

    Args:
        inputs: of the audit, its methods run.
        trusted: whether the queries are rows that a person trusts, and no held-out training rows.
    """
    if inputs.task != "classification":
        return Judged(None, None, None, {})
    given, own = (torch.tensor(part) for part in inputs.labels())
    n, suggested, right = len(given), None, None
    facts: dict[str, Any] = {}
    pooled = inputs.kept(CLASSES)
    if pooled is not None:
        found = label_findings(pooled, given)
        suggested, right = found.suggested, found.probability
        facts["wrong_labels"] = {
            "estimate": found.share * n, "low": None, "high": None, "share": found.share, "calibrated_on": None,
            "method": "expectation maximisation over what the pool says, not calibrated: labels that the model has learned "
            "by heart look right to it",
        }  # fmt: skip
    # The pool's votes and probe are of these queries.
    rows = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[:_CALIBRATED_ON]
    why = ""
    if not trusted:
        why = "the queries are held-out training rows, whose labels nobody vouches for"
    elif len(own) < LEAST_TRUSTED:
        why = f"{len(own)} trusted rows are too few, {LEAST_TRUSTED} are the least"
    estimates = {}
    if not why:
        asked_rows, votes = [inputs.trusted.rows[i] for i in rows.tolist()], inputs.kept(VOTES)
        estimates = untouched_estimates(inputs.model, inputs.samples.rows, asked_rows, inputs.kept(PROBE), votes)
        if not estimates:
            why = "a class has fewer than 5 rows, or rows have no token ids"
    train, asked = ({name: both[side] for name, both in estimates.items()} for side in (0, 1))
    calibrated = calibrate(train, given, asked, own[rows]) if estimates else None
    if calibrated is None:
        facts["not_calibrated"] = (
            why or "words and hidden states do not tell right labels of trusted rows from wrong ones"
        )
        return Judged(suggested, right, None, facts)
    facts["wrong_labels"] = {
        "estimate": calibrated.share * n,
        "low": calibrated.low * n,
        "high": calibrated.high * n,
        "share": calibrated.share,
        "calibrated_on": f"{len(rows):,} trusted rows, each also with a wrong label",
        "method": "adjusted counting by " + ", ".join(estimates) + ", fitted without the row at hand; 95 % interval",
        "calibration_error": calibrated.error,
    }
    facts["reliability"] = calibrated.reliability
    if suggested is None:
        said = torch.stack(list(train.values())).clamp_min(-30).mean(0)
        suggested = torch.where(calibrated.wrong >= 0.5, said.scatter(1, given[:, None], -torch.inf).argmax(1), given)
    return Judged(suggested, 1 - calibrated.wrong, calibrated.wrong, facts)


def find(inputs: MethodInputs, judged: Judged, predicted: Tensor | None, evidence: Evidence) -> list[Finding]:
    """Findings in the order of the rows.

    Args:
        inputs, judged: of the audit.
        predicted: the model's classes, int64 ``(n,)``.
        evidence: on some of the rows.
    """
    samples = inputs.samples
    n, ids = len(samples), inputs.train.ids  # type: ignore[union-attr]
    labels = torch.tensor(inputs.labels()[0]) if inputs.task == "classification" else None
    shown = samples.labels
    findings = [Finding(ids[i], given_label=None if shown is None else shown[i]) for i in range(n)]
    _label(findings, inputs, judged, predicted)
    other_labels = _copies(findings, inputs, labels)
    votes = inputs.kept(VOTES)
    far, rare = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    if labels is not None and predicted is not None:
        rare |= predicted != labels
    if labels is not None and votes is not None:
        far = far_away(votes[0].sum(1) / votes[2])
        rare |= votes[0].argmax(1) != labels
    harmed = dict(zip(evidence.rows, evidence.groups, strict=True))
    for i, finding in enumerate(findings):
        name_kind(finding, other_labels[i], bool(far[i]), harmed.get(i), bool(rare[i]))
    _add_evidence(findings, evidence, inputs)
    return findings


def _add_evidence(findings: list[Finding], evidence: Evidence, inputs: MethodInputs) -> None:
    names, labels = inputs.queries.ids, inputs.trusted.labels  # type: ignore[union-attr]

    def asked(found: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [
            {"id": names[q], "label": None if labels is None else labels[q], "influence": value} for q, value in found
        ]

    for place, i in enumerate(evidence.rows):
        one = findings[i]
        one.hurts, one.helps, one.tokens = (
            asked(evidence.hurts[place]),
            asked(evidence.helps[place]),
            evidence.tokens[place],
        )
        one.neighbours = [
            {"id": findings[j].id, "label": findings[j].given_label, "similarity": value}
            for j, value in evidence.neighbours[place]
        ]


def _label(findings: list[Finding], inputs: MethodInputs, judged: Judged, predicted: Tensor | None) -> None:
    shown = inputs.samples.shown
    for i, finding in enumerate(findings):
        if predicted is not None:
            finding.predicted_label = shown(int(predicted[i]))
        if judged.suggested is not None:
            finding.suggested_label = shown(int(judged.suggested[i]))
        if judged.right is not None:
            finding.label_probability = float(judged.right[i])
        if judged.wrong is not None:
            finding.wrong_probability = float(judged.wrong[i])


def _copies(findings: list[Finding], inputs: MethodInputs, labels: Tensor | None) -> list[int]:
    """Fill in duplicates; how many of those named have another label."""
    samples = inputs.samples
    conflicts = [0] * len(findings)
    given = None if labels is None else labels.tolist()
    for group in find_duplicates(compared(samples)):
        by_label: dict[Any, list[int]] = {}
        for i in group:
            by_label.setdefault(None if given is None else given[i], []).append(i)
        for label, members in by_label.items():
            others = [i for name, rows in by_label.items() if name != label for i in rows[:_COPIES]][:_COPIES]
            # One more than are named, since a row is not its own duplicate.
            same = members[: _COPIES + 1]
            for i in members:
                named = [*others, *(j for j in same if j != i)][:_COPIES]
                findings[i].duplicates = [findings[j].id for j in named]
                conflicts[i] = len(others)
    return conflicts
