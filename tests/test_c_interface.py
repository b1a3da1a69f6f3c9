"""The C interface: what the header says of itself, and the same bits as the operations, through ctypes.

The library is the package's, or what ``INFLUENCE_FAST_C_LIBRARY`` names (``csrc/tests/run.sh`` leaves one there);
csrc/tests/c_test.c has the rest.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import influence_fast as inf
from influence_fast import ops

ROOT = Path(__file__).parents[1]
HEADER = Path(inf.get_include(), "influence_fast.h").read_text()
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KINDS = {"rademacher": 2, "gaussian": 3, "sjlt": 4}

i64 = ctypes.c_int64
fields = {
    "TokensC": "data:p dtype:i samples:q tokens:q features:q sample_stride:q token_stride:q",
    "MatrixC": "data:p dtype:i rows:q columns:q row_stride:q column_stride:q",
    "SideC": "kind:i scale:f key:Q k:q features:q offset:q entries:p row_stride:q",
    "ChangeC": "weight:p m:p v:p beta1:f beta2:f eps:f",
}
types = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "q": i64, "Q": ctypes.c_uint64, "f": ctypes.c_float}
TokensC, MatrixC, SideC, ChangeC = (
    type(name, (ctypes.Structure,), {"_fields_": [(f.split(":")[0], types[f[-1]]) for f in text.split()]})
    for name, text in fields.items()
)


def test_the_header_has_the_version_of_the_package() -> None:
    numbers = re.findall(r"define INFLUENCE_FAST_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", HEADER)
    assert ".".join(numbers) == inf.__version__


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="csrc is not beside the tests")
def test_flags_are_those_of_the_extension() -> None:
    """Bits follow from them."""
    lists = (ROOT / "csrc/CMakeLists.txt").read_text()
    setup = (ROOT / "setup.py").read_text()
    for flag in ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-mprefer-vector-width=512"):
        assert flag in lists, flag
        assert flag in setup, flag
    machine = re.compile(r"(?<![\w-])-m(?:avx|fma|f16c)[a-z0-9]*")
    assert set(machine.findall(lists)) == set(machine.findall(setup))


@pytest.fixture(scope="module")
def library() -> Any:
    native = pytest.importorskip("influence_fast_cpu")
    loaded = ctypes.CDLL(os.environ.get("INFLUENCE_FAST_C_LIBRARY") or inf.get_library())
    loaded.influence_fast_last_error.restype = ctypes.c_char_p
    assert loaded.influence_fast_set_isa(native.isa().encode()) == 0
    return loaded


def call(library: Any, name: str, *arguments: Any) -> None:
    def passed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return ctypes.c_void_p(value.data_ptr())
        return i64(value) if isinstance(value, int) else None if value is None else ctypes.byref(value)

    code = getattr(library, f"influence_fast_{name}")(*map(passed, arguments))
    assert code == 0, library.influence_fast_last_error().decode()


def tokens(x: Tensor) -> Any:
    return TokensC(x.data_ptr(), DTYPES[x.dtype], *x.shape, *x.stride()[:2])


def matrix(x: Tensor) -> Any:
    return MatrixC(x.data_ptr(), DTYPES[x.dtype], *x.shape, *x.stride())


def side(given: ops.Side) -> Any:
    low, high = given.words
    return SideC(KINDS[given.kind], given.scale, high << 32 | low, given.k, given.features, given.offset, None, 0)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_random_matrices_and_sketches_have_the_same_bits(library: Any, kind: Any) -> None:
    given = ops.Side(kind, -5, 24, 1500, scale=0.3, offset=64)
    out = torch.empty(7, 400)
    call(library, "random_matrix", side(given), 9, 7, 100, 400, out)
    assert torch.equal(out, ops.random_matrix(given, (9, 16), (100, 500), backend="cpu"))
    for dtype in DTYPES:
        g = draw(6, 1500, dtype=dtype)
        out = torch.empty(6, 24)
        call(library, "sketch", matrix(g), side(given), out)
        assert torch.equal(out, ops.sketch(g, given, backend="cpu"))
    g = draw(6, 1500).double()
    wide = torch.empty(6, 24, dtype=torch.float64)
    call(library, "sketch_float64", g, 6, 1500, 1500, side(given), wide)
    assert torch.equal(wide, ops.sketch(g, given, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_same_bits(library: Any, dtype: torch.dtype) -> None:
    x, dy, lengths = draw(5, 9, 70, dtype=dtype), draw(5, 9, 40, dtype=dtype, seed=1), torch.tensor([9, 1, 0, 4, 8])
    spans = torch.stack([torch.zeros_like(lengths), lengths], 1)
    here = (tokens(x), tokens(dy), spans)
    out = torch.empty(5, 40, 70)
    call(library, "outer", *here, out)
    assert torch.equal(out, ops.outer(x, dy, lengths, backend="cpu"))
    for kinds in (("rademacher", "sjlt"), ("sjlt", "rademacher"), ("rademacher", "rademacher")):
        right, left = ops.Side(kinds[0], "layer/right", 16, 70), ops.Side(kinds[1], "layer/left", 8, 40)  # type: ignore[arg-type]
        out = torch.empty(5, 8, 16)
        call(library, "project_outer", *here, side(right), side(left), out)
        assert torch.equal(out, ops.project_outer(x, dy, right, left, lengths, backend="cpu"))
    m, v, q = draw(40, 70, seed=2), draw(40, 70, seed=3).abs(), draw(3, 40, 70, seed=4)
    for kind in KINDS:
        whole = ops.Side(kind, 3, 32, 2800)  # type: ignore[arg-type]
        adam = ops.AdamState(m, v, (0.9, 0.99), 1e-6)
        out = torch.empty(5, 32)
        call(library, "sketch_outer", *here, side(whole), None, out)
        assert torch.equal(out, ops.sketch_outer(x, dy, whole, lengths, backend="cpu"))
        call(library, "sketch_outer", *here, side(whole), ChangeC(m.data_ptr(), None, None, 0, 0, 0), out)
        assert torch.equal(out, ops.sketch_outer(x, dy, whole, lengths, m, backend="cpu"))
        change = ChangeC(None, m.data_ptr(), v.data_ptr(), 0.9, 0.99, 1e-6)
        call(library, "sketch_outer", *here, side(whole), change, out)
        assert torch.equal(out, ops.sketch_outer(x, dy, whole, lengths, adam=adam, backend="cpu"))
    out = torch.empty(5, 3)
    call(library, "score_outer", *here, q, 3, out)
    assert torch.equal(out, ops.score_outer(x, dy, q, lengths, backend="cpu"))
    out = torch.empty(5, 5)
    call(library, "ghost_dot", *here, *here, out)
    assert torch.equal(out, ops.ghost_dot(x, dy, x, dy, lengths, lengths, backend="cpu"))
    out = torch.empty(5)
    call(library, "ghost_norm", *here, out)
    assert torch.equal(out, ops.ghost_norm(x, dy, lengths, backend="cpu"))


def test_ranks_have_the_same_bits(library: Any) -> None:
    values = draw(4, 900).mul(20).round()
    out, ranks, votes = torch.empty(4, 900), *torch.empty(2, 900, dtype=torch.float64)
    call(library, "rank", matrix(values), out)
    assert torch.equal(out, ops.rank(values, backend="cpu"))
    call(library, "rank_and_vote", matrix(values), 90, ranks, votes)
    for got, expected in zip((ranks, votes), ops.rank_and_vote(values, 90, backend="cpu"), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_a_search_has_the_bits_of_the_index(library: Any, tmp_path: Path, metric: str) -> None:
    from stores import write_store

    train, queries = (
        {"a": draw(600, 30), "b": draw(600, 65, seed=1)},
        {"a": draw(7, 30, seed=2), "b": draw(7, 65, seed=3)},
    )
    index = inf.InfluenceIndex.build(write_store(tmp_path / "s", train), "Flat", metric)
    expected, expected_rows = index.search_rows(queries, 12)
    handle = ctypes.c_void_p()
    call(library, "index_build", (MatrixC * 2)(*map(matrix, train.values())), 2, handle)
    scores, rows = torch.empty(7, 12, dtype=torch.float64), torch.empty(7, 12, dtype=torch.int64)
    asked = torch.cat(list(queries.values()), 1)
    cosine = ctypes.c_int(metric == "cosine")
    memory = [ctypes.c_void_p(t.data_ptr()) for t in (asked, scores, rows)]
    found = library.influence_fast_index_search(handle, memory[0], i64(7), None, cosine, None, i64(12), *memory[1:])
    assert found == 0
    library.influence_fast_index_free(handle)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(scores, expected)
