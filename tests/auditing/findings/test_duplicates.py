"""Duplicates by hash and by MinHash, against all pairs."""

from __future__ import annotations

import itertools
import random

from influence_fast.auditing.findings.duplicates import ALIKE, copies_among, find_duplicates

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


def test_rows_that_are_just_alike_are_found() -> None:
    texts = []
    for pair in range(100):
        words = [f"{pair}word{i}" for i in range(40)]
        # Two words of forty are others: 73 of 85 pieces are in both.
        texts += [" ".join(words), " ".join([*words[:20], "one", *words[21:30], "two", *words[31:]])]
    assert len(find_duplicates(texts)) >= 97


def test_rows_of_ids() -> None:
    assert find_duplicates([[1, 2, 3], [1, 2], [1, 2, 3], [12, 3], []]) == [[0, 2]]


def test_thousands_of_copies_are_one_group() -> None:
    texts = [" ".join([*LONG, str(i % 3)]) for i in range(3000)]
    assert find_duplicates(texts) == [list(range(3000))]


def test_copies_among_others_equal_all_pairs() -> None:
    draw = random.Random(0)
    others = [[draw.randrange(30) for _ in range(draw.randrange(1, 12))] for _ in range(60)]
    texts = [[draw.randrange(30) for _ in range(draw.randrange(1, 12))] for _ in range(60)]
    for row in others:  # a word more, a word less, another word
        place = draw.randrange(len(row))
        texts += [[*row, 31], row[:place] + row[place + 1 :], [*row[:place], 32, *row[place + 1 :]], list(row)]

    def pieces(row: list[int]) -> set[object]:
        return {*row, *itertools.pairwise(row)}

    def alike(one: list[int], other: list[int]) -> bool:
        a, b = pieces(one), pieces(other)
        return len(a & b) >= ALIKE * len(a | b) > 0

    expected = [i for i, text in enumerate(texts) if any(alike(text, other) for other in others)]
    assert 60 < len(expected) < len(texts) - 60
    assert copies_among(texts, others) == expected
    assert copies_among(["A  film", "b"], ["a film"]) == [0]
    assert copies_among([], others) == copies_among(texts, []) == []
