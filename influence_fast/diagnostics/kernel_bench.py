"""Times of the kernels on the machine at hand, each verified against the float64 reference before it is timed.

A case names its work (bytes that must move, FLOPs that must be done), its inputs, our call and the strongest plain-torch
baselines for the same work. All cases are gone through several times, forwards and backwards in turn, and so are the
candidates of a case: what changes on the machine meanwhile falls on all of them. Each pass leaves one median a candidate,
by which two runs are compared (:mod:`influence_fast.diagnostics.bench_compare`).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from influence_fast import __version__, ops
from influence_fast._memory import peak_memory
from influence_fast.diagnostics.bench_shapes import OPS as OPS
from influence_fast.diagnostics.bench_shapes import (
    SHAPES,
    OuterShape,
    RankShape,
    Shape,
    Shapes,
    SketchShape,
    described,
)
from influence_fast.errors import InfluenceError
from influence_fast.ops.projections import Side

Call = Callable[[], Any]
_TOLERANCE = 1e-4
# Of one case in one pass.
_PASS_SECONDS = 6.0


@dataclass
class Case:
    """One measurement: ``ours`` and ``baselines`` do the same work, which moves ``bytes`` and does ``flops``."""

    op: str
    name: str
    ours: Call
    truth: Call
    baselines: dict[str, Call] = field(default_factory=dict)
    bytes: float = 0
    flops: float = 0
    elements: int = 0
    shape: dict[str, Any] = field(default_factory=dict)


def cases(
    op: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    shapes: Shapes | None = None,
) -> Iterable[Case]:
    """The cases of one operation, at the built-in shapes or others; made one at a time (some inputs are large)."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    for name, shape in (SHAPES if shapes is None else shapes).get(op, {}).items():
        case = _case(op, name, shape, random, backend)
        case.shape = described(shape)
        yield case


def _case(op: str, name: str, shape: Shape, random: Any, backend: str) -> Case:
    if isinstance(shape, SketchShape):
        side = Side(shape.kind, "bench/single", shape.k, shape.d)  # type: ignore[arg-type]
        return sketch_case(name, random(shape.n, shape.d), side, backend)
    if isinstance(shape, RankShape):
        return _rank_case(op, name, random(shape.m, shape.n).float(), backend)
    x, dy = random(shape.n, shape.t, shape.i), random(shape.n, shape.t, shape.o)
    return _OUTER_CASES[op](name, shape, x, dy, random, backend)


def _work(shape: OuterShape, x: Tensor) -> float:
    return shape.n * shape.t * (shape.i + shape.o) * x.element_size()


