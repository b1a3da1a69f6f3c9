"""Exact search over stores of factors: bounds that hold, and the best rows by a float64 brute force."""

from __future__ import annotations

from pathlib import Path

import influence_fast_cpu as native
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store
from torch import Tensor

import influence_fast as inf
from influence_fast.search.factor_codes import factor_codes, query_terms


def low_rank(rows: int, out: int, in_: int, seed: int, decay: float = 0.5) -> Tensor:
    """Rows whose singular values fall, as those of gradients do."""
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(rows, 6, side, generator=random) for side in (out, in_))
    return ((left * decay ** torch.arange(6.0)[:, None]).mT @ right).flatten(1)


def brute(store: inf.GradientStore, queries: dict[str, Tensor], layers: list[str], cosine: bool) -> Tensor:
    left, right = (
        torch.cat([side[name].double() for name in layers], 1)
        for side in (queries, {name: store.read(name) for name in layers})
    )
    if cosine:
        left, right = (torch.nn.functional.normalize(side, eps=1e-300) for side in (left, right))
    return left @ right.T


def check(
    store: inf.GradientStore, index: inf.InfluenceIndex, queries: dict[str, Tensor], k: int, layers: list[str]
) -> None:
    expected = brute(store, queries, layers, index.metric == "cosine")
    scores, ids = index.search(queries, k, layers=layers)
    best = expected.topk(k)
    found = expected.gather(1, ids)
    # Rows whose scores are one but for the rounding of float64 stand for each other.
    torch.testing.assert_close(found, best.values, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    torch.testing.assert_close(scores.double(), found, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(-20, 15),
    st.integers(-20, 15),
    st.integers(0, 2**31),
)
def test_no_score_is_beyond_its_bound(out: int, in_: int, factors: int, power: int, other: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(9, factors, side, generator=random) * 10.0 ** (power / 2) for side in (out, in_))
    left[4] = 0
    left[5], right[5] = left[5] * 1e-15, right[5] * 1e-15
    query = torch.randn(3, out, in_, generator=random) * 10.0**other
    query[1, :, : in_ // 2] = 0
    if seed % 3 == 0:
        query[2] = 0
    stride = factors * (-(-out // 4) * 4 + -(-in_ // 4) * 4)
    codes, scale = np.full((9, stride), 128, np.uint8), np.empty((factors, 9), np.float32)
    error, norm = factor_codes(left, right, codes, 0, scale)
    found = query_terms([query])
    along, across, summed = found["term_bounds"].reshape(3, 3)
    assert norm[4] == error[4] == 0
    u, v = [], []
    at = 0
    for side, to in [pair for _ in range(factors) for pair in ((out, u), (in_, v))]:
        to.append(codes[:, at : at + side].astype(np.float64) - 128)
        at += -(-side // 4) * 4
    wide, both = -(-out // 64) * 64, -(-out // 64) * 64 + -(-in_ // 64) * 64
    for q in range(3):
        first, last = found["term_first"][q : q + 2]
        begin = found["term_begin"][q]
        terms = found["term_codes"][begin : begin + (last - first) * both].reshape(-1, both).astype(np.float64)
        assert (
            found["term_shift"].reshape(-1, 2)[first:last]
            == 128 * np.stack([terms[:, :wide].sum(1), terms[:, wide:].sum(1)], 1)
        ).all()
        score = np.zeros(9)
        for c in range(factors):
            pairs = (u[c] @ terms[:, :out].T) * (v[c] @ terms[:, wide : wide + in_].T)
            score += (pairs * found["term_scale"][first:last]).sum(1) * scale[c]
        exact = torch.einsum("oi,nco,nci->n", query[q].double(), left.double(), right.double()).numpy()
        slack = along[q] * error.astype(np.float64) + (across[q] + 1e-6 * summed[q]) * norm
        assert (np.abs(exact - score) <= slack + 1e-300).all()
        assert summed[q] >= torch.linalg.svdvals(query[q].double()).max() * 0.98


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize(("dtype", "factors"), [("float32", 1), ("float32", 3), ("int8_block", 2), ("int4", 2)])
def test_searches(tmp_path: Path, metric: str, dtype: str, factors: int) -> None:
    shapes = {"a": (16, 20), "wide": (5, 90), "bias": (7, 1)}
    data, queries = (
        {name: low_rank(n, out, in_, seed + place) for place, (name, (out, in_)) in enumerate(shapes.items())}
        for n, seed in ((900, 0), (11, 50))
    )
    data["a"][7] = data["wide"][7] = data["bias"][7] = 0
    data["a"][9] = data["a"][8]
    queries["a"][3] = 0
    store = write_store(tmp_path / "s", data, shapes=shapes, shard_rows=400, dtype=dtype, factors=factors)
    index = inf.InfluenceIndex.build(store, "Flat", metric, path=tmp_path / "i")
    numbers = sum(store.shards[0].numbers(name) for name in shapes)
    # A byte for each number that the store keeps, and what stands beside.
    assert index.nbytes < len(store) * (numbers + 64 + 4 * (2 * 3 + 3 * factors + 2)) + 4096
    for one in (index, inf.InfluenceIndex.load(tmp_path / "i")):
        for layers in (list(shapes), ["a"], ["wide", "bias"]):
            check(store, one, queries, 10, layers)
    some = torch.arange(len(store)) % 3 == 1
    _, ids = index.search(queries, 5, only=some)
    assert (ids % 3 == 1).all()
    expected = brute(store, queries, list(shapes), metric == "cosine")
    torch.testing.assert_close(expected.gather(1, ids), expected.masked_fill(~some, -torch.inf).topk(5).values)
    weighted = index.search(queries, 4, layers={"a": 2.0, "bias": 0.5})[0]
    if metric == "dot":
        total = 2 * brute(store, queries, ["a"], False) + 0.5 * brute(store, queries, ["bias"], False)
        torch.testing.assert_close(weighted.double(), total.topk(4).values, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 12),
    st.integers(2, 12),
    st.integers(1, 9),
    st.integers(-30, 12),
    st.integers(0, 99),
)
def test_any_size_and_scale(tmp_path_factory, rows: int, out: int, in_: int, m: int, power: int, seed: int) -> None:
    data = {"a": low_rank(rows, out, in_, seed) * 10.0**power}
    data["a"][rows // 2 :] *= 1e-3
    queries = {"a": low_rank(m, out, in_, seed + 1)}
    store = write_store(tmp_path_factory.mktemp("s") / "s", data, shapes={"a": (out, in_)}, shard_rows=7, factors=1)
    for metric in ("dot", "cosine"):
        check(store, inf.InfluenceIndex.build(store, "Flat", metric), queries, min(rows, 5), ["a"])


def test_rows_are_left_unread(tmp_path: Path) -> None:
    """The bound is of use: of rows whose singular values fall, few are scored exactly."""
    shapes = {"a": (24, 32), "b": (32, 16)}
    data, queries = ({n: low_rank(r, *s, seed) for n, s in shapes.items()} for r, seed in ((4000, 0), (4, 1)))
    store = write_store(tmp_path / "s", data, shapes=shapes, shard_rows=4000, factors=1)
    read: list[int] = []
    index = inf.InfluenceIndex.build(store, "Flat")
    rows = index._rows
    check_rows = rows.check
    rows.check = lambda layers, numbers: (read.append(len(numbers)), check_rows(layers, numbers))[1]  # type: ignore[method-assign]
    check(store, index, queries, 10, list(shapes))
    assert 4 * 10 <= sum(read) < 0.05 * 4 * 4000


def test_wrong_terms_are_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", {"a": low_rank(20, 4, 6, 0)}, shapes={"a": (4, 6)}, shard_rows=20, factors=1)
    index = inf.InfluenceIndex.build(store, "Flat")
    scan, queries = index._scan, low_rank(2, 4, 6, 3)
    assert scan is not None
    terms = query_terms([queries.view(2, 4, 6)])
    segments, _views = scan._segments(["a"], False)
    part = native.RowPart(offset=0, dim=12, index=0, layer=0, begin=0, factors=1, out=4, in_=6)
    scores, rows = torch.empty(2, 3, dtype=torch.float64), torch.empty(2, 3, dtype=torch.int64)

    def search(**changed) -> None:
        native.exact_search(
            segments=segments,
            parts=[part],
            stored=index._rows.native(["a"]),
            queries=native.Matrix(queries.data_ptr(), "float32", queries.shape, queries.stride()),
            weights=np.ones(1),
            cosine=False,
            allowed=0,
            k=3,
            scores=scores.data_ptr(),
            rows=rows.data_ptr(),
            threads=1,
            **{**terms, **changed},
        )

    search()
    for name, value, message in (
        ("term_first", terms["term_first"][:-1], "term_first: numbers"),
        ("term_first", terms["term_first"][::-1].copy(), "term_first"),
        ("term_begin", terms["term_begin"] + 1, "term_begin"),
        ("term_begin", terms["term_begin"] - 1, "term_begin"),
        ("term_codes", terms["term_codes"][:-1], "term_begin"),
        ("term_scale", terms["term_scale"][:-1], "term_shift"),
        ("term_bounds", terms["term_bounds"][:-1], "term_bounds"),
    ):
        with pytest.raises(ValueError, match=message):
            search(**{name: value})
    for wrong, message in (
        ({"dim": 8}, "dim: expected 12"),
        ({"out": 0}, "out: expected at least 1"),
        ({"in_": 1 << 20}, "1 to 65536"),
        ({"begin": 4}, "begin: expected 0"),
    ):
        about = {"offset": 0, "dim": 12, "index": 0, "layer": 0, "begin": 0, "factors": 1, "out": 4, "in_": 6, **wrong}
        with pytest.raises(ValueError, match=message):
            native.RowPart(**about)
