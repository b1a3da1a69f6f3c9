"""``scores.csv`` and ``findings.jsonl``: one row a training sample, with its score, its rank, and what else is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from influence_fast._csv import as_text
from influence_fast.auditing.result import AuditResult
from influence_fast.evaluation.comparison import RIVALS

_PREFERRED = ("rank-c", "rank", "mean")


def scores_csv(result: AuditResult) -> str:
    """The table as text: id, score, rank (0 = most harmful), label and noise where known, baselines, groups, text."""
    ranking = result.ranking
    place = torch.empty_like(ranking)
    place[ranking] = torch.arange(len(ranking))
    main = result.rankings[result.main]
    columns: dict[str, Callable[[int], Any]] = {
        "id": lambda i: result.ids[i],
        "score": lambda i: float(main[i]),
        "rank": lambda i: int(place[i]),
    }
    if result.labels is not None:
        labels = result.labels
        columns["label"] = lambda i: labels[i]
    if result.noise is not None:
        noise = result.noise
        columns["noise"] = lambda i: int(noise[i])
    probability, wrong = result.label_probability, result.wrong_probability
    judged = {
        "predicted_label": result.predicted,
        "suggested_label": result.suggested,
        "label_probability": None if probability is None else probability.tolist(),
        "wrong_probability": None if wrong is None else wrong.tolist(),
        "kind": [finding.kind for finding in result.findings] or None,
    }
    for name, found in judged.items():
        if found is not None:
            columns[name] = lambda i, found=found: found[i]  # type: ignore[misc]
    baselines = result.baselines
    columns["loss"] = lambda i: float(-baselines["loss"][i])
    columns["self_influence"] = lambda i: float(-baselines["self-influence"][i])
    for name, rival in baselines.items():
        if name in RIVALS:
            columns[name] = lambda i, rival=rival: float(rival[i])  # type: ignore[misc]
    method, aggregation = _by_group(result)
    for key, values in result.rankings.items():
        if (key.method, key.aggregation) == (method, aggregation):
            columns[f"{method} {aggregation}: {key.group}"] = lambda i, values=values: float(values[i])  # type: ignore[misc]
    if result.texts is not None:
        texts = result.texts
        columns["text"] = lambda i: texts[i]
    makers = list(columns.values())
    return as_text(list(columns), ([make(i) for make in makers] for i in range(len(result.ids))))


def findings_lines(result: AuditResult) -> str:
    """``findings.jsonl``: one object a training row, most harmful first."""
    lines = (result.findings[i].document() for i in result.ranking.tolist())
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)


def _by_group(result: AuditResult) -> tuple[str, str]:
    """Whose scores are given by layer group: the main ranking's, or influence where that has none of the model's layers."""
    method, _, aggregation = result.main
    own = {key.group for key in result.rankings if key.method == method}
    if set(result.groups) & own - {"all"}:
        return method, aggregation
    others = [(key.method, key.aggregation) for key in result.rankings if key.group == "all"]
    methods = ["cosine", *dict.fromkeys(name for name, _ in others)]
    return next(((m, a) for m in methods for a in _PREFERRED if (m, a) in others), (method, aggregation))
