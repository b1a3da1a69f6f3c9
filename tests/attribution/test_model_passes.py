"""A pass over the model happens once for each set of rows, whichever methods ask for it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import models
import pytest
import torch
from torch import nn

import influence_fast as inf
from influence_fast.attribution import model_passes
from influence_fast.attribution.model_passes import ModelPasses


def count_rows(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each row's tokens go through the model."""
    seen: Counter = Counter()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = base.forward

    def forward(*args, **kwargs):
        for ids, mask in zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True):
            seen[tuple(token for token, real in zip(ids, mask, strict=True) if real)] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(base, "forward", forward)
    return seen


def distinct_rows(count: int, first: int) -> list[dict]:
    return [{"input_ids": [3 + i % 30, 3 + i // 30, first], "labels": i % 3} for i in range(count)]


@pytest.mark.parametrize(("lora", "expected"), [(False, 1), (True, 2)])
def test_each_training_sample_passes_once_for_each_state_of_the_model(
    lora: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for gradients, states before fine-tuning and predictions, and once more for states of an adapted model."""
    model = models.make("bert", lora=lora)
    train, queries = distinct_rows(24, 5), distinct_rows(9, 6)
    seen = count_rows(model, monkeypatch)
    methods = ["dot", "neighbours", "pool", "repsim"]
    inf.audit(model, train, queries, methods=methods, layers="head", evidence=0, progress=False)
    # A few rows more often: capture is verified on three, two tell before each pass whether rows may share a batch, and
    # four whether states before fine-tuning can be seen in it.
    passes = Counter(seen[tuple(row["input_ids"])] for row in train)
    assert passes[expected] >= len(train) - 8
    assert min(passes) == expected


def test_what_is_kept_is_what_the_functions_give() -> None:
    model, rows = models.make("bert", lora=True), models.rows(count=6)
    passes = ModelPasses(model, lambda part: part, {"hidden states", "predictions"}, progress=False)
    states, predictions = passes.hidden_states(rows), passes.class_log_probabilities(rows)
    torch.testing.assert_close(states, inf.hidden_states(model, rows, progress=False))
    torch.testing.assert_close(predictions, inf.class_log_probabilities(model, rows, progress=False))
    with model.disable_adapter():
        base = inf.hidden_states(model, rows, progress=False)
    torch.testing.assert_close(passes.hidden_states(rows, base=True), base)
    assert not torch.allclose(base["block 3"], states["block 3"])
    # Held once, whichever way they are asked for.
    whole = passes.all_states(rows)
    assert whole is passes.all_states(rows)
    assert whole.shape[1] == len(states)
    assert torch.equal(passes.last_states(rows), states["block 3"])


def test_states_beyond_the_limit_are_mapped_from_a_file_that_nobody_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = models.make("bert"), models.rows(count=6)
    expected = ModelPasses(model, lambda part: part, progress=False).all_states(rows)
    assert not maps(tmp_path)
    monkeypatch.setattr(model_passes, "_IN_MEMORY", 4 * expected.numel() - 1)
    states = ModelPasses(model, lambda part: part, progress=False, folder=tmp_path).all_states(rows)
    assert torch.equal(states, expected)
    assert not list(tmp_path.iterdir())
    if sys.platform == "linux":
        assert maps(tmp_path)
        del states
        assert not maps(tmp_path)


def maps(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def test_rows_with_other_labels_share_what_inputs_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = models.make("bert"), distinct_rows(10, 5)
    passes = ModelPasses(model, lambda part: part, {"hidden states"}, progress=False)
    states = passes.hidden_states(rows)
    other = [{**rows[i], "labels": 0} for i in (7, 2)]
    passes.share(other, rows, [7, 2])
    seen = count_rows(model, monkeypatch)
    assert torch.equal(passes.hidden_states(other)["block 1"], states["block 1"][[7, 2]])
    assert not seen


def test_blocks_may_differ_in_width() -> None:
    from benchmarks.noise_tasks import Table

    torch.manual_seed(0)
    model = Table(3, 2).eval()
    rows = [{"input_ids": [i % 5, 7, 2], "labels": 0} for i in range(6)]
    found = inf.hidden_states(model, rows)
    assert [tuple(states.shape) for states in found.values()] == [(6, 3), (6, 32), (6, 32)]
    with torch.no_grad():
        states = model(torch.tensor([row["input_ids"] for row in rows]), output_hidden_states=True).hidden_states
    for name, expected in zip(found, states, strict=True):
        torch.testing.assert_close(found[name], expected.mean(1))
