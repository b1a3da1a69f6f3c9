"""Duplicates by hash and by MinHash, against all pairs."""

from __future__ import annotations

from influence_fast.auditing.findings.duplicates import find_duplicates

LONG = [f"word{i}" for i in range(40)]


def test_equal_and_nearly_equal_rows_are_grouped() -> None:
    near = [*LONG[:20], "other", *LONG[21:]]
    texts = [
        "A  Film\n",
        "a film",
        "a plot",
        " ".join(LONG),
        " ".join(near),
        "\uff41 film",
        " ".join(LONG[:10]),
        "",
        "",
    ]
    assert find_duplicates(texts) == [[0, 1, 5], [3, 4]]


def test_rows_of_ids() -> None:
    assert find_duplicates([[1, 2, 3], [1, 2], [1, 2, 3], [12, 3], []]) == [[0, 2]]


def test_thousands_of_copies_are_one_group() -> None:
    texts = [" ".join([*LONG, str(i % 3)]) for i in range(3000)]
    assert find_duplicates(texts) == [list(range(3000))]
