"""What others call stays: public names with their signatures, the command line, stores that version 0.1 wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from surface import FILES, PINNED
from torch.testing import assert_close

import influence_fast as inf

STORES = Path(__file__).parent / "fixtures" / "store-0.1"


@pytest.mark.parametrize("file", FILES)
def test_the_surface_is_the_pinned_one(file: str) -> None:
    pinned = (PINNED / file).read_text(encoding="utf-8").splitlines()
    now = FILES[file]()
    assert [line for line in pinned if line not in now] == [], "gone or changed"
    assert [line for line in now if line not in pinned] == [], "new: add them by python -m tests.surface"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_store_of_version_0_1_opens_and_scores_as_it_did(dtype: str) -> None:
    expected = json.loads((STORES / "expected.json").read_text(encoding="utf-8"))[dtype]
    train, queries = (inf.GradientStore.open(STORES / dtype / name, verify=True) for name in ("train", "queries"))
    train.verify()
    assert train.layers == expected["layers"]
    assert list(train.ids) == expected["ids"]
    assert train.column("correct").tolist() == expected["correct"]
    for layer, rows in expected["gradients"].items():
        # Bytes that are read, not computed: equal to the bit (a float32 survives JSON's float64).
        assert train.read(layer, [0, -1]).tolist() == rows
    for method, scores in expected["scores"].items():
        found = inf.aggregate(inf.influence(train, queries, method), "mean")
        assert_close(found, torch.tensor(scores, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    scores, ids = inf.InfluenceIndex.build(train).search(queries, k=3)
    assert ids == expected["nearest"]
    assert_close(scores, torch.tensor(expected["nearest_scores"]), rtol=1e-5, atol=1e-7)
