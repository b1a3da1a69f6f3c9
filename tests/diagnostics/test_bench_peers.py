"""Other packages beside ours: said where they are missing, verified before they are timed."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from influence_fast import InfluenceError
from influence_fast.diagnostics import bench_peers, kernel_bench


def test_peers_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("traker", "sjlt", "dattri"):
            return "1.2"
        raise importlib.metadata.PackageNotFoundError(name)

    def broken(device: str, dtype: torch.dtype) -> list:
        raise ImportError("no libcudart")

    monkeypatch.setattr(bench_peers.importlib.metadata, "version", version)
    monkeypatch.setitem(bench_peers.PEERS, "trak", bench_peers.Peer("traker", broken))
    monkeypatch.setitem(bench_peers.PEERS, "dattri", bench_peers.Peer("dattri", lambda *given: iter(())))
    cases, said = bench_peers.peer_cases("cpu")
    assert cases == []
    assert said["bergson"] == "not compared: it is not installed (pip install bergson)"
    assert said["trak"] == "not compared: version 1.2 fails here (ImportError: no libcudart)"
    assert said["sjlt"] == "not compared: version 1.2 works on cuda alone"
    assert said["dattri"] == "version 1.2"


def test_a_projection_that_changes_lengths_is_not_timed() -> None:
    g = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    side = bench_peers.Side("rademacher", 0, 64, 500)
    matrix = side.matrix(torch.float32)
    right = bench_peers._case("right", g, side, "them", lambda: g @ matrix.T, side.scale**2 * 64)
    kernel_bench.measure(right, repeats=1)
    with pytest.raises(InfluenceError, match="wrong: them does not keep the lengths"):
        bench_peers._case("wrong", g, side, "them", lambda: g @ matrix.T * 1.6, side.scale**2 * 64)


@pytest.mark.parametrize(("name", "module"), [("trak", "trak"), ("dattri", "dattri"), ("bergson", "bergson")])
def test_a_peer_that_is_installed_is_right(name: str, module: str) -> None:
    pytest.importorskip(module)
    for case in bench_peers.PEERS[name].cases("cpu", torch.float32):
        assert kernel_bench.verify(case) < 1e-4
