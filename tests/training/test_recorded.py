"""Recorded epochs come back as written, and the scores are those of hand sums."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import influence_fast as inf
from influence_fast.errors import InputError, StoreError
from influence_fast.training.recorded import Checkpoint, Epoch, read_epoch, write_checkpoints, write_epoch


def epoch(losses, margins, labels=None, rates=(0.1,)):
    count = len(losses)
    labels = torch.tensor([-1] * count if labels is None else labels)
    steps = torch.arange(count)
    rates = torch.tensor(rates, dtype=torch.float64)
    return Epoch(torch.tensor(losses), torch.tensor(margins), labels, steps, rates, torch.arange(len(rates)))


def test_epochs_come_back_in_order_and_scores_skip_what_was_not_seen(tmp_path):
    nan = math.nan
    write_epoch(tmp_path, 1, epoch([3.0, nan, nan], [-1.0, nan, nan], rates=(0.3, 0.5)))
    write_epoch(tmp_path, 0, epoch([1.0, 0.5, nan], [4.0, 2.0, nan]))
    found = inf.read_training(tmp_path)
    assert found.losses[:, 0].tolist() == [1.0, 3.0]
    assert found.learning_rates.tolist() == [0.1, 0.4]
    assert found.aum()[:2].tolist() == [1.5, 2.0]
    assert found.aum()[2].isnan()
    assert found.mean_loss()[:2].tolist() == [-2.0, -0.5]
    assert found.mean_loss()[2].isnan()
    # A row that nothing is known of is neither end of a ranking.
    assert found.scores()["aum"].tolist() == [1.5, 2.0, 1.75]
    assert found.some([1]).losses.tolist()[0] == [0.5]
    assert found.labels is None
    assert found.checkpoints == []


def test_what_came_after_a_step_is_forgotten():
    found = epoch([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0, 1, 2], (0.1, 0.2, 0.3)).before(2)
    assert found.losses.isnan().tolist() == found.margins.isnan().tolist() == [False, False, True]
    assert found.labels.tolist() == [0, 1, -1]
    assert found.rates.tolist() == [0.1, 0.2]


def test_labels_and_checkpoints_come_back(tmp_path):
    write_epoch(tmp_path, 0, epoch([1.0, 2.0], [1.0, 2.0], [2, -1]))
    write_epoch(tmp_path, 1, epoch([1.0, 2.0], [1.0, 2.0], [2, 0]))
    checkpoints = [Checkpoint(Path("/a"), 3, 0.1, Path("/a/optimizer.pt")), Checkpoint(Path("/b"), 6, 0.05)]
    write_checkpoints(tmp_path, checkpoints)
    found = inf.read_training(tmp_path)
    assert found.labels.tolist() == [2, 0]
    assert found.checkpoints == checkpoints


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match="margins: expected"):
        write_epoch(tmp_path, 0, epoch([1.0, 2.0], [1.0]))
    with pytest.raises(InputError, match="no recorded epoch"):
        inf.read_training(tmp_path)
    write_epoch(tmp_path, 0, epoch([1.0, 2.0], [1.0, 2.0]))
    write_epoch(tmp_path, 1, epoch([1.0], [1.0]))
    with pytest.raises(StoreError, match="expected 2 rows"):
        inf.read_training(tmp_path)
    file = tmp_path / "epoch-00001.safetensors"
    file.write_bytes(b"cut")
    with pytest.raises(StoreError, match="damaged"):
        inf.read_training(tmp_path)
    values = load_file(tmp_path / "epoch-00000.safetensors")
    save_file({**values, "losses": values["losses"] + 1}, file, {"sha256": "0"})
    with pytest.raises(StoreError, match="another hash"):
        read_epoch(file)
    save_file({"losses": values["losses"]}, file)
    with pytest.raises(StoreError, match="expected losses, margins"):
        read_epoch(file)
    file.unlink()
    for text in ("{", '{"version": 2}', '{"version": 1, "checkpoints": [{"path": 1}]}'):
        (tmp_path / "training.json").write_text(text, encoding="utf-8")
        with pytest.raises(StoreError, match=r"training\.json"):
            inf.read_training(tmp_path)
