"""``rank`` and ``vote`` against SciPy and the literal definition, on every backend that can run here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backends import BACKENDS, Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch import Tensor

import influence_fast as inf
from influence_fast import ops

RUNNING = [name for name in ("reference", "cpu") if ops.available("rank", name) is None]
backends = pytest.mark.parametrize("backend", RUNNING)


def expected_ranks(values: Tensor) -> np.ndarray:
    return np.stack([rankdata(row) - 1 for row in values.double().numpy()]) if len(values) else values.numpy()


def check(values: Tensor, k: int, backend: str) -> None:
    ranks = expected_ranks(values)
    np.testing.assert_array_equal(ops.rank(values, backend=backend).double(), ranks)
    votes = -np.maximum(k - ranks, 0).sum(0)
    np.testing.assert_array_equal(ops.vote(values, k, backend=backend), votes)
    both = ops.rank_and_vote(values, k, backend=backend)
    np.testing.assert_array_equal(both[0], ranks.sum(0))
    np.testing.assert_array_equal(both[1], votes)


def test_the_extension_has_both() -> None:
    assert "cpu" in RUNNING, ops.available("rank", "cpu")


def values_of(kind: str, shape: tuple[int, int]) -> Tensor:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {
        "normal": normal,
        "tied": (normal * 3).round(),
        "heavy": normal.sign() * (normal.abs() * 20).exp().clamp(max=1e38),
        "narrow": 1 + normal * 1e-6,
        "equal": torch.full(shape, -2.5),
        "signs": torch.where(normal > 0, torch.tensor(0.0), torch.tensor(-0.0)) + (normal > 1).float(),
    }[kind]


KINDS = ("normal", "tied", "heavy", "narrow", "equal", "signs")


@backends
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 63), (5, 129), (1, 5000), (7, 3000)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_every_kind(backend: str, kind: str, shape: tuple[int, int]) -> None:
    values = values_of(kind, shape)
    for k in {1, max(1, shape[1] // 5), shape[1]}:
        check(values, k, backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.isa], ids=str)
def test_every_instruction_set(backend: Backend) -> None:
    with backend:
        for kind in KINDS:
            check(values_of(kind, (3, 2500)), 500, "cpu")
        check(long_rows(), 30_000, "cpu")


def long_rows() -> Tensor:
    """Rows that no cache holds: of many lengths, equal, half zeros, and all but one in one part of the range."""
    n = (1 << 19) + 77
    rows = torch.cat(
        [values_of(kind, (1, n)) for kind in ("heavy", "equal")] + [values_of("normal", (1, n)).relu()] * 2
    )
    rows[-1] = 1 + torch.randint(1 << 14, (n,), generator=torch.Generator().manual_seed(1)) * 2**-23
    rows[-1, 70_001] = -3e38
    return rows


@pytest.mark.parametrize("threads", [1, 3])
def test_long_rows_whose_sums_threads_share(threads: int) -> None:
    values = values_of("normal", (5, (1 << 18) + 77))
    values[1] = values[1].mul(2).round()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(values, 50_000, "cpu")
    finally:
        torch.set_num_threads(before)


@backends
@pytest.mark.parametrize("period", [8, 16])
def test_values_that_a_sample_misleads_about(backend: str, period: int) -> None:
    """Every eighth or sixteenth value, which is what a kernel may look at, is unlike the others."""
    values = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    values[:, ::period] -= 1000
    for k in (100, 1000, 3000):
        check(values, k, backend)
    check(-values, 1000, backend)


@backends
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_matrix(backend: str, data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-38, -1e38, 3e38, 1.0000001])
    numbers = st.one_of(few, st.floats(-(2.0**127), 2.0**127, width=32))
    rows = data.draw(st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=m, max_size=m))
    check(torch.tensor(rows, dtype=torch.float32), data.draw(st.integers(1, n)), backend)


@backends
def test_layouts_and_dtypes(backend: str) -> None:
    values = torch.randn(40, 60)
    check(values.T, 12, backend)
    check(values[::3, 5:50:2], 4, backend)
    check(values[:1].expand(3, -1), 7, backend)
    for dtype in (torch.float16, torch.bfloat16, *([torch.float64] if backend == "reference" else [])):
        check(values.to(dtype), 9, backend)
    assert ops.rank(values[:0], backend=backend).shape == (0, 60)
    assert ops.vote(values[:0], 3, backend=backend).tolist() == [0.0] * 60


@pytest.mark.skipif("cpu" not in RUNNING, reason="the extension is not built")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    values, before = torch.randn(13, 700).round(decimals=1), torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((ops.rank(values, backend="cpu"), ops.vote(values, 90, backend="cpu")))
    torch.set_num_threads(before)
    for ranks, votes in found[1:]:
        assert torch.equal(ranks, found[0][0])
        assert torch.equal(votes, found[0][1])


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_named(backend: str, bad: float) -> None:
    values = torch.randn(9, 30)
    values[4, 29] = values[7, 0] = bad
    for call in (lambda: ops.rank(values, backend=backend), lambda: ops.vote(values, 3, backend=backend)):
        with pytest.raises(inf.InputError, match="row 4 has NaN or infinity"):
            call()


@backends
@pytest.mark.parametrize("k", [0, 31, -1, 2.0, True])
def test_k_out_of_range(backend: str, k: object) -> None:
    with pytest.raises(inf.InputError, match="k: expected an int from 1 to the 30 columns"):
        ops.vote(torch.randn(2, 30), k, backend=backend)
