"""Filter and retrain: who keeps what, and which epoch counts."""

from __future__ import annotations

import pytest
import torch

from influence_fast.evaluation.retraining import filter_and_retrain


def test_filter_and_retrain_chooses_the_epoch_on_the_other_split() -> None:
    noise = torch.arange(20) % 5 == 0
    seen = {}

    def train(rows):
        dirty = float(noise[rows].double().mean())
        seen[len(seen)] = rows
        return [(0.5, 0.99), (0.9 - dirty, 0.8 - dirty), (0.6, 0.1)]

    scores = torch.where(noise, 0.0, 1.0) + torch.arange(20) / 100
    arms = filter_and_retrain(train, {"ours": scores}, noise, drop=0.3)
    assert set(arms) == {"all", "ours", "random", "oracle"}
    assert len(arms["all"].rows) == 20
    for name in ("ours", "random", "oracle"):
        assert len(arms[name].rows) == 14
        assert (arms[name].rows.diff() > 0).all()
    assert not noise[arms["ours"].rows].any()
    assert not noise[arms["oracle"].rows].any()
    assert arms["ours"].epoch == 1
    assert arms["ours"].reported == pytest.approx(0.8)
