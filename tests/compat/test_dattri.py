"""dattri's projections by our sketches, and in its modules where it is installed."""

from __future__ import annotations

import pytest
import torch

import influence_fast as inf
from influence_fast import ops
from influence_fast.compat import dattri

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "rademacher", "sjlt", "random_mask", "grass", "grass_2"])
def test_every_kind_in_the_features_dtype(kind: str, dtype: torch.dtype) -> None:
    feature = torch.randint(-3, 4, (4, 90)).to(dtype)
    project = dattri.random_project(feature, 4, 8, 16, 5, kind)
    found = project(feature)
    assert (found.dtype, found.shape) == (dtype, (4, 8))
    name = {"normal": "gaussian"}.get(kind, kind.split("_2")[0])
    if kind == "grass_2":
        matrix = ops.Side("sjlt", 5, 8, 16).matrix() @ ops.Side("random_mask", 5, 16, 90).matrix()
    else:
        matrix = ops.Side(name, 5, 8, 90).matrix()  # type: ignore[arg-type]
    matrix = matrix / (8**0.5 if kind in ("normal", "rademacher") else 1)
    loose = {"rtol": 2e-2, "atol": 5e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), feature.double() @ matrix.double().T, **loose)
    assert not torch.equal(project(feature, ensemble_id=1), found)
    assert torch.equal(project(feature, 0), found)
    assert not torch.equal(dattri.random_project(feature, 4, 8, 16, 6, kind)(feature), found)


def test_lengths_are_kept() -> None:
    feature = torch.randn(6, 300)
    for kind in ("normal", "rademacher", "sjlt"):
        found = dattri.random_project(feature, 6, 2048, 16, 0, kind)(feature)
        torch.testing.assert_close(found.norm(dim=1), feature.norm(dim=1), rtol=0.15, atol=0)


def test_dicts_and_the_other_signature() -> None:
    flat = torch.randn(3, 24)
    named = {"a": flat[:, :10].view(3, 2, 5), "b": flat[:, 10], "c": flat[:, 11:]}
    params = dattri.RandomProjectionParams(6, 16, 2, 3, "cpu", "rademacher")
    expected = dattri.random_project(flat, 3, 6, 16, 2, "rademacher", device="cpu")(flat)
    torch.testing.assert_close(dattri.random_project(named, params)(named), expected)
    same = dattri.random_project(named, 3, 6, 16, 2, "identity")
    assert torch.equal(same(named), flat)
    # A mask of more than there is keeps all.
    assert torch.equal(dattri.random_project(flat, 3, 99, 16, 2, "random_mask")(flat), flat)


def test_what_is_refused() -> None:
    flat = torch.ones(3, 24)
    for kind in ("fourier", "grass_x", "grass_0"):
        with pytest.raises(ValueError, match=kind):
            dattri.random_project(flat, 3, 6, 16, 2, kind)
    with pytest.raises(ValueError, match="proj_dim"):
        dattri.random_project(flat, 3)
    with pytest.raises(KeyError):
        dattri.BasicProjector(24, 6, 0, "fourier", "cpu")
    with pytest.raises(ValueError, match="CUDA"):
        dattri.CudaProjector(24, 6, 0, "normal", "cpu")


def test_in_the_library() -> None:
    stock = pytest.importorskip("dattri.func.projection")
    feature, before = torch.randn(4, 50), stock.BasicProjector
    with inf.patch("dattri") as patched:
        assert inf.patch("dattri") is patched
        assert "dattri.func.projection.BasicProjector" in patched.places
        found = stock.random_project(feature, 4, 8, 16, 3, "normal")(feature, 1)
        assert torch.equal(found, dattri.random_project(feature, 4, 8, 16, 3, "normal")(feature, 1))
    assert stock.BasicProjector is before
