"""Settings of an audit as one object, and as the flat document that replays it."""

from __future__ import annotations

import pytest

import influence_fast as inf
from influence_fast.auditing.config import AuditConfig

# What an audit of version 0.1 wrote.
DOCUMENT = {
    "model": "m",
    "train": "t",
    "queries": "q",
    "text_column": "sentence",
    "label_column": "label",
    "noise_column": "noise",
    "answer_column": None,
    "task": "classification",
    "layers": "attention[middle],head",
    "projection": "rademacher:4x4:seed2",
    "methods": ["dot", "pool"],
    "aggregations": ["mean"],
    "rank_by": "dot:all:mean",
    "fraction": 0.1,
    "dtype": "int8",
    "precision": "bfloat16",
    "batch_tokens": 512,
    "truncate": True,
    "seed": 3,
    "self_check": 0.05,
    "checkpoints": ["a", "b"],
}


def test_a_document_of_version_0_1_comes_back() -> None:
    options = {name: value for name, value in DOCUMENT.items() if name not in ("model", "train", "queries")}
    config = AuditConfig.from_options("m", "t", "q", options)
    assert config.document() == DOCUMENT
    assert list(config.document()) == list(DOCUMENT)
    assert config.build.projection == inf.Projection("rademacher", (4, 4), 2)
    assert (config.data.text, config.build.batch_tokens, config.build.dtype) == ("sentence", 512, "int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nope": 1}, r"audit: no setting is called 'nope'; there are .*fraction"),
        ({"task": "guess"}, r"task: expected one of auto, .*got 'guess'"),
        ({"methods": ["nope"]}, r"methods: expected some of dot, .*got 'nope'"),
        ({"methods": []}, r"methods: expected at least one"),
        ({"aggregations": ["sum"]}, r"aggregations: expected some of mean, .*got 'sum'"),
        ({"dtype": "float8"}, r"dtype: expected one of float32, .*got 'float8'"),
        ({"precision": "int8"}, r"precision: expected None or one of bfloat16, float16, got 'int8'"),
        ({"batch_tokens": 0}, r"batch_tokens: expected 'auto' or a positive int, got 0"),
        ({"truncate": "no"}, r"truncate: expected true or false, got 'no'"),
        ({"methods": "dot"}, r"methods: expected a list of texts or null, got 'dot'"),
        ({"fraction": "0.2"}, r"fraction: expected a number, got '0.2'"),
        ({"fraction": 2.0}, r"fraction: expected a share above 0 and up to 1, got 2.0"),
        ({"seed": True}, r"seed: expected a whole number, got True"),
        ({"layers": 3}, r"layers: expected a list of texts or a text or null, got 3"),
        ({"projection": 3}, r"projection: expected identity, KIND:OUTxIN .*got 3"),
        ({"text_column": None}, r"text_column: expected a text, got None"),
        ({"checkpoints": ["a"]}, r"checkpoints: .*give self_check too"),
    ],
)
def test_what_is_wrong_is_named(options: dict, message: str) -> None:
    with pytest.raises(inf.InputError, match=message):
        AuditConfig.from_options("m", "t", "q", options)
