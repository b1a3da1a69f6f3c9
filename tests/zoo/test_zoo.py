"""A part of the zoo in every run of the tests; the whole is ``python -m tests.zoo``, and the page says what came of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import run, situations
from zoo.cases import family_case
from zoo.check import Outcome, check
from zoo.page import page, silent_errors

ROOT = Path(__file__).parents[2]
FAMILIES = ["bert/choice", "gpt2/causal", "llama/token", "roberta/masked", "distilbert/answer"]
SITUATIONS = ["hook_that_scales", "lstm", "packed_by_hand", "shared_weight", "sorted_inside", "two_views"]


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    outcome = check(family_case(*name.split("/")), ("identity", "sjlt:24"))
    assert outcome.outcome == "right", outcome


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    outcome = check(situations.situation_case(name), ("rademacher:3x4", "identity"))
    assert outcome.outcome in ("right", "refused"), outcome


def test_a_wrong_gradient_is_seen() -> None:
    """The loop is of another loss, by a hair, than the build."""

    def other(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return 1.001 * situations.one_loss(model, batch)

    case = situations.small(situations.Base(), truth=other)
    outcome = check(case, ("identity",))
    assert outcome.outcome == "wrong"
    assert outcome.error == pytest.approx(1e-3, rel=1e-2)


def test_outcomes_of_processes_that_fail_or_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, part: str) -> None:
        if part == "ends":
            raise SystemExit(3)
        if part == "hangs":
            time.sleep(60)
        if part == "fails":
            raise ValueError("no such model")

    monkeypatch.setitem(run.MAKERS, "family", make)
    monkeypatch.setattr(run, "check", lambda case: Outcome("right"))
    parts = ("right", "hangs", "fails", "ends", "right")
    groups = [run.Group("family", "x", (part,)) for part in parts]
    found = {part: outcome for _, part, outcome in run.outcomes(groups, 2, 3)}
    assert {part: outcome["outcome"] for part, outcome in found.items()} == {
        "right": "right",
        "hangs": "not finished",
        "fails": "not built",
        "ends": "not finished",
    }


def test_the_page_is_of_the_results() -> None:
    results = run.read()
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == page(results, situations.texts()), (
        "run python -m tests.zoo --write docs/models.md"
    )


def test_nothing_is_wrong_in_silence() -> None:
    results = run.read()
    assert silent_errors(results) == []
    right = {key.split("/")[1] for key, case in results["cases"].items() if case["outcome"] == "right"}
    families = {key.split("/")[1] for key in results["cases"] if key.startswith("family/")}
    assert len(right & families) >= 90
    everything = {f"{group.kind}/{group.name}/{part}" for group in run.groups() for part in group.parts}
    assert len(situations.SITUATIONS) >= 40
    assert {key for key in everything if key.startswith("situation/")} <= set(results["cases"])
