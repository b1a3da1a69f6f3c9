"""What an audit found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from influence_fast.auditing.findings.finding import Finding
from influence_fast.errors import InputError
from influence_fast.evaluation.comparison import Evaluation, RankingKey, compare
from influence_fast.evaluation.metrics import order


@dataclass
class AuditResult:
    """What an audit found. Scores are lowest for the most harmful sample, everywhere.

    Attributes:
        ids, texts, labels, noise: of the training samples; ``noise`` is a boolean ``(n,)`` or None.
        groups: layer group -> layers.
        rankings: scores of every ranking, float64 ``(n,)``; the baselines ``random``, ``loss`` (highest loss first) and
            ``self-influence`` (largest ``|g|^2`` first) come first.
        main: the ranking that orders ``scores.csv``.
        config: the audit's settings, as ``config.json`` has them.
        facts: sizes, times and counts that the report states.
        predicted, suggested: labels of each sample by the model and by all that the pool knows, as ``labels`` are; None
            where there are no classes, or nothing to suggest by.
        label_probability: that the given label is right, float64 ``(n,)``; None where nothing says it.
        wrong_probability: that it is wrong, calibrated on trusted rows, float64 ``(n,)``; None without enough of those.
        findings: of each sample its kind, why, and the evidence, in the order of ``ids``.
    """

    ids: Sequence[int | str]
    texts: list[str] | None
    labels: list[Any] | None
    noise: Tensor | None
    groups: dict[str, list[str]]
    rankings: dict[RankingKey, Tensor]
    main: RankingKey
    config: dict[str, Any]
    facts: dict[str, Any]
    predicted: list[Any] | None = None
    suggested: list[Any] | None = None
    label_probability: Tensor | None = None
    wrong_probability: Tensor | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """The same without baselines: method -> group -> aggregation -> scores."""
        out: dict[str, dict[str, dict[str, Tensor]]] = {}
        for key, scores in self.rankings.items():
            if not key.is_baseline:
                out.setdefault(key.method, {}).setdefault(key.group, {})[key.aggregation] = scores
        return out

    @property
    def baselines(self) -> dict[str, Tensor]:
        """Scores of the baselines, by name."""
        return {key.method: scores for key, scores in self.rankings.items() if key.is_baseline}

    @property
    def ranking(self) -> Tensor:
        """Row numbers, most harmful first; votes that tie are ordered by rank, then by row."""
        base, _, correct = self.main.aggregation.partition("-")
        tie = self.main._replace(aggregation="rank" + (f"-{correct}" if correct else ""))
        return order(self.rankings[self.main], self.rankings.get(tie) if base == "vote" else None)

    def compare(self, levels: Sequence[float] = (0.1, 0.2, 0.3)) -> Evaluation:
        """Every ranking measured against ``noise`` (:func:`~influence_fast.compare`).

        Raises:
            InputError: the noise is not known.
        """
        if self.noise is None:
            raise InputError("noise: this audit does not know which samples are noisy")
        return compare(self.rankings, self.noise, levels=levels)

    def evaluate(self, at: float = 0.3) -> list[dict[str, Any]]:
        """One row of metrics per ranking, as of :meth:`compare`, with ``ndr`` and ``precision`` at one level."""
        name = f"{100 * at:g}"
        return [
            {**row, "ndr": row[f"ndr@{name}"], "precision": row[f"precision@{name}"]}
            for row in self.compare(sorted({0.1, 0.2, 0.3, at})).rows
        ]
