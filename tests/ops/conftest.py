"""Where the CUDA kernels run: on a GPU where there is one, and everywhere on the host machine of ``csrc/cuda/simt``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import simt as host
import torch

from influence_fast.ops import cuda
from influence_fast.ops.cuda import native as on_gpu


@pytest.fixture(scope="session")
def simt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The kernels compiled for the host, as a module."""
    cache = getattr(request.config, "cache", None)
    return host.load(host.library(cache.mkdir("simt") if cache else tmp_path_factory.mktemp("simt")))


@pytest.fixture(params=["simt", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where tensors of a test live; ``backend="cuda"`` works there. Outputs and scratch start as NaN.

    On the host the order of threads and blocks is another one in every test and run.
    """
    empty = on_gpu.empty
    monkeypatch.setattr(on_gpu, "empty", lambda like, *shape: empty(like, *shape).fill_(math.nan))
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        pytest.importorskip("influence_fast_cuda")
        yield "cuda"
        torch.cuda.synchronize()
        return
    native = request.getfixturevalue("simt")
    native.seed(int(os.environ["INFLUENCE_FAST_TEST_SEED"]) + sum(request.node.nodeid.encode()))
    monkeypatch.setattr(on_gpu, "library", native)
    available = cuda.unavailable

    def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        return available(op, device, dtype) if dtype == torch.float64 else None

    monkeypatch.setattr(cuda, "unavailable", unavailable)
    yield "cpu"
