"""What an audit would write is known before it writes, and so is what would take less."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import transformers as hf

import influence_fast as inf
from influence_fast.attribution import model_passes
from influence_fast.auditing.disk import TooLarge, as_text, check_disk, stored_bytes
from influence_fast.auditing.run import plan_audit


def plan(**settings: object):
    config = hf.BertConfig(
        vocab_size=models.VOCAB,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=40,
        num_labels=3,
    )
    return plan_audit(
        hf.BertForSequenceClassification(config), models.rows(count=20), models.rows(count=9), None, settings
    )


def test_bytes_are_those_of_the_settings() -> None:
    layers = "attention[0]"
    whole = stored_bytes(plan(layers=layers, projection="identity", methods=["dot"]))
    assert whole == 29 * (4 * 128 * 128 * 4 + 4 * 8 + 16)
    halves = stored_bytes(plan(layers=layers, projection="identity", methods=["dot"], dtype="bfloat16"))
    assert 1.99 < whole / halves < 2.01
    # Half of the queries once more with other labels, and the training samples by classes.
    assert stored_bytes(plan(layers=layers, projection="identity", methods=["pool"])) == whole * (29 + 9) // 29
    assert stored_bytes(plan(layers=layers, projection="identity", methods=["contrast-dot"])) == 2 * whole


def test_hidden_states_that_memory_does_not_take_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(*methods: str) -> int:
        return stored_bytes(plan(layers="attention[0]", projection="identity", methods=methods))

    usual = {methods: size(*methods) for methods in (("dot",), ("pool",), ("pool", "repsim"))}
    states = 4 * 20 * 2 * 128
    monkeypatch.setattr(model_passes, "_IN_MEMORY", states)
    assert all(size(*methods) == bytes_ for methods, bytes_ in usual.items())
    monkeypatch.setattr(model_passes, "_IN_MEMORY", states - 1)
    found = [size(*methods) - bytes_ for methods, bytes_ in usual.items()]
    assert found == [0, states, 2 * states]


def test_what_takes_less_is_named(tmp_path: Path) -> None:
    large = plan(layers="attention[0]", projection="identity", max_disk="1MB")
    with pytest.raises(
        TooLarge, match=r"take [\d.]+MB .*more than 1MB. --projection sjlt:256 takes [\d.]+kB"
    ) as caught:
        check_disk(large, tmp_path / "a")
    assert caught.value.bytes == stored_bytes(large)
    check_disk(plan(layers="attention[0]", max_disk="1MB"), tmp_path / "a")
    # What is written already need not fit again.
    (tmp_path / "a" / "stores").mkdir(parents=True)
    (tmp_path / "a" / "stores" / "shard").write_bytes(bytes(stored_bytes(large)))
    check_disk(large, tmp_path / "a")
    with pytest.raises(inf.InputError, match="memory: expected bytes"):
        plan(max_disk="much")


def test_the_default_projection_keeps_stores_small() -> None:
    assert str(plan(layers="attention[0]").build.projection) == "sjlt:256"
    assert str(plan(layers=["classifier"]).build.projection) == "identity"
    assert str(plan(layers="attention[0]", methods=["ekfac"]).build.projection) == "identity"
    assert plan(layers="attention[0]").config.document()["projection"] == "sjlt:256"
    adapted = models.make("bert", lora=True)
    assert str(plan_audit(adapted, models.rows(), models.rows(), None, {}).build.projection) == "identity"


def test_sizes_for_people() -> None:
    assert [as_text(size) for size in (0, 1, 1001, 10**6, 1_200_001, 219 * 10**9)] == [
        "0kB", "1kB", "2kB", "1MB", "1.3MB", "219GB",
    ]  # fmt: skip
