"""Opinions of labels against loops over samples, and what a pool makes of them."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import models
import numpy as np
import pytest
import torch

import influence_fast as inf
from influence_fast.attribution import label_quality
from influence_fast.attribution.model_passes import ModelPasses


def estimate(truth: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    logits = torch.randn(len(truth), 3, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(len(truth)), truth] += strength
    return logits.log_softmax(1)


def test_a_probe_never_saw_the_sample_it_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    states, labels = torch.randn(200, 8, generator=random), torch.arange(200) % 2
    # Nothing to learn: a probe that saw its own samples would know their labels.
    blind, _ = inf.probe_estimate(states, labels, states[:3])
    assert abs(float((blind.argmax(1) == labels).double().mean()) - 0.5) < 0.15
    states[:, 0] += 3.0 * (2 * labels - 1)
    sure, asked = inf.probe_estimate(states, labels, states[:50], classes=3)
    assert float((sure.argmax(1) == labels).double().mean()) > 0.95
    assert (asked.argmax(1) == labels[:50]).double().mean() > 0.95
    assert sure.shape == (200, 3)
    assert asked.shape == (50, 3)
    assert torch.isneginf(sure[:, 2]).all()
    monkeypatch.setattr("influence_fast.attribution.probe._PROBE_ROWS", 40)
    labels[:5] = 2  # too rare to be among the few that are learned from, every time
    few, _ = inf.probe_estimate(states, labels, states[:3])
    assert few.shape == (200, 3)
    with pytest.raises(inf.InputError, match="each class 5 times"):
        inf.probe_estimate(states, torch.cat([torch.full((198,), 0), torch.tensor([1, 1])]), states)


def test_a_pool_weighs_estimates_by_the_queries() -> None:
    truth, asked = torch.arange(1200) % 3, torch.arange(300) % 3
    noise = torch.zeros(1200, dtype=torch.bool)
    noise[::5] = True
    labels = torch.where(noise, (truth + 1) % 3, truth)
    own = estimate(truth, 1.0, 1), estimate(asked, 1.0, 2)
    good = estimate(truth, 2.0, 3), estimate(asked, 2.0, 4)
    empty = estimate(truth, 0.0, 5), estimate(asked, 0.0, 6)
    alone, _ = inf.pooled([own], labels, asked)
    scores, weights = inf.pooled([own, good, empty], labels, asked)
    assert inf.ndr_auc(scores, noise) > inf.ndr_auc(alone, noise) + 0.05
    assert weights[1] > 0.5
    assert abs(weights[2]) < 0.15
    _, undecided = inf.pooled([own, (good[0], torch.zeros(300, 3))], labels, asked)
    assert float(undecided[1]) == 0.0  # the queries say nothing of it
    with pytest.raises(inf.InputError, match="estimates: expected"):
        inf.pooled([own, (good[0], good[1][:, :2])], labels, asked)


def test_a_stack_weighs_estimates_by_the_labels_that_they_did_not_see() -> None:
    truth, asked = torch.arange(1200) % 3, torch.arange(300) % 3
    noise = torch.zeros(1200, dtype=torch.bool)
    noise[::5] = True
    labels = torch.where(noise, (truth + 1) % 3, truth)
    weak, good, empty = (
        (estimate(truth, s, 2 * i), estimate(asked, s, 2 * i + 1)) for i, s in enumerate((1.0, 2.0, 0.0))
    )
    (train, queries), weights = inf.stacked([weak, good, empty], labels)
    assert weights.dtype == train.dtype == queries.dtype == torch.float64
    assert weights[1] > weights[0] > 2 * weights[2] > 0
    given = train.gather(1, labels[:, None])[:, 0]
    alone = good[0].gather(1, labels[:, None])[:, 0]
    assert inf.ndr_auc(given, noise) > inf.ndr_auc(alone, noise) + 0.005
    assert (queries.argmax(1) == asked).double().mean() > (weak[1].argmax(1) == asked).double().mean() + 0.1
    # Moving a weight or all of them makes the labels less probable, prior and all.
    stack = torch.stack([part[0].double() for part in (weak, good, empty)], -1)

    def posterior(w: torch.Tensor, bias: torch.Tensor) -> float:
        loss = torch.nn.functional.cross_entropy(stack @ w + bias, labels, reduction="sum")
        return float(loss + ((w.log() + math.log(3)) ** 2).sum() / (2 * 0.5**2) + (bias**2).sum() / 2)

    bias = (train - stack @ weights)[0]
    bias = bias - bias.mean()
    best = posterior(weights, bias)
    for place, by in itertools.product(range(3), (0.9, 1.1)):
        moved = weights.clone()
        moved[place] *= by
        assert posterior(moved, bias) > best - 0.02
    with pytest.raises(inf.InputError, match="number 1 has"):
        inf.stacked([weak, (good[0], good[1][:, :2])], labels)
    with pytest.raises(inf.InputError, match="estimates: expected one or more"):
        inf.stacked([], labels)


def test_copies_with_another_label_do_not_turn_neighbours_round() -> None:
    """Of a row whose nearest neighbour is its own copy, labelled wrongly, neighbours foresee the given label badly."""
    truth = torch.arange(400) % 2
    labels = torch.cat([truth, 1 - truth])
    backwards = estimate(1 - labels, 1.0, 1)[:, :2].log_softmax(1)
    blind = torch.zeros(800, 2).log_softmax(1)
    (train, _), weights = inf.stacked([(backwards, backwards), (blind, blind)], labels)
    assert (weights > 0).all()
    odds, of_neighbours = ((part[:, 1] - part[:, 0]).double() for part in (train, backwards))
    assert torch.equal(odds.argsort(), of_neighbours.argsort())


def test_trusted_queries_are_learned_from_and_judged_without_themselves() -> None:
    random = torch.Generator().manual_seed(0)
    states, labels = torch.randn(60, 4, generator=random), torch.arange(60) % 2
    queries, own = torch.randn(200, 4, generator=random), torch.arange(200) % 2
    for estimate_of in (inf.probe_estimate, partial(inf.neighbour_estimate, k=10)):
        # Nothing to learn: who saw a query's own label would know it.
        _, blind = estimate_of(states, labels, queries, query_labels=own)
        assert abs(float((blind.argmax(1) == own).double().mean()) - 0.5) < 0.15
    # The training labels are random, those of the queries are not: samples are judged by what the queries taught.
    queries[:, 0] += 4.0 * (2 * own - 1)
    states[:, 0] += 4.0 * (2 * labels - 1)
    scrambled = labels[torch.randperm(60, generator=random)]
    for estimate_of in (inf.probe_estimate, partial(inf.neighbour_estimate, k=10)):
        train, asked = estimate_of(states, scrambled, queries, query_labels=own)
        assert (train.argmax(1) == labels).double().mean() > 0.9
        assert (asked.argmax(1) == own).double().mean() > 0.9
    # A class that queries alone have is one.
    for estimate_of in (inf.probe_estimate, partial(inf.neighbour_estimate, k=10)):
        assert [part.shape[1] for part in estimate_of(states, labels, queries, query_labels=own + 1)] == [3, 3]
    with pytest.raises(inf.InputError, match="query_labels"):
        inf.probe_estimate(states, labels, queries, query_labels=own[:5])
    with pytest.raises(inf.InputError, match="query_labels"):
        inf.neighbour_estimate(states, labels, queries, 4, query_labels=own[:5])


def test_a_pool_strays_from_its_prior_by_the_queries_alone() -> None:
    truth, asked = torch.arange(90) % 3, torch.arange(60) % 3
    parts = [(estimate(truth, 1.0, 1), estimate(asked, 1.0, 2)), (estimate(truth, 1.0, 3), estimate(asked, 1.0, 4))]
    _, few = inf.pooled(parts, truth, asked, prior=[0.5, 1.0])
    assert (few - torch.tensor([0.5, 1.0])).abs().max() > 0.05
    none = [(train, queries[:0]) for train, queries in parts]
    scores, weights = inf.pooled(none, truth, asked[:0], prior=[0.5, 1.0])
    assert weights.tolist() == [0.5, 1.0]
    expected = (0.5 * parts[0][0].double() + parts[1][0].double()).log_softmax(1).gather(1, truth[:, None])[:, 0]
    torch.testing.assert_close(scores, expected)
    with pytest.raises(inf.InputError, match="prior: expected 2"):
        inf.pooled(parts, truth, asked, prior=[1.0])


def test_a_pool_is_the_most_probable_one() -> None:
    truth = torch.arange(60) % 3
    estimates = [(estimate(truth, 1.0, s), estimate(truth, 1.0, s + 10)) for s in (1, 2)]
    scores, weights = inf.pooled(estimates, truth, truth)

    def posterior(w: torch.Tensor) -> float:
        logits = torch.stack([o[1].double() for o in estimates], -1) @ w
        loss = torch.nn.functional.cross_entropy(logits, truth, reduction="sum")
        return float(loss + ((w - torch.tensor([1.0, 0.0])).square().sum()) / (2 * 0.3**2))

    # The classes are balanced, so biases are next to nothing: moving a weight makes it less probable.
    best = posterior(weights)
    for step in ([0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1]):
        assert posterior(weights + torch.tensor(step, dtype=torch.float64)) > best - 0.02
    assert scores.shape == (60,)
    assert scores.dtype == torch.float64
    assert (scores < 0).all()


def test_hidden_states_of_a_pool_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the most that an audit of many rows has in memory: the probe reads what the pass wrote."""
    read: list[np.ndarray] = []
    passes: set[ModelPasses] = set()
    fit, states = label_quality.cross_fitted, ModelPasses.all_states

    def fitted(x: np.ndarray, *given: Any, **how: Any) -> Any:
        read.append(x)
        return fit(x, *given, **how)

    def seen(self: ModelPasses, *given: Any, **how: Any) -> torch.Tensor:
        passes.add(self)
        return states(self, *given, **how)

    monkeypatch.setattr(label_quality, "cross_fitted", fitted)
    monkeypatch.setattr(ModelPasses, "all_states", seen)
    rows = models.rows("classification", 24)
    inf.audit(models.make("bert", lora=True), rows, rows[:9], methods=["pool"], layers="head", progress=False)
    (own,) = passes
    kept = [value for (_, what), value in own._found.items() if what == "base states mean"]
    assert [len(value) for value in kept] == [24, 9]
    assert np.shares_memory(read[0], kept[0].numpy())
    assert all(value.is_contiguous() for value in kept)
