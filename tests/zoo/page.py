"""The table of the zoo, as a page; all of it from ``results.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from .check import TOLERANCE

OUTCOMES = ("right", "refused", "wrong", "crash", "not finished", "not built")
_TASKS = {
    "causal": "causal LM",
    "sequence": "sequence classification",
    "token": "token classification",
    "choice": "multiple choice",
    "masked": "masked LM",
    "answer": "question answering",
    "seq2seq": "sequence to sequence",
}
_TITLES = {
    "family": ("Families", "family", "task"),
    "adapter": ("Adapters", "tuner", "on"),
    "situation": ("Situations", "situation", ""),
}
_INTRO = """# Models that capture was tried on

Every row is a tiny random model, and every number in it is from a run against a literal loop: `autograd.grad` of one
row's loss, alone in its batch and without pads, in float64, times the projection's own matrices. Six rows of 3 to 12
tokens go through `build_store` three times: with `identity` and `layers="trained"`, with `rademacher:3x4` and
`layers="all"`, and with `sjlt:24` and `layers="trained"` as six rows of six tokens, where samples and tokens could be
confused. The *error* is the largest over rows, layers and the three, as a share of the row's true gradient of the layer.
`python -m tests.zoo --write docs/models.md` makes this page, and goes on where it was stopped.

*Fast* layers are captured by hooks, *exact* ones by autograd itself ([capture.md](capture.md)); *rows* says which may
share a batch. A case is **right** with an error below {tolerances}, **refused**
where a sentence came instead of numbers, and a **silent error** where numbers came that are not the gradients and
nothing said so.
"""


def counts(results: dict[str, Any]) -> dict[str, Counter[str]]:
    """Outcomes by kind of case."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in _TITLES}
    for key, case in results["cases"].items():
        found[key.split("/")[0]][case["outcome"]] += 1
    return found


def silent_errors(results: dict[str, Any]) -> list[str]:
    """Cases with numbers that are wrong and not a word about it."""
    return sorted(key for key, case in results["cases"].items() if case["outcome"] == "wrong")


def summary(results: dict[str, Any]) -> str:
    """Counts of outcomes, and of silent errors, as a table."""
    lines = [
        "| | right | refused | **silent errors** | crash | over the time limit | not built |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, found in counts(results).items():
        lines.append(f"| {_TITLES[kind][0].lower()} | {' | '.join(str(found[outcome]) for outcome in OUTCOMES)} |")
    right = {key.split("/")[1] for key, case in results["cases"].items() if _is(key, case, "family", "right")}
    tried = {key.split("/")[1] for key, case in results["cases"].items() if _is(key, case, "family", *OUTCOMES[:5])}
    lines += ["", f"{len(tried)} families could be made, and {len(right)} of them are right for at least one task."]
    return "\n".join(lines)


def _is(key: str, case: dict[str, Any], kind: str, *outcomes: str) -> bool:
    return key.split("/")[0] == kind and case["outcome"] in outcomes


def page(results: dict[str, Any], texts: dict[str, str]) -> str:
    """The page; ``texts`` says what each situation is."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    codes = Counter(case.get("code") for case in results["cases"].values())
    of = "one state of the code" if len(codes) == 1 else f"{len(codes)} states of the code, as it was mended"
    tolerances = ", ".join(f"{share:g} in {kind}" for kind, share in TOLERANCE.items())
    parts = [
        _INTRO.format(tolerances=tolerances),
        f"With {versions}; {len(results['cases'])} of {results['total']} cases, run on {of}:\n",
        summary(results),
        "",
    ]
    for kind, (title, first, second) in _TITLES.items():
        rows = [(key, case) for key, case in sorted(results["cases"].items()) if key.startswith(f"{kind}/")]
        made = [(key, case) for key, case in rows if case["outcome"] != "not built"]
        parts += [f"## {title}\n", *_table(first, second, made, texts), ""]
    missing = [(key, case) for key, case in sorted(results["cases"].items()) if case["outcome"] == "not built"]
    if missing:
        parts += ["## Not built\n", "What transformers or peft could not make at this size, or does not offer:\n"]
        parts += ["| case | why |", "|---|---|"]
        parts += [
            f"| {key.removeprefix('family/').replace('/', ', ')} | {_cell(c['sentence'])} |" for key, c in missing
        ]
    return "\n".join(parts).rstrip() + "\n"


def _table(first: str, second: str, rows: Iterable[tuple[str, dict[str, Any]]], texts: dict[str, str]) -> list[str]:
    head = [first, *([second] if second else []), "fast", "exact", "rows", "error", "refused"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, case in rows:
        _, name, part = key.split("/")
        cells = [texts.get(name, name), *([_TASKS.get(part, part)] if second else [])]
        error = case.get("error")
        ways = "" if error is None else f"{case['fast']} {case['exact']}"
        cells += [*(ways.split() or ["", ""]), case.get("batches", "")]
        kind = "" if case.get("dtype", "float64") == "float64" else f" ({case['dtype']})"
        said = _cell(case.get("sentence", ""))
        if case["outcome"] in ("wrong", "crash", "not finished"):
            said = f"**{case['outcome']}**: {said}"
        cells += ["" if error is None else f"{error:.1e}{kind}", said]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
