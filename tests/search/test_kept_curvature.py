"""Searches by preconditioned queries, against influence(); and the curvature that an index keeps for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import append, gradients, write_store
from torch import Tensor

import influence_fast as inf
from influence_fast._records import seal

SHAPES = {"a": (2, 3), "b": (5, 2)}
METHODS = ("dot", "cosine", "datainf", "trak", "trackstar", "ekfac")
KEPT = METHODS[2:]


def factors() -> dict[str, tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(4)
    halves = {name: [torch.randn(n, n, generator=random) for n in (in_, out)] for name, (out, in_) in SHAPES.items()}
    return {name: (a @ a.T, s @ s.T) for name, (a, s) in halves.items()}


def store_of(path: Path, rows: int = 200, **settings: Any) -> inf.GradientStore:
    return write_store(path, gradients(rows, 0), shapes=SHAPES, shard_rows=70, **settings)


def index_of(store: inf.GradientStore, methods: tuple[str, ...] = KEPT, **settings: Any) -> inf.InfluenceIndex:
    index = inf.InfluenceIndex.build(store, **settings)
    for method in methods:
        index.add_curvature(method, factors=factors() if method == "ekfac" else None)
    return index


def expected(store: inf.GradientStore, queries: Any, method: str, weights: dict[str, float]) -> Tensor:
    """Scores by ``influence``: sums over the layers, which cosines divide by the lengths of all layers together."""
    inner = {"cosine": "dot", "trackstar": "trak"}.get(method, method)

    def summed(train: Any, asked: Any) -> Tensor:
        matrix = inf.influence(train, asked, inner, factors=factors() if method == "ekfac" else None)
        return sum(weight * matrix.layer(name).double() for name, weight in weights.items())

    scores = summed(store, queries)
    if inner == method:
        return scores
    own = summed(store, {name: store.read(name) for name in store.layers}).diagonal().sqrt()
    if method == "cosine":
        length = sum(weight * queries[name].double().square().sum(1) for name, weight in weights.items()).sqrt()
    else:
        # The curvature is that of the store; queries among the rows would change it.
        matrix = inf.influence(store, queries, "trak")
        between = sum(w * (matrix.query(n).double() * queries[n]).sum(1) for n, w in weights.items())
        length = between.sqrt()
    return scores / own / length[:, None]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_search_is_influence(tmp_path: Path, method: str, dtype: str) -> None:
    store = store_of(tmp_path / "s", dtype=dtype)
    index = index_of(store, (method,) if method in KEPT else ())
    queries = gradients(70, 5)
    for weights in ({"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 2.0}, None):
        values = expected(store, queries, method, weights or dict.fromkeys(SHAPES, 1.0))
        for harmful in (False, True):
            scores, ids = index.search(queries, 8, harmful, layers=weights, method=method)
            best = values.topk(8, largest=not harmful)
            torch.testing.assert_close(scores.double(), best.values, rtol=2e-5, atol=2e-5 * float(values.abs().max()))
            assert (ids == best.indices).double().mean() > 0.995  # scores that differ by rounding may change places
    one = inf.influence(store, queries, method, factors=factors()).layer("a")
    assert torch.equal(index.search(queries, 1, layers=["a"], method=method)[1][:, 0], one.argmax(1))


def test_filters_and_batches(tmp_path: Path) -> None:
    index = index_of(store_of(tmp_path / "s"))
    queries, mask = gradients(20, 5), torch.arange(200) % 3 == 1
    for method in KEPT:
        scores, ids = index.search(queries, 5, method=method, only=mask)
        assert mask[ids].all()
        whole = index.search(queries, 200, method=method)
        for q in range(20):
            kept = [(float(s), int(i)) for s, i in zip(whole[0][q], whole[1][q], strict=True) if mask[i]][:5]
            assert [i for _, i in kept] == ids[q].tolist()
            assert [s for s, _ in kept] == scores[q].tolist()
        alone = [index.search({n: v[q : q + 1] for n, v in queries.items()}, 5, method=method) for q in range(20)]
        together = index.search(queries, 5, method=method)
        torch.testing.assert_close(torch.cat([s for s, _ in alone]), together[0], rtol=1e-5, atol=1e-6)


def test_zero_rows_and_zero_queries(tmp_path: Path) -> None:
    data = {name: torch.zeros_like(rows) for name, rows in gradients(20, 0).items()}
    store = write_store(tmp_path / "zero", data, shapes=SHAPES)
    queries = gradients(2, 5)
    for method in KEPT[:3]:
        scores, ids = inf.InfluenceIndex.build(store).search(queries, 3, method=method)
        assert not scores.any()
        assert ids.tolist() == [[0, 1, 2]] * 2
    data = gradients(20, 0)
    for rows in data.values():
        rows[4] = 0
    index = inf.InfluenceIndex.build(write_store(tmp_path / "some", data, shapes=SHAPES))
    scores, ids = index.search({name: torch.zeros(1, v.shape[1]) for name, v in data.items()}, 3, method="trackstar")
    assert not scores.any()
    scores, ids = index.search(queries, 20, method="trackstar")
    assert not scores[ids == 4].any()


def same(one: inf.InfluenceIndex, other: inf.InfluenceIndex, exact: bool = True) -> None:
    queries = gradients(6, 5)
    for method in KEPT:
        (scores, ids), (scores2, ids2) = (index.search(queries, 7, method=method) for index in (one, other))
        assert torch.equal(ids, ids2), method
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(scores, scores2, **tolerance)


def test_saved_loaded_moved(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s")
    index = index_of(store, path=tmp_path / "i")
    index.save(tmp_path / "i")
    again = inf.InfluenceIndex.load(tmp_path / "i")
    assert again.curvature == {method: dict.fromkeys(SHAPES, 1.0) for method in KEPT}
    same(index, again)
    inf.InfluenceIndex.load(tmp_path / "i").save(tmp_path / "j")
    same(index, inf.InfluenceIndex.load(tmp_path / "j"))
    # Saved again, files stay as they are, and what is replaced is removed.
    names = sorted(file.name for file in (tmp_path / "i").glob("curvature-*"))
    assert len(names) == 8
    again.add_curvature("trak", damping=0.5)
    again.save(tmp_path / "i")
    assert len(sorted((tmp_path / "i").glob("curvature-*"))) == 8
    changed = inf.InfluenceIndex.load(tmp_path / "i").search(gradients(6, 5), 7, layers=["a"], method="trak")[0]
    values = inf.influence(store, gradients(6, 5), "trak", damping=0.5).layer("a")
    torch.testing.assert_close(changed, values.topk(7).values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", KEPT)
def test_a_damping_for_each_layer_is_kept(method: str, tmp_path: Path) -> None:
    store, damping = store_of(tmp_path / "s"), {"a": 0.02, "b": 0.7}
    index = inf.InfluenceIndex.build(store, path=tmp_path / "i")
    given = {"damping": damping, "factors": factors() if method == "ekfac" else None}
    index.add_curvature(method, **given)
    index.save(tmp_path / "i")
    again = inf.InfluenceIndex.load(tmp_path / "i")
    for name in SHAPES:
        scores = again.search(gradients(6, 5), 7, layers=[name], method=method)[0]
        values = inf.influence(store, gradients(6, 5), method, **given).layer(name)
        torch.testing.assert_close(scores, values.topk(7).values, rtol=1e-4, atol=1e-5)
    with pytest.raises(inf.InputError, match="damping: has none for layer 'b'"):
        index.add_curvature(method, damping={"a": 0.1}, factors=given["factors"])


def test_it_follows_appended_deleted_and_compacted_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from influence_fast.search import kept_curvature as curvature

    store = store_of(tmp_path / "s")
    index = index_of(store, path=tmp_path / "i")
    index.save(tmp_path / "i")
    store = append(tmp_path / "s", gradients(30, 2), range(200, 230), shapes=SHAPES, shard_rows=70)
    read = []
    plain = curvature._blocks
    monkeypatch.setattr(
        curvature, "_blocks", lambda rows, name, first=0: read.append((name, first)) or plain(rows, name, first)
    )
    inf.InfluenceIndex.load(tmp_path / "i").update(store, tmp_path / "i")
    # What needs no other rows reads the new ones alone.
    assert sorted(read) == [(name, first) for name in SHAPES for first in (0, 0, 200, 200)]
    same(inf.InfluenceIndex.load(tmp_path / "i"), index_of(store), exact=False)
    store.delete([3, 50, 210])
    with pytest.raises(inf.StoreError, match=r"curvature for trak is of other rows .* --update"):
        inf.InfluenceIndex.load(tmp_path / "i").search(gradients(1, 1), 1, method="trak")
    index = inf.InfluenceIndex.load(tmp_path / "i")
    index.update(store, tmp_path / "i")
    fresh = index_of(store)
    same(index, fresh)
    same(inf.InfluenceIndex.load(tmp_path / "i"), fresh)
    store.compact()
    compacted = inf.InfluenceIndex.updated(tmp_path / "i", store)
    same(compacted, index_of(store))
    same(inf.InfluenceIndex.load(tmp_path / "i"), compacted)
    more = write_store(tmp_path / "more", gradients(15, 8), shapes=SHAPES)
    compacted.add(more)
    both = inf.InfluenceIndex.build(store)
    both.add(more)
    for method in KEPT:
        both.add_curvature(method, factors=factors() if method == "ekfac" else None)
    same(compacted, both, exact=False)


def test_a_rank_is_kept_with_what_it_holds(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    data = {"w": torch.randn(150, 60, generator=random) * torch.arange(1, 61) ** -1.0}
    store = write_store(tmp_path / "s", data, shapes={"w": (10, 6)}, shard_rows=70)
    queries = {"w": torch.randn(4, 60, generator=random) * torch.arange(1, 61) ** -1.0}
    index = inf.InfluenceIndex.build(store, path=tmp_path / "i")
    index.add_curvature("trackstar", rank=30)
    index.save(tmp_path / "i")
    index = inf.InfluenceIndex.load(tmp_path / "i")
    assert 0.97 < index.curvature["trackstar"]["w"] < 1
    values = inf.influence(store, queries, "trackstar").layer("w")
    scores, ids = index.search(queries, 150, method="trackstar")
    found = torch.empty_like(values).scatter_(1, ids, scores)
    assert float(torch.corrcoef(torch.stack([found.flatten(), values.flatten()]))[0, 1]) > 0.99


def rewrite(folder: Path, change: Any) -> None:
    document = json.loads((folder / "index.json").read_text())
    del document["seal"]
    change(document)
    (folder / "index.json").write_bytes(seal(document))


def test_damage_is_named(tmp_path: Path) -> None:
    from influence_fast.search.index_files import describe, find_damage

    folder = tmp_path / "i"
    index_of(store_of(tmp_path / "s"), path=folder).save(folder)
    queries = gradients(2, 5)
    good = {file.name: file.read_bytes() for file in folder.iterdir()}

    def restored() -> None:
        for name, data in good.items():
            (folder / name).write_bytes(data)

    def ask(method: str) -> None:
        inf.InfluenceIndex.load(folder).search(queries, 3, method=method)

    entries = json.loads(good["index.json"])["curvature"]
    for entry in entries:
        name, method = entry["data"]["file"], entry["method"]
        raw = bytearray(good[name])
        for at in (3, len(raw) // 2, len(raw) - 1):
            raw[at] ^= 1
            (folder / name).write_bytes(raw)
            with pytest.raises(inf.StoreError, match=f"{name}: damaged index, its checksum"):
                ask(method)
            assert [name in str(damage) for damage in find_damage(folder)] == [True]
            raw[at] ^= 1
        (folder / name).write_bytes(good[name][:-1])
        with pytest.raises(inf.StoreError, match=f"{name}: damaged index, .* bytes where"):
            ask(method)
        (folder / name).unlink()
        with pytest.raises(inf.StoreError, match=f"no {name}"):
            ask(method)
        restored()
        # Files that were written whole and are not what they should be: another layer's, no tensors at all.
        other = next(e for e in entries if e["method"] == method and e["layer"] != entry["layer"])
        for content in (good[other["data"]["file"]], b"nothing", b"\0" * 64):
            (folder / name).write_bytes(content)

            def swap(document: dict, name: str = name) -> None:
                mine = next(e for e in document["curvature"] if e["data"]["file"] == name)
                mine["data"] = describe(folder / name)

            rewrite(folder, swap)
            with pytest.raises(inf.StoreError, match=f"{name}: damaged index"):
                ask(method)
            restored()
    for change, message in [
        (lambda d: d["curvature"].append(d["curvature"][0]), "names layer 'a'"),
        (lambda d: d["curvature"][0].update(layer="z"), "names layer 'z'"),
        (lambda d: d["curvature"][0].update(damping=-1.0), "damaged index"),
        (lambda d: d["curvature"][0].update(method="ekfac2"), "damaged"),
        (lambda d: d["curvature"][0]["data"].update(file="../x"), "damaged"),
    ]:
        rewrite(folder, change)
        with pytest.raises(inf.StoreError, match=message):
            inf.InfluenceIndex.load(folder)
        restored()
    ask("trackstar")


def test_errors(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", 300)
    index = inf.InfluenceIndex.build(store)
    queries = gradients(1, 1)
    with pytest.raises(inf.InputError, match="method: expected one of dot, cosine, datainf"):
        index.search(queries, 1, method="outlier")
    with pytest.raises(inf.InputError, match="factors: ekfac needs those of layer 'a'"):
        index.search(queries, 1, method="ekfac")
    for settings, message in [
        ({"method": "dot"}, "method: expected one of datainf"),
        ({"damping": 0}, "damping: expected a positive share"),
        ({"rank": 0}, "rank: expected a positive int"),
    ]:
        with pytest.raises(inf.InputError, match=message):
            index.add_curvature(**{"method": "trak", **settings})
    approximate = inf.InfluenceIndex.build(store, "SQ8")
    with pytest.raises(inf.InputError, match="by a Flat index alone, this one is SQ8"):
        approximate.search(queries, 1, method="trak")
    with pytest.raises(inf.InputError, match="by a Flat index alone, this one is SQ8"):
        approximate.add_curvature("trak")
    assert torch.equal(approximate.search(queries, 1, method="dot")[1], approximate.search(queries, 1)[1])
