"""Whether two builds compute the same, from what is kept of each (``identity``), and in words what differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

# By the model's dtype: how far a gradient may be from what the same computation gives elsewhere, as a share of its length.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 8e-2, torch.float16: 8e-2}
# A norm below this share of the row's longest layer is noise.
_SMALL = 1e-5
# Rounding of logits, as a share of what a nearly certain prediction leaves of its loss.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5}

Identity = dict[str, Any]
Probe = list[dict[str, Any]]


def difference(earlier: Identity, now: Identity) -> str | None:
    """The first thing in which two identities differ, in words; None where all that both know is the same.

    What only one of them knows is no difference: a later version of a library knows more of a config, and code is compared
    between the same versions of Python alone. The probe sees what that leaves open.
    """
    if earlier.get("adam") != now.get("adam"):
        return "Adam's moments: " + ("others" if {"adam"} <= earlier.keys() & now.keys() else "one of the two has none")
    for part in ("class", "config", "adapters", "loss", "tokenizer"):
        was, is_ = earlier.get(part), now.get(part)
        if part == "adapters" and "class" in earlier and "class" in now and bool(was) != bool(is_):
            return f"adapters: {_short(was or 'none')}, not {_short(is_ or 'none')}"
        if was is None or is_ is None or was == is_:
            continue
        if not isinstance(was, dict) or not isinstance(is_, dict):
            return f"{part}: {_short(was)}, not {_short(is_)}"
        same_python = was.get("python") == is_.get("python")
        # An adapter that came or went, and what is bound to a loss, are differences; a config's new entry is none.
        names = was.keys() & is_.keys() if part in ("config", "tokenizer") else was.keys() | is_.keys()
        for name in sorted(names - {"python"}):
            if was.get(name) != is_.get(name) and (name != "code" or same_python):
                if name == "code":
                    return f"{part}: its code differs"
                return f"{part}: {name} was {_short(was.get(name))}, is {_short(is_.get(name))}"
    return None


def other_space(earlier: Identity, now: Identity) -> str | None:
    """:func:`difference` of gradients that are compared with each other.

    Queries may well have a loss of their own, and LESS compares Adam's updates with plain gradients.
    """
    own = ("loss", "adam")
    return difference(*({part: what for part, what in one.items() if part not in own} for one in (earlier, now)))


def recorded_identity(manifest: Mapping[str, Any]) -> Identity:
    """What the manifest of a store keeps, nothing where it was built by a version that kept none."""
    facts = manifest.get("facts")
    found = facts.get("identity") if isinstance(facts, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def best_rows(probe: Probe) -> Probe:
    """The two rows whose loss is highest: a nearly certain prediction has a gradient of rounding alone."""
    finite = [row for row in probe if math.isfinite(row["loss"]) and all(map(math.isfinite, row["norms"]))]
    return sorted(sorted(finite, key=lambda row: -row["loss"])[:2], key=lambda row: row["row"])


def probe_difference(
    earlier: Probe, now: Probe, names: Sequence[str], tolerance: float, dtype: torch.dtype = torch.float32
) -> str | None:
    """What differs by more than the rounding of another machine, in words; None where nothing does."""
    rounding = _ROUNDING.get(dtype, 1e-2)
    for was, is_ in zip(earlier, now, strict=True):
        row, before, after = was["row"], was["loss"], is_["loss"]
        if not abs(before - after) <= tolerance * max(abs(before), abs(after)) + rounding:
            return f"the loss of row {row} was {before:.6g}, is {after:.6g}"
        # Of a row that is predicted with near certainty rounding is the larger part.
        allowed = tolerance + (rounding / abs(before) if 0 < abs(before) < 1e-2 else 0)
        longest = max([*was["norms"], *is_["norms"]], default=0.0)
        for name, one, other in zip(names, was["norms"], is_["norms"], strict=True):
            if not abs(one - other) <= allowed * max(one, other) + _SMALL * longest:
                return f"the gradient of layer {name!r} for row {row} had length {one:.6g}, has {other:.6g}"
        whole = math.sqrt(max(sum(n * n for n in was["norms"]), sum(n * n for n in is_["norms"])))
        apart = math.dist(was["sketch"], is_["sketch"])
        # The sketch of a difference is as long as the difference, give or take its own randomness.
        if not apart <= 3 * allowed * whole:
            return f"the gradient of row {row} points elsewhere (by {apart / whole:.2g} of its length)"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