def _project_outer(name: str, s: OuterShape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
    right, left = Side(s.kind, "bench/right", s.k, s.i), Side(s.kind, "bench/left", s.k, s.o)  # type: ignore[arg-type]
    p, q = right.matrix(x.dtype, x.device), left.matrix(x.dtype, x.device)
    return Case(
        "project_outer",
        name,
        lambda: ops.project_outer(x, dy, right, left, backend=backend),
        lambda: ops.project_outer(x.double(), dy.double(), right, left, backend="reference"),
        {"torch, matrices ready": lambda: (dy @ q.T).mT @ (x @ p.T)},
        _work(s, x),
        2.0 * s.n * s.t * s.k * (s.i + s.o + s.k),
    )


def _sketch_outer(name: str, s: OuterShape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
    side = Side(s.kind, "bench/single", s.k, s.i * s.o)  # type: ignore[arg-type]
    return Case(
        "sketch_outer",
        name,
        lambda: ops.sketch_outer(x, dy, side, backend=backend),
        lambda: ops.sketch_outer(x.double(), dy.double(), side, backend="reference"),
        {
            "torch.bmm alone": lambda: dy.mT @ x,
            "bmm, then our sketch": lambda: ops.sketch((dy.mT @ x).flatten(1), side),
        },
        _work(s, x),
        2.0 * s.n * s.t * s.i * s.o,
    )


def _outer(name: str, s: OuterShape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
    return Case(
        "outer",
        name,
        lambda: ops.outer(x, dy, backend=backend),
        lambda: ops.outer(x.double(), dy.double(), backend="reference"),
        {"torch.bmm": lambda: dy.mT @ x},
        _work(s, x) + 4.0 * s.n * s.i * s.o,
        2.0 * s.n * s.t * s.i * s.o,
    )


def _score_outer(name: str, s: OuterShape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
    q = random(s.k, s.o, s.i)
    return Case(
        "score_outer",
        name,
        lambda: ops.score_outer(x, dy, q, backend=backend),
        lambda: ops.score_outer(x.double(), dy.double(), q.double(), backend="reference"),
        {"bmm, then matmul": lambda: (dy.mT @ x).flatten(1) @ q.flatten(1).T},
        _work(s, x) + float(q.nbytes),
        2.0 * s.n * (s.t + s.k) * s.i * s.o,
    )


def _ghost_dot(name: str, s: OuterShape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
    def materialised() -> Tensor:
        gradients = (dy.mT @ x).flatten(1)
        return gradients @ gradients.T

    def pairs(a: Tensor) -> Tensor:
        return torch.einsum("atd,bsd->abts", a, a)

    return Case(
        "ghost_dot",
        name,
        lambda: ops.ghost_dot(x, dy, x, dy, backend=backend),
        lambda: ops.ghost_dot(x.double(), dy.double(), x.double(), dy.double(), backend="reference"),
        {
            "torch, gradients written": materialised,
            "torch, T x T written": lambda: pairs(x).mul_(pairs(dy)).sum((2, 3)),
        },
        2 * _work(s, x),
        2.0 * s.n * s.n * s.t * s.t * (s.i + s.o),
    )


def _ghost_norm(name: str, s: OuterShape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
    return Case(
        "ghost_norm",
        name,
        lambda: ops.ghost_norm(x, dy, backend=backend),
        lambda: ops.ghost_norm(x.double(), dy.double(), backend="reference"),
        {
            "torch, gradients written": lambda: (dy.mT @ x).flatten(1).norm(dim=1),
            "torch, T x T written": lambda: ((x @ x.mT) * (dy @ dy.mT)).sum((1, 2)).sqrt(),
        },
        _work(s, x),
        1.0 * s.n * s.t * s.t * (s.i + s.o),
    )


def sketch_case(name: str, g: Tensor, side: Side, backend: str) -> Case:
    """A sketch of the rows of ``g``."""
    dense = side.kind != "sjlt"
    return Case(
        "sketch",
        name,
        lambda: ops.sketch(g, side, backend=backend),
        lambda: ops.sketch(g.double(), side, backend="reference"),
        {},
        float(g.nbytes),
        2.0 * g.numel() * (side.k if dense else side.nonzeros),
    )


def _rank_case(op: str, name: str, values: Tensor, backend: str) -> Case:
    k = values.shape[1] // 5

    def double_argsort() -> Tensor:
        return values.argsort(1).argsort(1)

    if op == "rank":
        ours, truth = lambda: ops.rank(values, backend=backend), lambda: ops.rank(values.double(), backend="reference")
        baselines: dict[str, Call] = {"torch argsort of argsort": double_argsort}
        if values.device.type == "cpu":
            array = values.numpy()
            baselines["numpy argsort of argsort"] = lambda: array.argsort(1).argsort(1)
    else:
        ours, truth = (
            lambda: ops.vote(values, k, backend=backend),
            lambda: ops.vote(values.double(), k, backend="reference"),
        )
        baselines = {"torch argsort of argsort, then votes": lambda: (double_argsort() - k).clamp_max(0).sum(0)}
        if values.device.type == "cpu":
            other = values.numpy()
            baselines["numpy argpartition alone"] = lambda: other.argpartition(k, 1)
    moved = 2.0 * values.nbytes if op == "rank" else float(values.nbytes)
    return Case(op, name, ours, truth, baselines, moved, 0.0, values.numel())


_OUTER_CASES: dict[str, Callable[..., Case]] = {
    "project_outer": _project_outer,
    "sketch_outer": _sketch_outer,
    "outer": _outer,
    "score_outer": _score_outer,
    "ghost_dot": _ghost_dot,
    "ghost_norm": _ghost_norm,
}


def verify(case: Case) -> float:
    """Largest relative error of ``ours``; InfluenceError where it is not what a right kernel can have."""
    got, expected = case.ours().double().cpu(), case.truth().double().cpu()
    scale = float(expected.norm()) or 1.0
    error = float((got - expected).norm()) / scale
    if not error < _TOLERANCE:
        raise InfluenceError(f"{case.op} {case.name}: wrong by {error:.1e} of its norm; a wrong kernel is not timed")
    return error


class Measurement:
    """A case that was verified, and the times of its passes so far.

    Raises:
        InfluenceError: ours is wrong.
    """

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device, self.error = case, device, verify(case)
        self._spent: dict[str, list[list[float]]] = {name: [] for name in ("ours", *case.baselines)}

    @property
    def passes(self) -> int:
        return len(self._spent["ours"])

    def run_pass(self, repeats: int) -> None:
        """Time each candidate ``repeats`` times in turn, in both orders; rounds that would take long are left out."""
        calls = {"ours": self.case.ours, **self.case.baselines}
        for taken in self._spent.values():
            taken.append([])
        begin = time.perf_counter()
        # Caches are cold after another case, and at first there is code to compile.
        warm = 1 if self.passes > 1 else 2
        for round_ in range(repeats + warm):
            for name in list(calls)[:: 1 if round_ % 2 else -1]:
                seconds = _time(calls[name], self.device)
                if round_ >= warm:
                    self._spent[name][-1].append(seconds)
            if round_ >= warm and time.perf_counter() - begin > _PASS_SECONDS:
                break

    def result(self) -> dict[str, Any]:
        """Times in seconds: 20th, 50th and 80th percentile of all, and the median of each pass."""
        times = {name: _percentiles([t for taken in passes for t in taken]) for name, passes in self._spent.items()}
        ours, case = times["ours"]["p50"], self.case
        return {
            "op": case.op,
            "case": case.name,
            "shape": case.shape,
            "error": self.error,
            "times": times,
            "medians": {name: [_percentiles(taken)["p50"] for taken in passes] for name, passes in self._spent.items()},
            "ratios": {name: times[name]["p50"] / ours for name in case.baselines},
            "bytes_per_s": case.bytes / ours,
            "flops_per_s": case.flops / ours,
            "ns_per_element": ours / case.elements * 1e9 if case.elements else None,
            "peak_bytes": _peak(self.device),
        }


def turns(measurements: Sequence[Measurement], passes: int) -> Iterator[tuple[int, Measurement]]:
    """Whose turn it is in which pass; every other pass goes backwards."""
    for number in range(passes):
        for measurement in measurements[:: 1 if number % 2 == 0 else -1]:
            yield number, measurement


def measure(case: Case, device: str = "cpu", repeats: int = 15) -> dict[str, Any]:
    """Verify, then time ours and every baseline in one pass."""
    measurement = Measurement(case, device)
    measurement.run_pass(repeats)
    return measurement.result()


def ceilings(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """What this machine does at best: copy (bytes read and written per second) and matmul (FLOP/s) in ``dtype``."""
    size = 1 << (28 if device == "cuda" else 26)
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    side = 8192 if device == "cuda" else 2048
    a = torch.ones(side, side, device=device, dtype=dtype)
    copy = min(_time(lambda: target.copy_(source), device) for _ in range(7))
    matmul = min(_time(lambda: a @ a, device) for _ in range(7))
    return {"copy_bytes_per_s": 8 * size / copy, "matmul_flops_per_s": 2 * side**3 / matmul}


def machine(device: str = "cpu") -> dict[str, Any]:
    """What figures were measured on."""
    from influence_fast.diagnostics.doctor import examine

    found = examine()
    return {
        "influence_fast": __version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else found["machine"]["cpu"],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: found["packages"][name] for name in ("torch", "numpy", "triton")},
        "backends": {op: ops.choose(op, device) for op in ops.OPS},
    }


def _time(call: Call, device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begin) / 1e9
    # Events bracket the device's own work; a write larger than its cache comes first, so that inputs come from memory.
    torch.empty(1 << 26, device=device).zero_()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def _percentiles(values: list[float]) -> dict[str, float]:
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "p50", "p80"), points.tolist(), strict=True))


def _peak(device: str) -> int:
    """Most memory so far: the device's, or the process's resident set."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()
