"""The stand-in for sjlt's module, against the dense matrix that its buffers say."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import influence_fast as inf
from influence_fast.compat.sjlt import SJLTProjection


def dense(projection: SJLTProjection) -> Tensor:
    matrix = torch.zeros(projection.proj_dim, projection.original_dim, dtype=torch.float64)
    for column in range(projection.original_dim):
        for row, sign in zip(projection.rand_indices[column], projection.rand_signs[column], strict=True):
            matrix[row, column] += sign.double() / projection.c**0.5
    return matrix


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_in_the_inputs_dtype(dtype: torch.dtype) -> None:
    projection = SJLTProjection(40, 7, c=3, device="cpu")
    matrix, x, y = dense(projection), torch.randn(4, 40).to(dtype), torch.randn(4, 7).to(dtype)
    there, back = projection(x), projection.transpose(y)
    assert there.dtype == back.dtype == dtype
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(there.double(), x.double() @ matrix.T, **loose)
    torch.testing.assert_close(back.double(), y.double() @ matrix, **loose)


def test_buffers_are_the_matrix() -> None:
    torch.manual_seed(0)
    first, second = (SJLTProjection(30, 5, c=2, device="cpu") for _ in range(2))
    x = torch.randn(3, 30)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    second.rand_signs.copy_(-first.rand_signs)
    torch.testing.assert_close(second(x), -first(x))
    assert (first.rand_indices.dtype, first.rand_signs.dtype) == (torch.int64, torch.int8)
    assert set(first.rand_signs.unique().tolist()) == {-1, 1}
    assert (first.get_compression_ratio(), first.get_sparsity_ratio()) == (6.0, 0.6)


@pytest.mark.parametrize(
    ("sizes", "said"), [((0, 4), "positive"), ((4, 0), "positive"), ((4, 4, 0), "c must"), ((9, 2, 3), "at least c")]
)
def test_sizes_that_cannot_be(sizes: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SJLTProjection(*sizes, device="cpu")


def test_inputs_of_other_shapes() -> None:
    projection = SJLTProjection(8, 4, device="cpu")
    for bad in (torch.ones(2, 7), torch.ones(8)):
        with pytest.raises(ValueError, match=r"\(batch, 8\)"):
            projection(bad)
    with pytest.raises(ValueError, match=r"\(batch, 4\)"):
        projection.transpose(torch.ones(2, 8))


def test_the_module_is_ours_while_patched() -> None:
    before = sys.modules.get("sjlt")
    with inf.patch("sjlt") as patched:
        import sjlt

        assert inf.patch("sjlt") is patched
        assert patched.places == ('sys.modules["sjlt"]',)
        assert sjlt.SJLTProjection is SJLTProjection
        assert sjlt.get_cuda_info()["cuda_available"] == torch.cuda.is_available()
    assert sys.modules.get("sjlt") is before
