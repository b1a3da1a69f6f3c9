"""Neighbours by hidden states, against a literal count."""

from __future__ import annotations

import pytest
import torch

import influence_fast as inf
from influence_fast.attribution.representations import votes_with_queries


def test_neighbours_share_the_label_or_do_not() -> None:
    states, labels = torch.randn(30, 5), torch.arange(30) % 3
    found = inf.neighbours({"block 1": states, "block 2": states}, labels, k=4, layers=["block 1"])
    assert list(found) == ["block 1"]
    votes, asked = inf.neighbour_estimate(states, labels, states[:6] * 1.01, k=4, classes=4)
    assert votes.shape == (30, 4)
    assert asked.shape == (6, 4)
    torch.testing.assert_close(votes.exp().sum(1), torch.ones(30))
    centred = states.double() - states.double().mean(0)
    for i in range(30):
        similar = [(float(torch.cosine_similarity(centred[i], centred[j], dim=0)), j) for j in range(30) if j != i]
        nearest = sorted(similar, reverse=True)[:4]
        total = sum(max(value, 0) for value, _ in nearest)
        agree = sum(max(value, 0) * (1 if labels[j] == labels[i] else -1) for value, j in nearest)
        assert float(found["block 1"][0, i]) == pytest.approx(agree / total, abs=1e-5)
        for c in range(4):
            share = sum(max(value, 0) for value, j in nearest if labels[j] == c)
            assert float(votes[i, c].exp()) == pytest.approx((share + 0.01) / (total + 0.04), abs=1e-5)
    for i in range(6):  # a query may be near a training sample that is like itself
        query = 1.01 * states[i].double() - states.double().mean(0)
        similar = [(float(torch.cosine_similarity(query, centred[j], dim=0)), j) for j in range(30)]
        nearest = sorted(similar, reverse=True)[:4]
        share = sum(max(value, 0) for value, j in nearest if labels[j] == 1)
        total = sum(max(value, 0) for value, _ in nearest)
        assert float(asked[i, 1].exp()) == pytest.approx((share + 0.01) / (total + 0.04), abs=1e-5)
    with pytest.raises(inf.InputError, match="labels, k: expected"):
        inf.neighbours({"a": states}, labels, k=30)


def test_of_many_samples_some_vote_and_every_query_does(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(1)
    states, labels = torch.randn(40, 5, generator=random), torch.arange(40) % 3
    queries, own = torch.randn(6, 5, generator=random), torch.arange(6) % 3
    (whole,) = votes_with_queries(states, labels, queries, own, (4,), 3)
    monkeypatch.setattr("influence_fast.attribution.representations._VOTERS", 12)
    few, more = votes_with_queries(states, labels, queries, own, (4, 7), 3)
    drawn = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:12].sort().values.tolist()
    voters = [*drawn, *range(40, 46)]
    every = torch.cat([states, queries]).double()
    every = torch.nn.functional.normalize(every - every.mean(0), dim=1)
    classes = torch.cat([labels, own])
    for row in range(46):
        similar = sorted(((float(every[row] @ every[j]), j) for j in voters if j != row), reverse=True)
        for count, votes in ((4, few), (7, more)):
            found = torch.cat(votes)[row]
            for c in range(3):
                expected = sum(max(value, 0) for value, j in similar[:count] if classes[j] == c)
                assert float(found[c]) == pytest.approx(expected, abs=1e-5)
    assert not torch.allclose(whole[0], few[0])
