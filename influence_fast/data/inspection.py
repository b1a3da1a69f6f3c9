"""What rows became: a few of them decoded with their targets marked, and counts over all."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from influence_fast.data.samples import Samples
from influence_fast.data.tasks import IGNORED, TOKEN_LOSSES

Piece = tuple[str, bool]
"""A stretch of decoded tokens, and whether they are targets."""


def counts(samples: Samples) -> dict[str, Any]:
    """Rows, tokens, targets, the longest row, rows cut, left out, empty and doubled, and labels by class.

    ``duplicates`` are rows whose tokens an earlier one has; ``conflicting`` are those of them with another label or target.
    """
    lengths = [sum(map(len, _lists(row["input_ids"]))) for row in samples.rows]
    targets = [
        sum(label != IGNORED for labels in _lists(row["labels"]) for label in labels)
        for row in samples.rows
        if isinstance(row.get("labels"), list)
    ]
    first: dict[Any, Any] = {}
    duplicates, conflicting = 0, 0
    for row in samples.rows:
        ids = tuple(map(tuple, _lists(row["input_ids"])))
        if ids in first:
            duplicates += 1
            conflicting += first[ids] != str(row.get("labels"))
        else:
            first[ids] = str(row.get("labels"))
    out: dict[str, Any] = {
        "rows": len(samples.rows),
        "tokens": sum(lengths),
        "longest": max(lengths, default=0),
        "mean length": round(sum(lengths) / max(1, len(lengths)), 1),
    }
    if samples.task in (*TOKEN_LOSSES, "seq2seq", "preference"):
        out["target tokens"] = sum(targets)
    out |= {
        "truncated": samples.truncated,
        "left out": len(samples.skipped),
        "empty": sum(problem.empty for problem in samples.skipped),
        "duplicates": duplicates,
        "conflicting duplicates": conflicting,
    }
    return out


def by_class(samples: Samples) -> dict[str, int]:
    """How many samples have each label, the most frequent first; of tagged words how many words."""
    if samples.task == "token-classification":
        tags = Counter(label for row in samples.rows for label in row["labels"] if label != IGNORED)
        return {str(samples.shown(tag)): count for tag, count in tags.most_common()}
    if samples.labels is None or samples.task == "regression":
        return {}
    return {str(label): count for label, count in Counter(samples.labels).most_common()}


def decoded(samples: Samples, number: int, tokenizer: Any) -> list[Piece]:
    """A sample's tokens as text, in stretches of targets and of others."""
    row, out = samples.rows[number], []
    labels = row.get("labels")
    if samples.task == "seq2seq":
        return [(_text(tokenizer, row["input_ids"]), False), (_text(tokenizer, labels or []), True)]
    if not isinstance(labels, list) or samples.task not in (*TOKEN_LOSSES, "preference"):
        label = "" if samples.labels is None else f" → {samples.labels[number]}"
        return [(_text(tokenizer, row["input_ids"]), False), *([(label, True)] if label else [])]
    for ids, marks in zip(_lists(row["input_ids"]), _lists(labels), strict=True):
        if samples.task == "token-classification":
            out += _tagged(samples, tokenizer, ids, marks)
            continue
        for target, group in itertools.groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1] != IGNORED):
            out.append((_text(tokenizer, [token for token, _ in group]), target))
        out.append(("\n", False))
    return out[:-1] if out and out[-1][0] == "\n" else out


def _tagged(samples: Samples, tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
    return [
        (_text(tokenizer, [token]) + ("" if label == IGNORED else f"/{samples.shown(label)}") + " ", label != IGNORED)
        for token, label in zip(ids, labels, strict=True)
    ]


def marked(pieces: Sequence[Piece]) -> str:
    """Pieces as one text, targets between ``«`` and ``»``."""
    return "".join(f"«{text}»" if target else text for text, target in pieces)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids))
    return str(tokenizer.decode([token for token in ids if token != IGNORED]))


def _lists(values: Any) -> list[list[Any]]:
    """One list, or several where they are nested."""
    if not isinstance(values, list):
        values = values.tolist() if hasattr(values, "tolist") else list(values)
    return values if values and isinstance(values[0], list) else [values]


def examined(samples: Samples, tokenizer: Any, shown: int = 3) -> Mapping[str, Any]:
    """Everything that ``influence-fast inspect`` prints."""
    rows = []
    for number in range(min(shown, len(samples.rows))):
        pieces = decoded(samples, number, tokenizer)
        rows.append(
            {
                "row": number if samples.ids is None else samples.ids[number],
                "where": samples.where[number] if samples.where else None,
                "tokens": sum(map(len, _lists(samples.rows[number]["input_ids"]))),
                "text": marked(pieces),
            }
        )
    return {
        "recognised": samples.form,
        "task": samples.task,
        "counts": counts(samples),
        "labels": by_class(samples),
        "rows": rows,
        "problems": [str(problem) for problem in samples.skipped],
    }
