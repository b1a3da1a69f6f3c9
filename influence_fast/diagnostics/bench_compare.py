"""Which operations became slower or faster between two runs of the benchmark, beyond noise.

Each run left one median a pass for every case. The two sets of medians are compared by the exact two-sided test of Mann and
Whitney (1947), at 5 % over all cases together by Holm's rule (1979). What plain torch and numpy, which did not change, took
in both runs says how much slower the machine itself was: our times are divided by the median of that. A change below 5 %
is not called one.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from influence_fast.errors import InputError

STATISTIC = (
    "exact two-sided Mann-Whitney test of the passes' medians, at {level:.0%} over all cases by Holm's rule, "
    "and a change of at least {least:.0%}"
)
_LEVEL, _LEAST = 0.05, 0.05
_UNCHANGED = ("torch", "numpy", "bmm")
_FIELDS = ("machine", "dtype", "ceilings", "results")


def read_result(path: str | Path) -> dict[str, Any]:
    """What ``influence-fast bench --json`` or ``python -m benchmarks.run --out`` wrote.

    Raises:
        InputError: the file is something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a result of bench --json ({error})") from None
    if not isinstance(found, dict) or not all(field in found for field in _FIELDS):
        raise InputError(f"{path}: expected a result of bench --json, with {', '.join(_FIELDS)}")
    return found


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Compare two results of one machine.

    ``ratio`` is new time by old, ``corrected`` the same as if the machine had been as fast; ``p`` is Holm's.

    Raises:
        InputError: other machine, device, threads or dtype; medians of passes are missing.
    """
    _same_conditions(old, new)
    before = {(row["op"], row["case"]): row for row in old["results"]}
    after = {(row["op"], row["case"]): row for row in new["results"]}
    both = [key for key in after if key in before and before[key].get("shape") == after[key].get("shape")]
    for which, row in [("old", before[key]) for key in both] + [("new", after[key]) for key in both]:
        if "medians" not in row:
            raise InputError(
                f"compare: {row['op']} {row['case']} of the {which} result has no medians of passes; measure it anew"
            )
    controls = _controls(old, new, [(before[key], after[key]) for key in both])
    drift = statistics.median(controls) if controls else 1.0
    rows = [_compared(before[key], after[key], drift) for key in both]
    _judge(rows)
    return {
        "statistic": STATISTIC.format(level=_LEVEL, least=_LEAST),
        "passes": {"old": _passes(old), "new": _passes(new)},
        "machine_slower_by": drift,
        "controls": len(controls),
        "can_tell": _smallest_p(rows) <= _LEVEL,
        "results": rows,
        "not_compared": [list(key) for key in {**before, **after} if key not in both],
        "packages": {
            name: [old["machine"]["packages"].get(name), version]
            for name, version in new["machine"]["packages"].items()
            if old["machine"]["packages"].get(name) != version
        },
    }


def _same_conditions(old: dict[str, Any], new: dict[str, Any]) -> None:
    conditions = [("dtype", old["dtype"], new["dtype"])]
    conditions += [(name, old["machine"].get(name), new["machine"].get(name)) for name in ("device", "threads")]
    for name, was, is_ in conditions:
        if was != is_:
            raise InputError(f"compare: {name}: expected {was!r} as in the old result, got {is_!r}")


def _controls(old: dict[str, Any], new: dict[str, Any], pairs: list[tuple[Any, Any]]) -> list[float]:
    """New time by old of each baseline that both ran, where the packages are the same ones."""
    if old["machine"]["packages"] != new["machine"]["packages"]:
        return []
    return [
        statistics.median(now["medians"][name]) / statistics.median(was["medians"][name])
        for was, now in pairs
        for name in now["medians"]
        if name.startswith(_UNCHANGED) and "our" not in name.split() and name in was["medians"]
    ]


def _compared(was: dict[str, Any], now: dict[str, Any], drift: float) -> dict[str, Any]:
    from scipy.stats import mannwhitneyu

    before, after = was["medians"]["ours"], [seconds / drift for seconds in now["medians"]["ours"]]
    corrected = statistics.median(after) / statistics.median(before)
    return {
        "op": now["op"],
        "case": now["case"],
        "old_s": statistics.median(before),
        "new_s": statistics.median(now["medians"]["ours"]),
        "ratio": corrected * drift,
        "corrected": corrected,
        "p": float(mannwhitneyu(before, after, alternative="two-sided", method="exact").pvalue),
        "smallest_p": 2 / math.comb(len(before) + len(after), len(before)),
    }


def _judge(rows: list[dict[str, Any]]) -> None:
    """Set each row's ``verdict``, and its ``p`` to the one by Holm's rule."""
    highest = 0.0
    for place, row in enumerate(sorted(rows, key=lambda row: row["p"])):
        highest = max(highest, min(1.0, row["p"] * (len(rows) - place)))
        row["p"] = highest
        changed = highest <= _LEVEL and abs(row["corrected"] - 1) >= _LEAST
        row["verdict"] = "same" if not changed else "slower" if row["corrected"] > 1 else "faster"


def _smallest_p(rows: list[dict[str, Any]]) -> float:
    """What Holm's rule makes of the clearest change that so many passes can show."""
    return max((row.pop("smallest_p") for row in rows), default=0.0) * len(rows)


def _passes(document: dict[str, Any]) -> int:
    return min((len(row.get("medians", {}).get("ours", ())) for row in document["results"]), default=0)
