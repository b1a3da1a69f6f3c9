"""Results of audits as the report gets them, without an audit."""

from __future__ import annotations

from typing import Any

import torch

import influence_fast as inf
from influence_fast.auditing.result import AuditResult


def audit_result(texts: list[str], labels: list[Any] | None, ids: list[Any] | None = None, **facts: Any) -> AuditResult:
    """The first sample is the most harmful one, and so on; two labels look exchanged."""
    n = len(texts)
    scores = torch.arange(n).double() - 1
    main = inf.RankingKey("cosine", "all", "rank")
    rankings = {inf.RankingKey(name): scores.flip(0) for name in ("random", "loss", "self-influence")}
    known = {
        "samples": n, "queries": 10, "queries_correct": 9, "layers": 2, "numbers_per_sample": 8, "bytes": 1 << 20,
        "zero_gradients": 0, "seconds": {"cosine": 0.1}, "task": "classification", **facts,
    }  # fmt: skip
    result = AuditResult(
        list(range(n)) if ids is None else ids, texts, labels, None, {"all": ["l"]}, {**rankings, main: scores}, main,
        {"model": "m"}, known,
    )  # fmt: skip
    if labels is not None:
        result.suggested = result.predicted = [labels[1], labels[0], *labels[2:]]
        result.label_probability = torch.linspace(0.02, 1, n, dtype=torch.float64)
    return result


def with_findings(result: AuditResult) -> AuditResult:
    """What an audit says of each sample beside its score, as :attr:`AuditResult.findings` has it."""
    labels, ids = result.labels or [], result.ids
    found = [
        {
            "id": ids[i],
            "given_label": labels[i],
            "predicted_label": labels[i],
            "suggested_label": result.suggested[i] if result.suggested else None,
            "label_probability": 0.5,
            "wrong_probability": 1 - i / len(ids),
            "kind": ("wrong label", "conflicting duplicate", "unremarkable")[min(i, 2)],
            "reason": f"Reason {i}.",
            "duplicates": [ids[-1]] if i == 1 else [],
            "neighbours": [{"id": ids[-1], "label": labels[-1], "similarity": 0.75}],
            "hurts": [{"id": "q1", "label": labels[0], "influence": -0.5}],
            "helps": [{"id": "q2", "label": labels[0], "influence": 0.25}],
            "tokens": [{"text": "very", "influence": -1.0}, {"text": "good", "influence": 0.5}],
        }
        for i in range(len(ids))
    ]
    result.findings = found  # type: ignore[attr-defined,unused-ignore]
    return result
