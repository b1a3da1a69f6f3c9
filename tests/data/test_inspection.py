"""What inspect says: rows decoded with targets marked, and counts over all."""

from __future__ import annotations

import models
from audits import tokenizer

from influence_fast.data.inspection import by_class, counts, decoded, examined, marked
from influence_fast.data.samples import Samples, prepare
from influence_fast.data.settings import DataSettings

CAUSAL = models.make("llama", "causal")
BERT = models.make("bert")


def made(rows: list[dict], task: str = "classification", **settings: object) -> Samples:
    model = BERT if task == "classification" else CAUSAL
    return prepare("data", rows, DataSettings(skip_bad=True, **settings), task, model, tokenizer())


def test_targets_are_marked() -> None:
    samples = made([{"prompt": "w2 w3", "completion": "w4 w5"}], "causal-lm")
    assert marked(decoded(samples, 0, tokenizer())) == "w2 w3«w4 w5»"
    samples = made([{"text": "w2 w3", "label": 1}])
    assert marked(decoded(samples, 0, tokenizer())) == "w2 w3« → 1»"
    samples = made([{"prompt": "w2", "chosen": "w3", "rejected": "w4"}], "preference")
    assert marked(decoded(samples, 0, tokenizer())) == "w2«w3»\nw2«w4»"
    samples = Samples([{"input_ids": [4, 5], "labels": [-100, 1]}], None, None, None, None, task="token-classification")
    samples.class_names = ["O", "PER"]
    assert marked(decoded(samples, 0, tokenizer())) == "w2 «w3/PER »"
    assert by_class(samples) == {"PER": 1}


def test_counts_are_those_of_a_loop() -> None:
    rows = [
        {"text": "w2 w3", "label": 0},
        {"text": "w2 w3", "label": 0},
        {"text": "w2 w3", "label": 1},
        {"text": "w4 " * 50, "label": 1},
        {"text": "w4 " * 40, "label": 1},
        {"text": "", "label": 1},
        {"text": "w5", "label": None},
        {"text": "w5", "label": 9},
    ]
    samples = made(rows, truncate=True)
    found = counts(samples)
    assert found == {
        "rows": 5,
        "tokens": 3 * 2 + 2 * 40,
        "longest": 40,
        "mean length": 17.2,
        "truncated": 1,
        "left out": 3,
        "empty": 2,
        "duplicates": 3,
        "conflicting duplicates": 1,
    }
    assert by_class(samples) == {"1": 3, "0": 2}
    assert counts(made([{"prompt": "w2", "completion": "w3 w4"}], "causal-lm"))["target tokens"] == 2
    document = examined(samples, tokenizer(), 2)
    assert [row["row"] for row in document["rows"]] == [0, 1]
    assert len(document["problems"]) == 3
