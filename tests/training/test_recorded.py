"""Recorded epochs come back as written, and the scores are those of hand sums."""

from __future__ import annotations

import math

import pytest
import torch

from influence_fast.errors import InputError, StoreError
from influence_fast.training.recorded import read_epochs, write_epoch


def test_epochs_come_back_in_order_and_scores_skip_what_was_not_seen(tmp_path):
    nan = math.nan
    write_epoch(tmp_path, 1, torch.tensor([3.0, nan, nan]), torch.tensor([-1.0, nan, nan]))
    write_epoch(tmp_path, 0, torch.tensor([1.0, 0.5, nan]), torch.tensor([4.0, 2.0, nan]))
    found = read_epochs(tmp_path)
    assert found.losses[:, 0].tolist() == [1.0, 3.0]
    assert found.aum()[:2].tolist() == [1.5, 2.0]
    assert found.aum()[2].isnan()
    assert found.mean_loss()[:2].tolist() == [-2.0, -0.5]
    assert found.mean_loss()[2].isnan()


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match="margins: expected"):
        write_epoch(tmp_path, 0, torch.ones(2), torch.ones(3))
    with pytest.raises(InputError, match="no recorded epoch"):
        read_epochs(tmp_path)
    write_epoch(tmp_path, 0, torch.ones(2), torch.ones(2))
    write_epoch(tmp_path, 1, torch.ones(3), torch.ones(3))
    with pytest.raises(StoreError, match="as many samples"):
        read_epochs(tmp_path)
    (tmp_path / "epoch-00001.safetensors").write_bytes(b"cut")
    with pytest.raises(StoreError, match="damaged"):
        read_epochs(tmp_path)
