"""Exact search against float64 brute force: values, order and ties, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from definitions import check, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store
from torch import Tensor

import influence_fast as inf
from influence_fast.search import exact, segments

native = pytest.importorskip("influence_fast_cpu")


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.set_isa(request.param)
    yield request.param
    native.set_isa(native.isas()[-1])


TIED = {"a": 7, "b": 65}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> inf.GradientStore:
    """Rows that are equal, zero, and of very different lengths."""
    train = draw(700, TIED, 0)
    for gradients in train.values():
        gradients *= (2 * torch.randn(700, 1, generator=torch.Generator().manual_seed(2))).exp()
        gradients[100:300] = gradients[5]
        gradients[400:410] = 0
    return write_store(tmp_path_factory.mktemp("tied") / "s", train, shard_rows=150)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("m", [1, 3, 8, 13, 70])
def test_ties_zeros_duplicates_and_heavy_tails(tied: inf.GradientStore, isa: str, metric: str, m: int) -> None:
    queries = draw(m, TIED, 1)
    for name in TIED:
        queries[name][0] = tied.read(name)[5]
        queries[name][-1] *= m != 3
    index = inf.InfluenceIndex.build(tied, "Flat", metric)
    for k, harmful in ((1, False), (1, True), (10, False), (250, False), (250, True), (700, False)):
        check(tied, index, queries, k, harmful)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_more_rows_are_alike_than_a_query_keeps(tmp_path: Path, metric: str) -> None:
    """The copy's rounding tells none of them apart, so that a scan scores the best it has exactly to go on."""
    dims = {"a": 40, "b": 24}
    one, noise, queries = draw(1, dims, 0), draw(4000, dims, 1), draw(3, dims, 2)
    train = {name: one[name] + 1e-3 * noise[name] for name in dims}
    for name in dims:
        queries[name] += one[name]
    index = inf.InfluenceIndex.build(store := write_store(tmp_path / "s", train, shard_rows=1500), "Flat", metric)
    for k in (1, 10, 100):
        check(store, index, queries, k)


def test_every_instruction_set_gives_the_same_bits(tmp_path: Path) -> None:
    dims = {"a": 33, "b": 128}
    store, queries = write_store(tmp_path / "s", draw(900, dims, 0), shard_rows=400), draw(20, dims, 1)
    found = []
    for name in native.isas():
        native.set_isa(name)
        index = inf.InfluenceIndex.build(store, "Flat", "cosine")
        found.append(index.search_rows(queries, 9))
    native.set_isa(native.isas()[-1])
    for values, rows in found[1:]:
        assert torch.equal(values, found[0][0])
        assert torch.equal(rows, found[0][1])


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_layers_weights_and_filters_chosen_when_searching(tmp_path: Path, metric: str) -> None:
    dims = {"a": 5, "b": 70, "c": 16}
    store, queries = write_store(tmp_path / "s", draw(600, dims, 0), shard_rows=200), draw(6, dims, 1)
    index = inf.InfluenceIndex.build(store, "Flat", metric)
    only = torch.rand(600, generator=torch.Generator().manual_seed(2)) < 0.1
    for layers in ({"b": 1.0}, {"a": 2.0, "c": 0.25}, {"a": 1.0, "b": 3.0, "c": 1e-3}):
        for chosen in (None, only):
            check(store, index, queries, 20, False, layers, chosen)
            check(store, index, queries, 20, True, layers, chosen)
    ids = only.nonzero()[:, 0].tolist()
    assert torch.equal(index.search(queries, 3, only=ids)[1], index.search(queries, 3, only=only)[1])
    with pytest.raises(inf.InputError, match="from 1 to the 2 rows of the index that are left"):
        index.search(queries, 3, only=ids[:2])
    with pytest.raises(inf.InputError, match="no row has the id 600"):
        index.search(queries, 1, only=[600])
    with pytest.raises(inf.InputError, match="a mask of the 600 rows"):
        index.search(queries, 1, only=only[:5])
    with pytest.raises(inf.InputError, match="not negative"):
        index.search(queries, 1, layers={"a": -1.0})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_narrow_stores(tmp_path: Path, dtype: str) -> None:
    dims = {"a": 30, "b": 65}
    store, queries = write_store(tmp_path / "s", draw(500, dims, 0), dtype=dtype, shard_rows=130), draw(7, dims, 1)
    check(store, inf.InfluenceIndex.build(store, "Flat"), queries, 12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 6), st.integers(-42, 30), st.integers(0, 99))
