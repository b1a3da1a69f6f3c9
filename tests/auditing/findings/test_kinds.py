"""The kind of a row and the sentence that says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from influence_fast.auditing.findings.finding import KINDS, Finding
from influence_fast.auditing.findings.kinds import far_away, hurt_groups, name_kind


@pytest.mark.parametrize(
    ("finding", "others", "far", "group", "rare", "kind", "said"),
    [
        ({"wrong_probability": 0.9, "suggested_label": "b"}, 0, True, "g", True, "wrong label", "90%, b fits better."),
        (
            {"wrong_probability": 0.9, "duplicates": [1]},
            1,
            False,
            None,
            False,
            "wrong label",
            "1 of its 1 duplicates has",
        ),
        ({"label_probability": 0.1, "suggested_label": "b"}, 0, False, None, False, "wrong label", "not calibrated"),
        ({"wrong_probability": 0.1, "duplicates": [1, 2]}, 2, True, None, False, "conflicting duplicate", "2 of its 2"),
        ({"wrong_probability": 0.1}, 0, True, "g", True, "hurts one group", "group g"),
        ({"wrong_probability": 0.1}, 0, True, None, True, "far from everything", "No other"),
        ({"duplicates": [1, 2]}, 0, False, None, True, "duplicate", "2 other rows"),
        ({"wrong_probability": 0.1}, 0, False, None, True, "atypical but right", "only 10%"),
        ({"wrong_probability": 0.4}, 0, False, None, True, "unremarkable", "Nothing"),
        ({}, 0, False, None, True, "unremarkable", "Nothing"),
    ],
)
def test_the_most_serious_kind_first(
    finding: dict[str, Any], others: int, far: bool, group: str | None, rare: bool, kind: str, said: str
) -> None:
    one = Finding(0, given_label="a", **finding)
    name_kind(one, others, far, group, rare)
    assert one.kind == kind in KINDS
    assert said in one.reason
    assert one.reason.endswith(".")


def test_far_rows_are_few_and_far() -> None:
    similarity = torch.cat([torch.linspace(0.8, 0.9, 198), torch.tensor([0.1, 0.2])])
    assert far_away(similarity).nonzero()[:, 0].tolist() == [198, 199]
    assert not far_away(torch.linspace(0.8, 0.9, 200)).any()
    assert not far_away(torch.ones(100)).any()


def test_rows_that_hurt_one_group_alone() -> None:
    random = torch.Generator().manual_seed(0)
    influence = 0.01 * torch.randn(4, 30, generator=random)
    groups = [("a", "b", "c")[i % 3] for i in range(30)]
    sign = torch.tensor([[1, -1, 1], [-1, -1, 1], [1, 1, 1], [0, 0, -1]])
    influence += sign[:, torch.tensor([i % 3 for i in range(30)])]
    found = hurt_groups(influence, groups)
    assert found[:3] == ["b", None, None]
    assert hurt_groups(influence, ["one"] * 30) == [None] * 4
