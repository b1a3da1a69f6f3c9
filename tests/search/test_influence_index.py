"""An index: what it answers, saves, refuses and says of its recall."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stores import gradients, write_store

import influence_fast as inf


def test_the_default_is_exact(store: inf.GradientStore) -> None:
    """Its answers are held against brute force in test_exact.py."""
    index = inf.InfluenceIndex.build(store)
    assert (index.factory, index.recall) == ("Flat", 1.0)


def test_some_layers_and_named_rows(tmp_path: Path) -> None:
    data, queries = gradients(20, 0), gradients(3, 1)
    store = write_store(tmp_path / "s", data, ids=[f"row{i}" for i in range(20)])
    _, ids = inf.InfluenceIndex.build(store, layers=["b"]).search(queries, 2)
    best = (queries["b"] @ data["b"].T).topk(2).indices
    assert ids == [[f"row{i}" for i in row] for row in best.tolist()]


def test_save_and_load(tmp_path: Path, store: inf.GradientStore) -> None:
    queries = gradients(4, 2)
    index = inf.InfluenceIndex.build(store, metric="cosine")
    index.save(tmp_path / "i")
    again = inf.InfluenceIndex.load(tmp_path / "i")
    for one, other in zip(index.search(queries, 7), again.search(queries, 7), strict=True):
        assert torch.equal(one, other)
    inf.InfluenceIndex.build(store, "SQ8", path=tmp_path / "f")
    for folder, name in (("i", "scan-00000.bin"), ("f", "band-0.faiss"), ("f", "index.json")):
        (tmp_path / folder / name).write_bytes(b"nothing")
        with pytest.raises(inf.StoreError, match="damaged index"):
            inf.InfluenceIndex.load(tmp_path / folder)
    with pytest.raises(inf.StoreError, match="no index"):
        inf.InfluenceIndex.load(tmp_path / "j")


def test_errors(tmp_path: Path, store: inf.GradientStore) -> None:
    queries = gradients(3, 1)
    for settings, message in [
        ({"metric": "l2"}, "metric: expected one of dot, cosine"),
        ({"factory": "Nope8"}, "FAISS does not know 'Nope8'"),
        ({"factory": "IVF1000,Flat"}, "cannot be trained on 300 rows"),
        ({"layers": ["z"]}, "expected some of a, b, got 'z'"),
    ]:
        with pytest.raises(inf.InputError, match=message):
            inf.InfluenceIndex.build(store, **settings)
    index = inf.InfluenceIndex.build(store)
    for k in (0, 301, True, 2.0):
        with pytest.raises(inf.InputError, match="k: expected an int from 1 to the 300 rows"):
            index.search(queries, k)
    with pytest.raises(inf.StoreError, match="lack layer 'b'"):
        index.search({"a": queries["a"]})
    with pytest.raises(inf.StoreError, match="'a' has 3 numbers per row, the index 6"):
        index.search({**queries, "a": queries["a"][:, :3]})
    with pytest.raises(inf.StoreError, match="another projection"):
        index.search(write_store(tmp_path / "q", queries, projection="sjlt:6"))
    queries["a"][1] = float("nan")
    with pytest.raises(inf.InputError, match="row 1 has NaN"):
        index.search(queries)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_recall_is_measured_and_can_fail(
    store: inf.GradientStore, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = gradients(6, 2)
    index = inf.InfluenceIndex.build(store, metric=metric)
    assert index.measure_recall(queries) == 1.0
    plain = index.search_rows
    monkeypatch.setattr(index, "search_rows", lambda asked, k: plain(asked, k, harmful=True))
    assert index.measure_recall(queries) == 0.0


def test_the_factory_that_a_store_would_get(store: inf.GradientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inf.InfluenceIndex.choose_factory(store) == "Flat"
    monkeypatch.setattr("influence_fast.search.norm_partitions._SLOW_SCAN", 0)
    assert inf.InfluenceIndex.choose_factory(store).startswith("IVF")
    assert inf.InfluenceIndex.choose_factory(store, recall=1) == "Flat"