def test_any_size_and_scale(tmp_path_factory, rows: int, dim: int, m: int, exponent: int, seed: int) -> None:
    train, queries = draw(rows, {"a": dim}, seed), draw(m, {"a": dim}, seed + 1)
    train["a"] = train["a"].round(decimals=1) * 10.0**exponent
    train["a"][rows // 2 :] *= 1e-3
    store = write_store(tmp_path_factory.mktemp("s") / "s", train, shard_rows=7)
    for metric in ("dot", "cosine"):
        check(store, inf.InfluenceIndex.build(store, "Flat", metric), queries, min(rows, 5))


def test_a_layer_of_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_PART", 32)
    dims = {"a": 100, "b": 32}
    store, queries = write_store(tmp_path / "s", draw(300, dims, 0), shard_rows=100), draw(20, dims, 1)
    index = inf.InfluenceIndex.build(store, "Flat")
    assert len(index._scan.parts) == 5
    check(store, index, queries, 10)
    check(store, index, queries, 10, True, {"a": 1.0})


def test_segments_files_parts_of_a_store_and_later_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_SEGMENT_BYTES", 1)  # 192 rows a segment
    dims = {"a": 20}
    data, queries = draw(1000, dims, 0), draw(5, dims, 1)
    whole = write_store(tmp_path / "s", data, shard_rows=170)
    expected = inf.InfluenceIndex.build(whole).search(queries, 30)
    built = inf.InfluenceIndex.build(whole, path=tmp_path / "i")
    assert len(list((tmp_path / "i").glob("scan-*.bin"))) == 6
    first = write_store(tmp_path / "f", {"a": data["a"][:450]}, shard_rows=100)
    rest = write_store(tmp_path / "r", {"a": data["a"][450:]}, shard_rows=100)
    grown = inf.InfluenceIndex.build(first, path=tmp_path / "g")
    grown.add(rest)
    grown.save(tmp_path / "g")
    for index in (built, inf.InfluenceIndex.load(tmp_path / "i"), grown, inf.InfluenceIndex.load(tmp_path / "g")):
        for one, other in zip(index.search(queries, 30), expected, strict=True):
            assert torch.equal(one, other)
    share = inf.InfluenceIndex.build(whole, rows=range(333, 777), path=tmp_path / "p")
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[333:777] = True
    expected = built.search(queries, 30, only=mask)
    for one, other in zip(inf.InfluenceIndex.load(tmp_path / "p").search(queries, 30), expected, strict=True):
        assert torch.equal(one, other)
    assert list(share.ids)[:2] == [333, 334]


def test_many_readers_at_once(tmp_path: Path) -> None:
    dims = {"a": 48}
    store, queries = write_store(tmp_path / "s", draw(2000, dims, 0), shard_rows=500), draw(30, dims, 1)
    for metric, factory in (("dot", "Flat"), ("cosine", "Flat"), ("dot", "IVF16,Flat")):
        index = inf.InfluenceIndex.build(store, factory, metric)

        def alone(q: int, index: inf.InfluenceIndex = index) -> tuple[Tensor, Tensor]:
            return index.search({"a": queries["a"][q : q + 1]}, 10)

        expected = [alone(q) for q in range(30)]
        if factory == "Flat":  # FAISS multiplies many queries in another way than one
            together = index.search(queries, 10)
            for i in range(2):
                assert torch.equal(torch.cat([found[i] for found in expected]), together[i])
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(alone, list(range(30)) * 4))
        for (values, ids), (wanted, rows) in zip(found, expected * 4, strict=True):
            assert torch.equal(values, wanted)
            assert torch.equal(ids, rows)


@pytest.mark.parametrize("where", ["truncated", "flipped", "another"])
def test_a_store_that_changed_is_never_scored(tmp_path: Path, where: str) -> None:
    dims = {"a": 24}
    data, queries = draw(400, dims, 0), draw(3, dims, 1)
    store = write_store(tmp_path / "s", data, shard_rows=100)
    index = inf.InfluenceIndex.build(store, path=tmp_path / "i")
    # Scores again what it finds, among which the best is.
    approximate = inf.InfluenceIndex.build(store, "HNSW8")
    best = int(index.search(queries, 1)[1][0, 0])
    shard = tmp_path / "s" / f"shard-{best // 100:05d}.safetensors"
    raw = bytearray(shard.read_bytes())
    if where == "truncated":
        shard.write_bytes(raw[:-4])
        for found in (index, approximate):
            with pytest.raises(inf.StoreError, match=shard.name):
                found.search(queries, 1)
        return
    if where == "another":
        data["a"][0] += 1
        write_store(tmp_path / "t", data, shard_rows=100)
        with pytest.raises(inf.StoreError, match="another store than was indexed"):
            inf.InfluenceIndex.load(tmp_path / "i", inf.GradientStore.open(tmp_path / "t"))
        return
    value = data["a"][best].numpy().tobytes()
    raw[raw.index(value) + 3] ^= 0x40  # the exponent of its first number
    shard.write_bytes(raw)
    with pytest.raises(inf.StoreError, match=shard.name):
        index.search(queries, 1)
    checked = inf.GradientStore.open(tmp_path / "s", verify=True)
    with pytest.raises(inf.StoreError, match=rf"{shard.name}: damaged, the checksum"):
        inf.aggregate(inf.influence(checked, queries), "mean")
    (tmp_path / "i" / "scan-00000.bin").write_bytes(b"short")
    with pytest.raises(inf.StoreError, match=r"scan-00000\.bin: damaged index, 5 bytes"):
        inf.InfluenceIndex.load(tmp_path / "i", store)


