"""Other libraries' names on our operations, where those libraries are stood in for by modules of the same shape."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast import InputError, ops
from influence_fast.compat import bergson, trak


def module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """trak and a library that imported one of its classes by name."""
    originals = {name: type(name, (), {}) for name in ("BasicProjector", "CudaProjector", "ChunkedCudaProjector")}
    found = {
        "trak": module(monkeypatch, "trak", __path__=[]),
        "trak.projectors": module(monkeypatch, "trak.projectors", **originals),
        "trak.traker": module(monkeypatch, "trak.traker", BasicProjector=originals["BasicProjector"]),
        "less.collect": module(monkeypatch, "less.collect", CudaProjector=originals["CudaProjector"]),
        "other": module(monkeypatch, "other", CudaProjector=originals["CudaProjector"]),
    }
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"traker": "0.3.2", "bergson": "9.9"}[name])
    yield found
    inf.patch("trak").undo()


def test_a_patch_reaches_every_holder_and_is_undone(stock: dict[str, ModuleType]) -> None:
    before = {name: dict(vars(found)) for name, found in stock.items()}
    with inf.patch("trak") as patched:
        assert inf.patch("trak") is patched
        assert set(patched.places) == {
            "trak.projectors.BasicProjector",
            "trak.projectors.CudaProjector",
            "trak.projectors.ChunkedCudaProjector",
            "trak.traker.BasicProjector",
            "less.collect.CudaProjector",
        }
        assert stock["trak.traker"].BasicProjector is trak.BasicProjector
        assert stock["other"].CudaProjector is before["other"]["CudaProjector"]
    for name, found in stock.items():
        assert {k: v for k, v in vars(found).items() if k in before[name]} == before[name]
    patched.undo()


def test_a_version_that_is_not_known_is_refused(stock: dict[str, ModuleType]) -> None:
    with pytest.raises(InputError, match=r"bergson: expected version 2\.5\.1, got 9\.9"):
        inf.patch("bergson")
    with pytest.raises(InputError, match=r"expected one of bergson, trak, fast_jl, .*, got 'numpy'"):
        inf.patch("numpy")


def test_fast_jl_is_a_module() -> None:
    before = sys.modules.get("fast_jl")
    with inf.patch("fast_jl"):
        import fast_jl

        odd = fast_jl.project_rademacher_8(torch.ones(8, 10241), 512, 3, 7)
        assert bool((odd.remainder(2) == 1).all())
        half = torch.randint(-2, 3, (3, 100)).half()
        same = fast_jl.project_normal_16(half, 512, 3, 1)
        torch.testing.assert_close(same, fast_jl.project_normal_32(half.float(), 512, 3, 9))
        assert same.dtype == torch.float32
        with pytest.raises(ValueError, match="multiple of 512"):
            fast_jl.project_rademacher_8(half, 100, 3, 1)
        with pytest.raises(ValueError, match="float16 or float32"):
            fast_jl.project_rademacher_8(half.double(), 512, 3, 1)
    assert sys.modules.get("fast_jl") is before


@pytest.mark.parametrize("proj_type", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_trak_projects_without_a_scale(proj_type: str, dtype: torch.dtype) -> None:
    projector = trak.BasicProjector(50, 8, 3, proj_type, "cpu", dtype=dtype)
    grads = torch.randint(-3, 4, (4, 50)).float()
    first, second = projector.project(grads, 0), projector.project(grads, 1)
    assert (first.dtype, first.shape) == (dtype, (4, 8))
    assert not torch.equal(first, second)
    kind = "gaussian" if proj_type == "normal" else "rademacher"
    matrix = ops.Side(kind, 3, 8, 50).matrix()  # type: ignore[arg-type]
    torch.testing.assert_close(first.float(), grads @ matrix.T, rtol=2e-3, atol=2e-2)
    named = {"a": grads[:, :20].view(4, 4, 5), "b": grads[:, 20], "c": grads[:, 21:]}
    torch.testing.assert_close(projector.project(named, 0), first, rtol=2e-3, atol=2e-2)


def test_trak_refuses_as_the_stock_classes_do() -> None:
    with pytest.raises(KeyError):
        trak.BasicProjector(5, 2, 0, "sparse", "cpu")
    with pytest.raises(ValueError, match="CUDA"):
        trak.CudaProjector(5, 2, 0, "normal", "cpu", 8)


def test_trak_chunks_are_added() -> None:
    projectors = [trak.BasicProjector(size, 6, seed, "rademacher", "cpu") for seed, size in enumerate((12, 8))]
    chunked = trak.ChunkedCudaProjector(projectors, 12, [12, 8], 4, "cpu", torch.float32)
    a, b, c = torch.ones(3, 2, 5), torch.ones(3, 2), torch.ones(3, 8)
    expected = projectors[0].project(torch.ones(3, 12), 1) + projectors[1].project(c, 1)
    assert torch.equal(chunked.project({"a": a, "b": b, "c": c}, 1), expected)
    with pytest.raises(AssertionError, match="does not match expected 12"):
        chunked.project({"a": a, "c": c}, 1)


def test_bergson_matrices_begin_alike_and_are_not_scaled() -> None:
    large = bergson.random_matrix("layer/left", 9, 300, "cpu", "rademacher", torch.bfloat16)
    small = bergson.random_matrix("layer/left", 4, 130, "cpu", "rademacher")
    assert torch.equal(large[:4, :130].float(), small)
    assert torch.equal(small.abs(), torch.ones(4, 130))
    with pytest.raises(ValueError, match="Unknown projection type"):
        bergson.random_matrix("a", 2, 2, "cpu", "sparse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2\^31"):
        bergson.random_matrix("a", 2, 1 << 31, "cpu", "normal")
