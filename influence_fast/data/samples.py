"""Rows of texts and labels become model inputs: tokenised, labels as class numbers, targets marked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.data.tasks import CLASS_LOSSES, IGNORED, SPAN, head_of, loss_of, unwrapped
from influence_fast.errors import InputError

TASKS = ("auto", "classification", "causal-lm")


@dataclass
class Samples:
    """Rows for the model, and what a report prints of them."""

    rows: list[dict[str, Any]]
    texts: list[str] | None
    labels: list[Any] | None
    noise: Tensor | None
    ids: list[int | str] | None


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. ``text`` may name several, joined by commas: a text pair."""

    text: str = "text"
    label: str = "label"
    answer: str | None = None
    noise: str | None = None


def task_of(task: str, model: nn.Module, rows: Any) -> str:
    """``auto`` made definite, by the labels of rows that are tokenised already or by the model's class."""
    if task != "auto":
        return task
    if _prepared(rows[0]):
        return loss_of(model, rows[0])
    head = head_of(model) or "classification"
    if head not in TASKS:
        raise InputError(
            f"task: texts can be made samples of classification and causal-lm alone, and this is a "
            f"{type(unwrapped(model)).__name__}; give rows with 'input_ids' and what {head} needs"
        )
    return head


def prepare(argument: str, rows: Any, columns: Columns, task: str, model: nn.Module, tokenizer: Any) -> Samples:
    """Rows for the model. Rows that hold ``input_ids`` and ``labels`` pass as they are; errors name ``argument``."""
    there = list(rows[0])
    ids = [row["id"] for row in rows] if "id" in there else None
    noise = _flags(argument, columns.noise, _column(argument, rows, columns.noise)) if columns.noise else None
    if _prepared(rows[0]):
        kept = [dict(row) for row in rows]
        own = [str(row["text"]) for row in rows] if "text" in there else None
        return Samples(kept, own, [row["labels"] for row in kept] if task in CLASS_LOSSES else None, noise, ids)
    if tokenizer is None:
        raise InputError(f"tokenizer: none is given, and {argument} has no 'input_ids' and 'labels' columns")
    parts = [_column(argument, rows, name) for name in columns.text.split(",")]
    texts = list(zip(*parts, strict=True))
    for row, text in enumerate(texts):
        if not all(isinstance(part, str) for part in text):
            raise InputError(f"{argument}: row {row} has no text in {columns.text!r}")
    joined = [" | ".join(text) for text in texts]
    if task == "classification":
        labels = _labels(argument, columns.label, _column(argument, rows, columns.label), model)
        encoded = tokenizer(*parts, verbose=False)
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
        prepared = [{**{key: encoded[key][i] for key in keys}, "labels": label} for i, label in enumerate(labels)]
        return Samples(prepared, joined, labels, noise, ids)
    if columns.answer is None:
        return Samples([_causal(tokenizer, text, None) for text in joined], joined, None, noise, ids)
    answers = _column(argument, rows, columns.answer)
    prepared = [_causal(tokenizer, text, answer) for text, answer in zip(joined, answers, strict=True)]
    return Samples(
        prepared, [f"{text}{answer}" for text, answer in zip(joined, answers, strict=True)], None, noise, ids
    )


def _prepared(row: Mapping[str, Any]) -> bool:
    return "input_ids" in row and ("labels" in row or all(name in row for name in SPAN))


def _causal(tokenizer: Any, text: str, answer: str | None) -> dict[str, Any]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    if answer is None:
        return {"input_ids": ids, "labels": ids}
    target = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    target = [*target, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else target
    return {"input_ids": ids + target, "labels": [IGNORED] * len(ids) + target}


def _column(argument: str, rows: Any, name: str) -> list[Any]:
    if name not in rows[0]:
        raise InputError(f"{argument}: has no column {name!r}; there are {', '.join(rows[0])}")
    return [row[name] for row in rows]


def _labels(argument: str, column: str, values: list[Any], model: nn.Module) -> list[int]:
    known = getattr(getattr(model, "config", None), "label2id", None) or {}
    out = []
    for row, value in enumerate(values):
        if isinstance(value, str):
            if value not in known:
                raise InputError(
                    f"{argument}: row {row} has {column} {value!r}, the model knows {', '.join(map(str, known))}"
                )
            value = known[value]
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{argument}: row {row} has {column} {value!r}, expected an int or a class name")
        out.append(value)
    return out


def _flags(argument: str, column: str | None, values: list[Any]) -> Tensor:
    bad = [row for row, value in enumerate(values) if value not in (0, 1, True, False)]
    if bad:
        raise InputError(f"{argument}: row {bad[0]} has {column} {values[bad[0]]!r}, expected true or false")
    flags = torch.tensor([bool(value) for value in values])
    if flags.all() or not flags.any():
        raise InputError(
            f"{argument}: {column!r} marks {int(flags.sum())} of {len(flags)} samples; nothing to tell apart"
        )
    return flags