def test_a_damaged_index_is_found(tmp_path: Path) -> None:
    # Small ones are a single block of bytes, and checked when they are opened.
    store = write_store(tmp_path / "s", draw(1000, {"a": 9}, 0))
    inf.InfluenceIndex.build(store, path=tmp_path / "i")
    raw = bytearray((tmp_path / "i" / "scan-00000.bin").read_bytes())
    raw[10] ^= 1
    (tmp_path / "i" / "scan-00000.bin").write_bytes(raw)
    index = inf.InfluenceIndex.load(tmp_path / "i")
    with pytest.raises(
        inf.StoreError, match=r"scan-00000\.bin: damaged, the checksum .* \(of an index; build it again"
    ):
        index.search(draw(2, {"a": 9}, 1), 3)
    with pytest.raises(inf.StoreError, match=r"scan-00000\.bin: damaged, the checksum"):
        index.save(tmp_path / "j")
    inf.InfluenceIndex.load(tmp_path / "i", verify=False)


@pytest.mark.parametrize("name", ["codes", "scale", "error", "norm", "order", "bound"])
@pytest.mark.parametrize("filtered", [False, True])
def test_what_a_search_reads_of_an_index_is_checked(tmp_path: Path, name: str, filtered: bool) -> None:
    """Damage is named by the search that has read it; one that has not gives the answer of the whole index."""
    dims, count = {"a": 100, "b": 60}, 4000
    data, queries = draw(count, dims, 0), draw(3, dims, 1)
    data = {layer: g * torch.linspace(1, 0.001, count)[:, None] for layer, g in data.items()}
    store = write_store(tmp_path / "s", data, shard_rows=1000)
    expected = inf.InfluenceIndex.build(store, path=tmp_path / "i")
    only = torch.arange(count) < 500 if filtered else None
    wanted = expected.search(queries, 5, only=only)
    path = tmp_path / "i" / "scan-00000.bin"
    raw = path.read_bytes()
    array = expected._scan.segments[0].arrays[name].tobytes()
    for share in (0.0, 0.98):
        changed = bytearray(raw)
        changed[raw.index(array) + int(share * len(array))] ^= 0x40
        path.write_bytes(changed)
        damaged = pytest.raises(inf.StoreError, match=r"scan-00000\.bin: damaged, the checksum")
        if name == "bound":
            # It says what may be left out.
            with damaged:
                inf.InfluenceIndex.load(tmp_path / "i")
            continue
        if name == "order":
            # In a small file it may share a block of bytes with `bound`.
            with damaged:
                inf.InfluenceIndex.load(tmp_path / "i").search(queries, 5, method="cosine")
            continue
        index = inf.InfluenceIndex.load(tmp_path / "i")
        if share == 0:
            # The longest rows come first.
            with damaged:
                index.search(queries, 5, only=only)
        elif name == "codes":
            for found, value in zip(index.search(queries, 5, only=only), wanted, strict=True):
                assert torch.equal(found, value)
        with pytest.raises(inf.StoreError, match=r"scan-00000\.bin: damaged, the checksum"):
            index.search(queries, 5, method="cosine")
    path.write_bytes(raw)
    again = inf.InfluenceIndex.load(tmp_path / "i")
    for found, value in zip(again.search(queries, 5, only=only), wanted, strict=True):
        assert torch.equal(found, value)
    assert 0 < int((again._scan.segments[0].seen == 2).sum()) < len(again._scan.segments[0].seen)
    again.search(queries, 5, method="cosine")
    assert (again._scan.segments[0].seen == 2).all()


def test_votes_from_an_index(tmp_path: Path) -> None:
    from influence_fast.search.votes import vote_from_index

    dims = {"a": 12, "b": 30}
    # Of integers, whose products are exact: the votes of both sides are too.
    data, queries = ({name: (16 * g).round() for name, g in draw(rows, dims, rows).items()} for rows in (400, 6))
    data["a"][:30] = data["a"][200]
    store = write_store(tmp_path / "s", data, shard_rows=150)
    votes, report = vote_from_index(inf.InfluenceIndex.build(store), queries, 20, check=12)
    expected = inf.aggregate(inf.influence(store, queries), "vote", fraction=0.05)
    assert report["checked"] == 12
    assert report["difference"] < 0.1
    off = float((votes - expected).abs().sum() / 2 / expected.abs().sum())
    assert off == pytest.approx(report["difference"], abs=1e-9)
