"""Names of version 0.1 warn and give what their successors give."""

from __future__ import annotations

import models
import pytest
import torch

import influence_fast as inf
from influence_fast import ops


def test_old_names_warn_and_do_the_same() -> None:
    random = torch.Generator().manual_seed(0)
    states, labels = torch.randn(30, 4, generator=random), [0, 1, 2] * 10
    with pytest.warns(DeprecationWarning, match="influence_fast.neighbour_estimate"):
        old = inf.neighbour_opinion(states, labels, asked=states[:3], k=4)
    torch.testing.assert_close(old, inf.neighbour_estimate(states, labels, states[:3], k=4))
    with pytest.warns(DeprecationWarning, match="influence_fast.probe_estimate"):
        old = inf.probe_opinion(states, labels, asked=states[:3])
    torch.testing.assert_close(old, inf.probe_estimate(states, labels, states[:3]))
    model, rows = models.make("bert"), models.rows(count=3)
    with pytest.warns(DeprecationWarning, match="influence_fast.class_log_probabilities"):
        old = inf.class_opinion(model, rows, progress=False)
    torch.testing.assert_close(old, inf.class_log_probabilities(model, rows, progress=False))
    values = torch.randn(3, 20, generator=random)
    with pytest.warns(DeprecationWarning, match="rank_and_vote"):
        old = ops.tally(values, 4)
    assert all(torch.equal(one, other) for one, other in zip(old, ops.rank_and_vote(values, 4), strict=True))
