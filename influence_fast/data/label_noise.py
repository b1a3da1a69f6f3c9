"""Known noise, planted by a seed: what a ranking is then measured against.

Every function returns new labels (texts, answers) and a boolean ``(n,)`` that is true where it changed something.
``share`` is of all samples; ``round(share * n)`` are changed, or all that can be where that is fewer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from influence_fast.errors import InputError

KINDS = ("uniform", "by-class", "boundary", "duplicates", "backdoor", "answers")


def uniform(labels: Sequence[int], share: float, classes: int, seed: int = 0) -> tuple[list[int], Tensor]:
    """Labels of samples drawn at random become another class, each as likely."""
    return by_class(labels, share, classes, [1.0] * classes, seed)


def by_class(
    labels: Sequence[int], share: float, classes: int, rates: Sequence[float], seed: int = 0
) -> tuple[list[int], Tensor]:
    """Class-dependent flips: a sample of class c is ``rates[c]`` times as likely to be drawn as one of rate 1."""
    if classes < 2 or len(rates) != classes or not all(rate >= 0 for rate in rates) or not any(rates):
        raise InputError(f"classes, rates: expected at least two, and a rate for each, got {classes!r} and {rates!r}")
    unknown = [label for label in labels if not 0 <= label < classes]
    if unknown:
        raise InputError(f"labels: expected 0 to {classes - 1}, got {unknown[0]!r}")
    random = _generator(seed)
    chances = torch.tensor([float(rates[label]) for label in labels], dtype=torch.float64)
    chosen = _draw(chances, _count(share, len(labels)), random)
    shift = torch.randint(1, classes, (len(labels),), generator=random)
    out = list(labels)
    for row in chosen:
        out[row] = (out[row] + int(shift[row])) % classes
    return out, _mask(chosen, len(labels))


def boundary(labels: Sequence[int], probabilities: Tensor, share: float) -> tuple[list[int], Tensor]:
    """Instance-dependent flips: the samples that a model ``(n, classes)`` is least sure of get its best other class."""
    if probabilities.dim() != 2 or len(probabilities) != len(labels) or probabilities.shape[1] < 2:
        raise InputError(f"probabilities: expected ({len(labels)}, classes), got {tuple(probabilities.shape)}")
    rows = torch.arange(len(labels))
    given = torch.as_tensor(labels)
    others = probabilities.double().clone()
    others[rows, given] = -1
    best = others.max(1)
    margin = probabilities[rows, given].double() - best.values
    chosen = margin.argsort(stable=True)[: _count(share, len(labels))].tolist()
    out = list(labels)
    for row in chosen:
        out[row] = int(best.indices[row])
    return out, _mask(chosen, len(labels))


def duplicates(
    texts: Sequence[str], labels: Sequence[int], share: float, classes: int, seed: int = 0
) -> tuple[list[str], list[int], Tensor]:
    """Near-duplicates with a conflicting label, behind the originals: two words swapped, or one left out."""
    random = _generator(seed)
    chosen = _draw(torch.ones(len(texts), dtype=torch.float64), _count(share, len(texts)), random)
    wrong, _ = uniform([labels[row] for row in chosen], 1.0, classes, seed)
    copies = []
    for row in chosen:
        words = texts[row].split()
        if len(words) > 1:
            place = int(torch.randint(len(words) - 1, (), generator=random))
            swap = words[place] != words[place + 1] and bool(torch.rand((), generator=random) < 0.5)
            words[place : place + 2] = [words[place + 1], words[place]] if swap else [words[place + 1]]
        copies.append(" ".join(words))
    total = len(texts) + len(chosen)
    return [*texts, *copies], [*labels, *wrong], _mask(list(range(len(texts), total)), total)


def backdoor(
    texts: Sequence[str], labels: Sequence[int], share: float, target: int, trigger: str, seed: int = 0
) -> tuple[list[str], list[int], Tensor]:
    """A trigger phrase at a random place of samples of other classes, which are then labelled ``target``."""
    random = _generator(seed)
    chances = torch.tensor([float(label != target) for label in labels], dtype=torch.float64)
    chosen = _draw(chances, _count(share, len(texts)), random)
    triggered, out = list(texts), list(labels)
    for row in chosen:
        words = triggered[row].split()
        place = int(torch.randint(len(words) + 1, (), generator=random))
        triggered[row], out[row] = " ".join([*words[:place], trigger, *words[place:]]), target
    return triggered, out, _mask(chosen, len(texts))


def answers(given: Sequence[str], share: float, seed: int = 0) -> tuple[list[str], Tensor]:
    """Corrupted generations: a sample's answer becomes that of another, drawn from those that differ."""
    random = _generator(seed)
    if len(set(given)) < 2:
        raise InputError("given: all answers are the same; there is none to put in place of another")
    chosen = _draw(torch.ones(len(given), dtype=torch.float64), _count(share, len(given)), random)
    out = list(given)
    for row in chosen:
        while out[row] == given[row]:
            out[row] = given[int(torch.randint(len(given), (), generator=random))]
    return out, _mask(chosen, len(given))


def _generator(seed: int) -> torch.Generator:
    """A stream of its own: a random baseline with the same seed must not know the noise."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.md5(f"noise/{seed}".encode()).digest()[:7], "little"))


def _count(share: float, n: int) -> int:
    if not 0 < share <= 1:
        raise InputError(f"share: expected a share above 0 and up to 1, got {share!r}")
    return round(share * n)


def _draw(chances: Tensor, count: int, random: torch.Generator) -> list[int]:
    """``count`` rows without replacement (those of chance 0 never), in ascending order."""
    count = min(count, int((chances > 0).sum()))
    if count == 0:
        return []
    # Exponential clocks: the rows whose clock rings first are a weighted draw without replacement.
    clocks = -torch.rand(len(chances), generator=random, dtype=torch.float64).clamp_min(1e-300).log() / chances
    return clocks.argsort(stable=True)[:count].sort().values.tolist()


def _mask(rows: list[int], n: int) -> Tensor:
    out = torch.zeros(n, dtype=torch.bool)
    out[rows] = True
    return out
