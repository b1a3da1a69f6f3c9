"""What an audit says of one training row."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = (
    "wrong label",
    "conflicting duplicate",
    "hurts one group",
    "far from everything",
    "duplicate",
    "atypical but right",
    "unremarkable",
)


@dataclass
class Finding:
    """Of one training row; what is not known is None or empty.

    Attributes:
        id: of the row.
        given_label, predicted_label, suggested_label: its own, the model's, and the better one (its own where none is).
        label_probability: that the given label is right.
        wrong_probability: that it is wrong, calibrated on trusted rows.
        kind: one of "wrong label", "conflicting duplicate", "hurts one group", "far from everything", "duplicate",
            "atypical but right", "unremarkable".
        reason: a sentence that says why.
        duplicates: ids of rows with the same text or nearly so, those with another label first.
        neighbours: ``{id, label, similarity}`` of the nearest training rows with another label.
        hurts, helps: ``{id, label, influence}`` of the trusted queries that it hurts and helps most.
        tokens: ``{text, influence}`` of its tokens in order.
    """

    id: int | str
    given_label: Any = None
    predicted_label: Any = None
    suggested_label: Any = None
    label_probability: float | None = None
    wrong_probability: float | None = None
    kind: str = "unremarkable"
    reason: str = ""
    duplicates: list[int | str] = field(default_factory=list)
    neighbours: list[dict[str, Any]] = field(default_factory=list)
    hurts: list[dict[str, Any]] = field(default_factory=list)
    helps: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """A dict that JSON holds."""
        return asdict(self)


@dataclass
class Evidence:
    """Of the most harmful rows, in their order.

    Attributes:
        rows: their numbers.
        neighbours: ``(row, cosine)`` of the nearest training rows with another label.
        hurts, helps: ``(query, influence)`` of those that a row hurts and helps most.
        groups: the one group of queries that a row hurts.
        tokens: ``{text, influence}`` of its tokens.
        facts: which layer the tokens' influence is of, or why there is none.
    """

    rows: list[int]
    neighbours: list[list[tuple[int, float]]]
    hurts: list[list[tuple[int, float]]]
    helps: list[list[tuple[int, float]]]
    groups: list[str | None]
    tokens: list[list[dict[str, Any]]]
    facts: dict[str, Any]
