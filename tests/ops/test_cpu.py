"""What the CPU backend takes and refuses, and that the compiled module checks every argument before a kernel sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from influence_fast import InputError, ops
from influence_fast.ops import cpu, reference
from influence_fast.ops.cpu import native as on_cpu
from influence_fast.ops.projections import Side

native = pytest.importorskip("influence_fast_cpu")

SIDE = Side("sjlt", "s", 4, 30)


def test_results_ignore_defaults_of_torch() -> None:
    x, dy, values = torch.randn(2, 3, 5), torch.randn(2, 3, 6), torch.randn(3, 7)
    expected = ops.project_outer(x, dy, None, torch.ones(2, 6)), ops.rank(values), ops.rank_and_vote(values, 2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = ops.project_outer(x, dy, None, torch.ones(2, 6, dtype=torch.float32, device="cpu")), ops.rank(values)
            votes = ops.rank_and_vote(values, 2)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close((*got, *votes), (*expected[:2], *expected[2]), rtol=0, atol=0)


def test_negated_views_are_read_as_their_values() -> None:
    plain = torch.randn(4, 2, 5)
    x = torch.view_as_complex(torch.stack([torch.zeros_like(plain), -plain], -1)).conj().imag
    assert x.is_neg()
    assert torch.equal(x, plain)
    dy = torch.randn(4, 2, 6)
    for op, arguments in (
        (ops.outer, (dy,)),
        (ops.ghost_norm, (dy,)),
        (ops.project_outer, (dy, torch.ones(3, 5), None)),
    ):
        assert torch.equal(op(x, *arguments, backend="cpu"), op(plain, *arguments, backend="cpu"))
    assert torch.equal(ops.rank(x[0], backend="cpu"), ops.rank(plain[0], backend="cpu"))
    given, same = x[0].expand(6, 2, 5).flatten(1).T[:, :6], plain[0].expand(6, 2, 5).flatten(1).T[:, :6]
    assert torch.equal(ops.project_outer(dy, dy, None, given, backend="cpu"), ops.project_outer(dy, dy, None, same))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_without_memory_are_refused() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 5)
    with pytest.raises(InputError, match="x: expected a tensor with values in memory, got a FakeTensor"):
        cpu.ghost_norm(x, x, None)
    with pytest.raises(InputError, match="all have values, or shapes alone"):
        ops.project_outer(
            torch.ones(1, 2, 5), torch.ones(1, 2, 6), torch.ones(3, 5, device="meta"), None, backend="cpu"
        )
    with pytest.raises(InputError, match=r"g: expected a dense tensor, got torch\.sparse_coo"):
        cpu.sketch(torch.ones(2, 30).to_sparse(), SIDE)


def tokens(**changes: Any) -> Any:
    return native.Tokens(**{"data": 64, "dtype": "float32", "shape": (2, 3, 5), "strides": (15, 5, 1), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": 0}, "data: expected an address, got 0"),
        ({"data": 66}, "data: expected an address aligned to an element, got 66"),
        ({"dtype": "float64"}, "dtype: expected float32, float16 or bfloat16, got float64"),
        ({"shape": (2, 3)}, "shape: expected 3 numbers, got 2"),
        ({"shape": (2, -3, 5)}, "shape: expected at least 0, got -3"),
        ({"shape": (1 << 32, 1 << 32, 5)}, r"shape: expected a product below 2\^63"),
        ({"strides": (1 << 62, 1 << 62, 1)}, r"strides: expected a (sum|product) below 2\^63"),
        ({"strides": (15, 5, 2)}, "strides: expected features one after another, got 2"),
        ({"strides": (15, -5, 1)}, "strides: expected at least 0, got -5"),
    ],
)
def test_tokens(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens(**changes)


def test_nothing_needs_no_address() -> None:
    tokens(data=0, shape=(0, 3, 5))
    native.ghost_norm(tokens(data=0, shape=(0, 3, 5)), tokens(data=0, shape=(0, 3, 6)), spans=0, out=0, threads=1)


def test_side() -> None:
    good = {"kind": "sjlt", "key0": 1, "key1": 2, "k": 4, "features": 5, "scale": 1.0}
    for change, message in (
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"k": 1 << 31}, r"k: expected less than 2\^31"),
        ({"features": 0}, "features: expected at least 1, got 0"),
        ({"kind": "identity"}, "kind: expected rademacher, gaussian or sjlt, got identity"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            native.Side(**{**good, **change})


def test_arguments_that_do_not_fit_each_other() -> None:
    x, dy, threads = tokens(), tokens(shape=(2, 3, 6), strides=(18, 6, 1)), 1
    side = native.Side(kind="sjlt", key0=1, key1=2, k=4, features=5, scale=1.0)
    with pytest.raises(ValueError, match="dy: tokens: expected 3, got 4"):
        native.ghost_norm(x, tokens(shape=(2, 4, 6)), 0, 64, threads)
    with pytest.raises(ValueError, match="dy: dtype: expected float32, got bfloat16"):
        native.ghost_norm(x, tokens(dtype="bfloat16"), 0, 64, threads)
    with pytest.raises(ValueError, match="p_out: features: expected 6, got 5"):
        native.project_outer(x, dy, spans=0, p_in=side, p_out=side, out=64, threads=threads)
    with pytest.raises(ValueError, match="out: expected an address, got 0"):
        native.project_outer(x, dy, spans=0, p_in=side, p_out=None, out=0, threads=threads)
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        native.project_outer(x, dy, spans=0, p_in=side, p_out=None, out=64, threads=0)
    spans = torch.tensor([[0, 3], [2, 4]])
    with pytest.raises(ValueError, match="spans: expected 0 <= begin <= end <= 3 for sample 1, got 2 and 4"):
        native.ghost_norm(x, dy, spans.data_ptr(), 64, threads)
    values = native.Matrix(64, "float16", (2, 3), (3, 1))
    with pytest.raises(ValueError, match="values: dtype: expected float32, got float16"):
        native.rank(values, out=64, wide=False, threads=threads)
    with pytest.raises(ValueError, match="k: expected 1 to 3, got 4"):
        native.vote(native.Matrix(64, "float32", (2, 3), (3, 1)), k=4, votes=64, threads=threads)
    with pytest.raises(ValueError, match="columns: expected columns within 5, got 6"):
        native.random_matrix(side, row=0, rows=1, column=3, columns=3, out=64, threads=threads)


def test_arguments_of_the_exact_search() -> None:
    def table(*values: int) -> np.ndarray:
        return np.array(values, np.int64)

    good = {"firsts": table(0, 2), "data": table(64), "scales": table(0), "dims": table(5), "dtype": "float32"}
    for change, message in (
        ({"data": table(64, 64)}, "data: addresses: expected 1, got 2"),
        ({"data": table(0)}, "data: expected an address, got 0"),
        ({"dtype": "int8"}, "scales: expected an address, got 0"),
        ({"dtype": "int3"}, "dtype: expected float32, float16 or bfloat16, got int3"),
        ({"firsts": table(3, 2)}, "firsts: expected numbers in order, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            native.StoredRows(**{**good, **change})
    stored, weights = native.StoredRows(**good), np.ones(1)
    memory = dict.fromkeys(("codes", "scale", "error", "norm", "order", "longest", "factor"), 64)
    segment = native.Segment(**memory, stride=64, first=0, rows=2, parts=1)
    part = {"offset": 0, "dim": 5, "index": 0, "layer": 0, "begin": 0}
    search = {"segments": [segment], "stored": stored, "weights": weights, "cosine": False, "allowed": 0, "k": 1}
    rest = {"scores": 64, "rows": 64, "threads": 1}
    for change, message in (
        ({"dim": 6}, "parts: begin: expected numbers of the layer, got 6"),
        ({"layer": 1}, "parts: layer: expected one of 1, got 1"),
        ({"index": 1}, "parts: index: expected one of 1, got 1"),
        ({"offset": 60}, "parts: offset: expected bytes of a row, got 65"),
    ):
        queries, parts = native.Matrix(64, "float32", (1, 5), (5, 1)), [native.RowPart(**{**part, **change})]
        with pytest.raises(ValueError, match=message):
            native.exact_search(**search, parts=parts, queries=queries, **rest)
    queries = native.Matrix(64, "float32", (1, 4), (4, 1))
    with pytest.raises(ValueError, match="queries: columns: expected 5, got 4"):
        native.exact_search(**search, parts=[native.RowPart(**part)], queries=queries, **rest)
    queries = native.Matrix(64, "float32", (1, 5), (5, 1))
    with pytest.raises(ValueError, match="seen: blocks: expected 1, got 2"):
        native.exact_search(
            **search, parts=[native.RowPart(**part)], queries=queries, **rest, seen=np.zeros(2, np.uint8)
        )


def test_reference_agrees_on_a_strided_packed_batch() -> None:
    x, dy = torch.randn(5, 9).T, torch.randn(6, 9).T
    lengths = torch.tensor([4, 0, 5])
    assert on_cpu.tokens("x", x.expand(3, -1, -1))[1].stride()[0] == 0
    expected = reference.outer(x.expand(3, -1, -1), dy.expand(3, -1, -1), torch.tensor([[0, 4], [4, 4], [4, 9]]))
    torch.testing.assert_close(ops.outer(x, dy, lengths, backend="cpu"), expected)
