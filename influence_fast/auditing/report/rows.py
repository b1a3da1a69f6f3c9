"""What the page holds of each sample: values that JSON has, and texts cut to what a person reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from influence_fast import _csv
from influence_fast.auditing.result import AuditResult

#: Samples on the page; ``scores.csv`` has all of them.
SHOWN = 2000
_TEXT = 4000
_OTHER_TEXT = 400
#: Neighbours, queries and duplicates shown of each sample; tokens at most.
_EVIDENCE = 8
_TOKENS = 400
#: More different labels than this are no classes to choose from, and a new one is typed.
_CLASSES = 2000
_ANSWERED = ("causal-lm", "seq2seq")


def page_data(result: AuditResult) -> dict[str, Any]:
    """Everything that the page's script reads: the samples most to be doubted, and what is known of each.

    Ids and labels are texts as ``scores.csv`` gives them back, so that an exported review names what ``clean`` finds.
    """
    ids = [_as_read(name) for name in result.ids]
    found = {_as_read(_of(finding, "id")): finding for finding in getattr(result, "findings", None) or ()}
    order = result.ranking[:SHOWN].tolist()
    rows = [_row(result, ids, i, place, found.get(ids[i])) for place, i in enumerate(order)]
    labels = None if result.labels is None else sorted({_as_read(label) for label in result.labels}, key=_natural)
    return {
        "audit": _identity(result, ids),
        "total": len(ids),
        "labels": labels if labels is not None and len(labels) <= _CLASSES else None,
        "relabel": _relabel(result),
        "rows": rows,
        "others": _others(result, ids, rows),
    }


def as_script(data: Any) -> str:
    """JSON that can stand within ``<script>``: no ``<`` ends it, and no character needs an encoding."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _row(result: AuditResult, ids: list[str], i: int, place: int, finding: Any) -> dict[str, Any]:
    text = "" if result.texts is None else result.texts[i]
    right, wrong = _number(result.label_probability, i), _finite(_of(finding, "wrong_probability"))
    if (own := _finite(_of(finding, "label_probability"))) is not None:
        right = own
    row = {
        "id": ids[i],
        "place": place,
        "text": text[:_TEXT],
        "more": max(0, len(text) - _TEXT),
        "label": _first(_label(result.labels, i), _of(finding, "given_label")),
        "predicted": _first(_of(finding, "predicted_label"), _label(result.predicted, i)),
        "suggested": _first(_of(finding, "suggested_label"), _label(result.suggested, i)),
        "right": right,
        # Calibrated where anything was there to calibrate on.
        "wrong": wrong if wrong is not None or right is None else _finite(1 - right),
        "calibrated": True if wrong is not None else None,
        "score": _number(result.rankings[result.main], i),
        "loss": _negative(_number(result.baselines.get("loss"), i)),
        "noise": None if result.noise is None else bool(result.noise[i]),
        "kind": _of(finding, "kind"),
        "reason": _of(finding, "reason"),
        "duplicates": [_as_read(name) for name in _of(finding, "duplicates") or ()],
        "neighbours": _evidence(_of(finding, "neighbours"), "similarity"),
        "hurts": _evidence(_of(finding, "hurts"), "influence"),
        "helps": _evidence(_of(finding, "helps"), "influence"),
        "tokens": [
            [str(_of(token, "text")), _finite(_of(token, "influence")) or 0.0]
            for token in list(_of(finding, "tokens") or ())[:_TOKENS]
        ],
    }
    row["copies"] = len(row["duplicates"])
    row["duplicates"] = row["duplicates"][:_EVIDENCE]
    return {name: value for name, value in row.items() if value is not None and value != []}


def _evidence(found: Iterable[Any] | None, measure: str) -> list[dict[str, Any]]:
    out = []
    for item in list(found or ())[:_EVIDENCE]:
        label, text = _of(item, "label"), _of(item, "text")
        values = {
            "id": _as_read(_of(item, "id")),
            "label": None if label is None else _as_read(label),
            "text": None if text is None else str(text)[:_OTHER_TEXT],
            measure: _finite(_of(item, measure)),
        }
        out.append({name: value for name, value in values.items() if value is not None})
    return out


def _others(result: AuditResult, ids: list[str], rows: list[dict[str, Any]]) -> list[list[str | None]]:
    """``[id, label, text]`` of the training samples that a row points to and that are no rows themselves."""
    here = {row["id"] for row in rows}
    wanted = {name for row in rows for name in row.get("duplicates", ())}
    wanted |= {item["id"] for row in rows for item in row.get("neighbours", ())}
    texts = result.texts
    return [
        [name, _label(result.labels, i), None if texts is None else texts[i][:_OTHER_TEXT]]
        for i, name in enumerate(ids)
        if name in wanted and name not in here
    ]


def _relabel(result: AuditResult) -> str | None:
    """What ``clean`` can put in the place of a label: another label, a text, or nothing."""
    if result.labels is not None:
        return "label"
    # Of other tasks an answer, where one column holds it.
    one_column = re.search(r"targets in ('[^']*'|\"[^\"]*\")$", str(result.facts.get("form", "")))
    return "text" if result.facts.get("task") in _ANSWERED and one_column else None


def _identity(result: AuditResult, ids: list[str]) -> str:
    """The same for the same samples and labels under the same settings: decisions are kept under it."""
    known = [ids, None if result.labels is None else [str(label) for label in result.labels], result.config]
    return xxhash.xxh3_128_hexdigest(json.dumps(known, sort_keys=True, default=str).encode())


def _of(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)


def _first(*values: Any) -> str | None:
    return next((_as_read(value) for value in values if value is not None), None)


def _label(values: Any, i: int) -> str | None:
    return None if values is None or values[i] is None else _as_read(values[i])


def _as_read(value: Any) -> str:
    """A value as text, as it comes back from a cell of a CSV."""
    return _csv.original(str(_csv.cell(str(value))))


def _number(values: Any, i: int) -> float | None:
    return None if values is None else _finite(float(values[i]))


def _finite(value: Any) -> float | None:
    # More digits are not read, and are half of what a page of long texts weighs.
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _natural(text: str) -> tuple[bool, float, str]:
    """Numbers in their order, before words."""
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text
