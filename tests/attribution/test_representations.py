"""Neighbours by hidden states, against a literal count."""

from __future__ import annotations

import pytest
import torch

import influence_fast as inf


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
