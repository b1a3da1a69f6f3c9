"""An index: what it answers, saves, refuses and says of its recall."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stores import append, gradients, write_store

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


def answers(index: inf.InfluenceIndex, store: inf.GradientStore, queries: dict, harmful: bool) -> list:
    """Ids of the best 5 by brute force."""
    values = sum(queries[name].double() @ store.read(name).double().T for name in store.layers)
    if index.metric == "cosine":
        values = values / sum(store.read(name).double().square().sum(1) for name in store.layers).sqrt()
    names = list(store.ids)
    return [[names[i] for i in row] for row in values.topk(5, largest=not harmful).indices.tolist()]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("factory", "metric"), [("Flat", "dot"), ("Flat", "cosine"), ("SQ8", "dot"), ("SQ8", "cosine")]
)
def test_an_index_follows_its_store(tmp_path: Path, factory: str, metric: str, named: bool) -> None:
    queries = gradients(3, 9)

    def ids(rows) -> list:
        return [f"row {row}" for row in rows] if named else list(rows)

    def check(index: inf.InfluenceIndex, store: inf.GradientStore) -> None:
        assert len(index) == len(store)
        assert list(index.ids) == list(store.ids)
        for harmful in (False, True):
            found = index.search(queries, 5, harmful)[1]
            assert (found if named else found.tolist()) == answers(index, store, queries, harmful)
        assert index.measure_recall(queries) == 1.0

    store = write_store(tmp_path / "s", gradients(120, 1), ids=ids(range(120)), shard_rows=50)
    inf.InfluenceIndex.build(store, factory, metric, path=tmp_path / "i")
    store = append(tmp_path / "s", gradients(30, 2), ids(range(120, 150)))
    index = inf.InfluenceIndex.load(tmp_path / "i")
    assert len(index) == 120
    store.delete(ids([0, 7, 125, *range(40, 60)]))
    # Rows that were deleted are not found by an index that is opened now, whatever it holds.
    assert len(inf.InfluenceIndex.load(tmp_path / "i")) == 120 - 22
    index.update(store, tmp_path / "i")
    check(index, store)
    check(inf.InfluenceIndex.load(tmp_path / "i"), store)
    if factory == "Flat":
        some = list(store.ids)[::3]
        found = index.search(queries, 5, only=some)[1]
        assert {name for row in (found if named else found.tolist()) for name in row} <= set(some)
    store.compact()
    with pytest.raises(inf.StoreError, match="another store than was indexed; update the index"):
        inf.InfluenceIndex.load(tmp_path / "i")
    check(inf.InfluenceIndex.updated(tmp_path / "i", store), store)
    check(inf.InfluenceIndex.load(tmp_path / "i"), store)


def test_an_update_without_news_removes_what_a_killed_one_left(tmp_path: Path, store: inf.GradientStore) -> None:
    inf.InfluenceIndex.build(store, path=tmp_path / "i")
    before = {path.name for path in (tmp_path / "i").iterdir()}
    (tmp_path / "i" / "scan-7.bin").write_bytes(b"of the index before")
    inf.InfluenceIndex.updated(tmp_path / "i", store)
    assert {path.name for path in (tmp_path / "i").iterdir()} == before


def test_an_update_reads_new_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from influence_fast.search import exact

    monkeypatch.setattr(exact, "_SEGMENT_BYTES", 1)
    store = write_store(tmp_path / "s", gradients(1000, 1))
    inf.InfluenceIndex.build(store, path=tmp_path / "i")
    before = {path.name: path.read_bytes() for path in (tmp_path / "i").glob("scan-*")}
    store = append(tmp_path / "s", gradients(50, 2), range(1000, 1050))
    read, rows = exact.Rows.read, []

    def counted(self, layer, begin, end):
        rows.append((begin, end))
        return read(self, layer, begin, end)

    monkeypatch.setattr(exact.Rows, "read", counted)
    inf.InfluenceIndex.updated(tmp_path / "i", store)
    # Segments of 192 rows: the last began at 960.
    assert min(begin for begin, _ in rows) == 960
    kept = {path.name: path.read_bytes() for path in (tmp_path / "i").glob("scan-*")}
    assert sum(kept.get(name) == data for name, data in before.items()) == len(before) - 1, (
        "all but one with space left"
    )


def test_what_an_index_cannot_follow(tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", gradients(20, 1))
    two = write_store(tmp_path / "two", gradients(20, 2), ids=range(20, 40))
    other = write_store(tmp_path / "other", gradients(20, 2), model="another")
    index = inf.InfluenceIndex.build(one)
    with pytest.raises(inf.StoreError, match="another model"):
        index.update(other)
    index.add(two)
    with pytest.raises(inf.InputError, match="is none of the 2 stores of the index"):
        index.update(write_store(tmp_path / "three", gradients(20, 2)))
    with pytest.raises(inf.InputError, match="only the last store of an index can grow"):
        index.update(append(tmp_path / "one", gradients(2, 3), [50, 51]))
    index.update(append(tmp_path / "two", gradients(2, 3), [50, 51]))
    assert len(index) == 42
