"""Rows that stand for a trusted set where there is none."""

from __future__ import annotations

import models
import pytest
import torch
from audits import sentences, tokenizer

import influence_fast as inf
from influence_fast.attribution.model_passes import hidden_states
from influence_fast.attribution.probe import probe_estimate
from influence_fast.auditing.held_out import hold_out
from influence_fast.data.samples import Samples, prepare
from influence_fast.data.settings import DataSettings


def samples(count: int, noise: str | None = "noise") -> Samples:
    rows = sentences(count, 1)
    for row in rows:
        # A word that tells the class, so that a probe can.
        row["text"] += f" w{row['label']} w{row['label']}"
    return prepare("train", rows, DataSettings(noise=noise), "classification", models.make("bert"), tokenizer())


def test_trusted_are_rows_whose_label_others_predict() -> None:
    model, whole = models.make("bert"), samples(120)
    kept, trusted, said = hold_out(model, whole, "classification", seed=3)
    assert (len(kept), len(trusted)) == (108, 12)
    assert sorted([*kept.ids, *trusted.ids]) == list(range(120))
    assert [kept.texts[i] for i in (0, -1)] == [whole.texts[kept.ids[i]] for i in (0, -1)]
    assert kept.noise.tolist() == [bool(whole.noise[i]) for i in kept.ids]
    states = list(hidden_states(model, whole.rows, progress=False).values())[-1]
    labels = torch.tensor([row["labels"] for row in whole.rows])
    agreed = probe_estimate(states, labels, states[:1])[0].argmax(1) == labels
    assert int(agreed.sum()) >= 24
    assert all(agreed[i] for i in trusted.ids)
    assert f"12 of the 120 training rows stand for one, drawn from the {int(agreed.sum())} whose label a probe" in said
    assert hold_out(model, whole, "classification", seed=3)[1].ids == trusted.ids
    assert hold_out(model, whole, "classification", seed=4)[1].ids != trusted.ids


def test_without_classes_rows_are_drawn_at_random() -> None:
    rows = models.rows("causal-lm", 90)
    whole = Samples(rows, None, None, None, None)
    kept, trusted, said = hold_out(models.make("llama", "causal"), whole, "causal-lm")
    assert (len(kept), len(trusted)) == (81, 9)
    assert "drawn at random" in said


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(inf.InputError, match="a tenth of 30 training rows are too few"):
        hold_out(models.make("bert"), samples(30), "classification")
