"""A thousand changes to files that are read back: none gives other numbers, a traceback or a crash.

``python -m tests.reliability`` makes a hundred thousand; ``docs/reliability.md`` has their counts.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.reliability import corruption

pytest.importorskip("influence_fast_cpu")
pytest.importorskip("faiss")


@pytest.mark.parametrize(("checked", "count"), [(True, 1000), (False, 200)])
def test_damage_is_named_or_does_not_matter(checked: bool, count: int) -> None:
    found = list(corruption.run(seed=1, first=0, count=count, checked=checked))
    outcomes = Counter(outcome for _, outcome, *_ in found)
    assert sum(outcomes.values()) == count
    # Without checks other numbers are what was asked for.
    fine = {"right error", "same numbers", *(() if checked else ("silent wrong",))}
    assert [entry for entry in found if entry[1] not in fine] == []
    assert outcomes["right error"] > count / 2
    assert {how for how, *_ in found} == set(corruption.CHANGES)
