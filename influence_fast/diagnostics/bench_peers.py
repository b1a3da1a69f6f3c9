"""Other packages' projections beside ours, where they are installed, at the shapes of their own tests and examples.

Their matrices are random ones of their own, so results differ from ours, as those of two seeds do; but every one must keep
the squared lengths of what it projects, to within what chance allows, before it is timed.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_fast.diagnostics.kernel_bench import Case, sketch_case
from influence_fast.errors import InfluenceError
from influence_fast.ops.projections import Side

# Of chance's standard deviation: a right projection fails once in five hundred million times.
_DEVIATIONS = 6.0


@dataclass(frozen=True)
class Peer:
    """A package: its name in the index, and its cases for tensors on a device, which import it."""

    distribution: str
    cases: Callable[[str, torch.dtype], Iterator[Case]]
    devices: tuple[str, ...] = ("cpu", "cuda")


def peer_cases(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[list[Case], dict[str, str]]:
    """The cases of every peer that works on ``device`` here, and for each peer its version or why it has none.

    A peer that cannot be called, or is wrong, is left out with a sentence: it does not stop the benchmark of ours.
    """
    found: list[Case] = []
    said: dict[str, str] = {}
    for name, peer in PEERS.items():
        try:
            version = importlib.metadata.version(peer.distribution)
        except importlib.metadata.PackageNotFoundError:
            said[name] = f"not compared: it is not installed (pip install {peer.distribution})"
            continue
        if device not in peer.devices:
            said[name] = f"not compared: version {version} works on {' and '.join(peer.devices)} alone"
            continue
        try:
            made = list(peer.cases(device, dtype))
        except Exception as error:  # another package's code: whatever it raises, ours can still be timed
            said[name] = f"not compared: version {version} fails here ({type(error).__name__}: {error})"
            continue
        found += made
        said[name] = f"version {version}"
    return found, said


def _rows(n: int, d: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def _case(name: str, g: Tensor, side: Side, peer: str, theirs: Callable[[], Tensor], length: float) -> Case:
    """A sketch of ours beside ``theirs``, which multiplies squared lengths by ``length``.

    Raises:
        InfluenceError: ``theirs`` does not.
    """
    result = theirs().double()
    expected = float(g.double().pow(2).sum()) * length
    allowed = _DEVIATIONS * math.sqrt(2 / result.numel())
    if result.shape != (g.shape[0], side.k) or not abs(float(result.pow(2).sum()) / expected - 1) < allowed:
        raise InfluenceError(f"{name}: {peer} does not keep the lengths of what it projects; it is not timed")
    case = sketch_case(name, g, side, "auto")
    case.shape = {"n": g.shape[0], "d": g.shape[1], "k": side.k, "kind": side.kind, "nonzeros": side.nonzeros}
    case.baselines[peer] = theirs
    return case


def _trak(device: str, dtype: torch.dtype) -> Iterator[Case]:
    from trak.projectors import BasicProjector, ProjectionType

    # The size of its test of exactness; 2048 is what TRAKer projects to by default.
    n, d, k = 8, 10_241, 2048
    g = _rows(n, d, device, dtype)
    for theirs, kind in (("rademacher", "rademacher"), ("normal", "gaussian")):
        projector = BasicProjector(d, k, 0, ProjectionType(theirs), device, dtype=dtype)
        side = Side(kind, 0, k, d)  # type: ignore[arg-type]
        call = lambda projector=projector: projector.project(g, model_id=0)  # noqa: E731
        yield _case(f"trak {n}x{d}->{k} {theirs}", g, side, "trak BasicProjector", call, k)


def _fast_jl(device: str, dtype: torch.dtype) -> Iterator[Case]:
    import fast_jl

    # As trak's tests call it; it rounds float32 to float16.
    n, d, k = 8, 10_241, 2048
    g = _rows(n, d, device, torch.float16 if dtype == torch.bfloat16 else dtype)
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    for theirs, kind in (("rademacher", "rademacher"), ("normal", "gaussian")):
        project = getattr(fast_jl, f"project_{theirs}_8")
        side = Side(kind, 0, k, d)  # type: ignore[arg-type]
        call = lambda project=project: project(g, k, 0, blocks)  # noqa: E731
        yield _case(f"fast_jl {n}x{d}->{k} {theirs}", g, side, "fast_jl", call, k)


def _dattri(device: str, dtype: torch.dtype) -> Iterator[Case]:
    from dattri.func.projection import random_project

    # The size of its test of projections; normal is its default.
    n, d, k = 64, 100_000, 512
    g = _rows(n, d, device, dtype)
    for theirs, kind in (("normal", "gaussian"), ("rademacher", "rademacher")):
        project = random_project(g, n, k, 32, proj_type=theirs, device=device)
        side = Side(kind, 0, k, d, scale=1 / math.sqrt(k))  # type: ignore[arg-type]
        call = lambda project=project: project(g, ensemble_id=0)  # noqa: E731
        yield _case(f"dattri {n}x{d}->{k} {theirs}", g, side, "dattri random_project", call, 1)


def _sjlt(device: str, dtype: torch.dtype) -> Iterator[Case]:
    from sjlt import SJLTProjection

    # Its README's example, and the size of a small model's gradient.
    for n, d, k, c in ((100, 1024, 128, 4), (16, 1_000_000, 4096, 1)):
        g = _rows(n, d, device, dtype)
        projection = SJLTProjection(original_dim=d, proj_dim=k, c=c, device=device)
        side = Side("sjlt", 0, k, d, scale=1 / math.sqrt(c), nonzeros=c)
        call = lambda projection=projection, g=g: projection(g)  # noqa: E731
        yield _case(f"sjlt {n}x{d}->{k} c={c}", g, side, "sjlt SJLTProjection", call, 1)


def _bergson(device: str, dtype: torch.dtype) -> Iterator[Case]:
    from bergson.collector.collector import project_global

    # What its projection_target="global" does to the gradient of a layer of 384 x 384, to Trackstar's 16 x 16 numbers.
    n, d, k = 16, 384 * 384, 256
    g = _rows(n, d, device, dtype)
    for theirs, kind in (("rademacher", "rademacher"), ("normal", "gaussian")):
        side = Side(kind, 0, k, d, scale=1 / math.sqrt(k))  # type: ignore[arg-type]
        call = lambda theirs=theirs: project_global("bench", g, k, theirs)  # noqa: E731
        yield _case(f"bergson {n}x{d}->{k} {theirs}", g, side, "bergson project_global", call, 1)


PEERS: dict[str, Peer] = {
    "trak": Peer("traker", _trak),
    "fast_jl": Peer("fast_jl", _fast_jl, ("cuda",)),
    "dattri": Peer("dattri", _dattri),
    "sjlt": Peer("sjlt", _sjlt, ("cuda",)),
    "bergson": Peer("bergson", _bergson),
}
