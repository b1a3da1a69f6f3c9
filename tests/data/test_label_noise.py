"""Planted noise: as many as asked for, the right ones, by the seed alone."""

from __future__ import annotations

import pytest
import torch

import influence_fast as inf
from influence_fast.data import label_noise as noise

LABELS = [i % 3 for i in range(300)]
TEXTS = [f"w{i} x{i} y{i} z{i}" for i in range(300)]


def changed(old: list, new: list) -> torch.Tensor:
    return torch.tensor([a != b for a, b in zip(old, new, strict=True)])


def test_uniform_flips() -> None:
    labels, mask = noise.uniform(LABELS, 0.2, 3, seed=1)
    assert int(mask.sum()) == 60
    assert torch.equal(changed(LABELS, labels), mask)
    assert set(labels) == {0, 1, 2}
    assert {(a, b) for a, b in zip(LABELS, labels, strict=True) if a != b} == {
        (a, b) for a in range(3) for b in range(3) if a != b
    }
    assert noise.uniform(LABELS, 0.2, 3, seed=1)[0] == labels
    assert noise.uniform(LABELS, 0.2, 3, seed=2)[0] != labels


def test_noise_is_independent_of_a_random_baseline_with_the_same_seed() -> None:
    _, mask = noise.uniform([0, 1] * 2000, 0.2, 2, seed=0)
    order = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(inf.roc_auc(order, mask) - 0.5) < 0.05


def test_class_dependent_flips() -> None:
    labels, mask = noise.by_class(LABELS, 0.2, 3, [9.0, 1.0, 0.0])
    hit = torch.tensor(LABELS)[mask].bincount(minlength=3)
    assert int(mask.sum()) == 60
    assert hit[2] == 0
    assert hit[0] > 2 * hit[1] > 0
    assert torch.equal(changed(LABELS, labels), mask)
    assert int(noise.by_class(LABELS, 0.9, 3, [1.0, 0.0, 0.0])[1].sum()) == 100, "no more than there are"


def test_flips_near_the_boundary() -> None:
    probabilities = torch.rand(300, 3).softmax(1)
    labels, mask = noise.boundary(LABELS, probabilities, 0.1)
    given = torch.tensor(LABELS)
    margin = torch.stack(
        [p[y] - torch.cat([p[:y], p[y + 1 :]]).max() for p, y in zip(probabilities, given, strict=True)]
    )
    assert int(mask.sum()) == 30
    assert margin[mask].max() <= margin[~mask].min()
    assert torch.equal(changed(LABELS, labels), mask)
    for row in mask.nonzero()[:, 0].tolist():
        assert probabilities[row, labels[row]] == max(p for c, p in enumerate(probabilities[row]) if c != LABELS[row])


def test_near_duplicates() -> None:
    texts, labels, mask = noise.duplicates(TEXTS, LABELS, 0.1, 3)
    assert len(texts) == len(labels) == len(mask) == 330
    assert texts[:300] == TEXTS
    assert mask.tolist() == [False] * 300 + [True] * 30
    for text, label in zip(texts[300:], labels[300:], strict=True):
        (original,) = [i for i in range(300) if set(text.split()) <= set(TEXTS[i].split())]
        assert len(text.split()) in (3, 4)
        assert text != TEXTS[original]
        assert label != LABELS[original]


def test_backdoor() -> None:
    texts, labels, mask = noise.backdoor(TEXTS, LABELS, 0.1, 2, "cf mn")
    assert int(mask.sum()) == 30
    for old, new, before, after, hit in zip(TEXTS, texts, LABELS, labels, mask.tolist(), strict=True):
        if hit:
            assert before != 2 == after
            assert " ".join(new.replace("cf mn", "").split()) == old
        else:
            assert (old, before) == (new, after)


def test_corrupted_answers() -> None:
    given = [str(i % 7) for i in range(100)]
    out, mask = noise.answers(given, 0.25)
    assert int(mask.sum()) == 25
    assert torch.equal(changed(given, out), mask)
    assert set(out) <= set(given)


def test_errors() -> None:
    with pytest.raises(inf.InputError, match="share: expected"):
        noise.uniform(LABELS, 0.0, 3)
    with pytest.raises(inf.InputError, match="classes, rates"):
        noise.by_class(LABELS, 0.1, 3, [1.0])
    with pytest.raises(inf.InputError, match="expected 0 to 1, got 2"):
        noise.uniform(LABELS, 0.1, 2)
    with pytest.raises(inf.InputError, match="all answers are the same"):
        noise.answers(["a"] * 5, 0.2)
    with pytest.raises(inf.InputError, match="probabilities: expected"):
        noise.boundary(LABELS, torch.zeros(3, 2), 0.1)
