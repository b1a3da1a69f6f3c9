"""Times of the kernels on the machine at hand, each verified against the float64 reference before it is timed.

A case names its work (bytes that must move, FLOPs that must be done), its inputs, our call and the strongest plain-torch
baselines for the same work. All of them run in turn, in both orders, in one process.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from influence_fast import __version__, ops
from influence_fast._memory import peak_memory
from influence_fast.errors import InfluenceError
from influence_fast.ops.projections import Side

Call = Callable[[], Any]
_TOLERANCE = 1e-4


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


@dataclass(frozen=True)
class Shape:
    """Of an operation on outer products: samples, tokens, inputs, outputs, projected numbers, kind of side."""

    n: int
    t: int
    i: int
    o: int
    k: int = 16
    kind: str = "rademacher"


OUTER_SHAPES = {
    "project_outer": {
        "small": Shape(32, 16, 384, 384),
        "d1024": Shape(16, 128, 1024, 1024),
        "d1024-sjlt": Shape(16, 128, 1024, 1024, kind="sjlt"),
        "mistral-7b mlp-sjlt": Shape(2, 512, 4096, 14336, k=128, kind="sjlt"),
        "roberta-large mlp": Shape(8, 128, 1024, 4096),
        "llama-1b mlp": Shape(4, 512, 2048, 8192, k=64),
        "qwen-1.5b mlp": Shape(4, 512, 1536, 8960, k=64),
        "mistral-7b mlp": Shape(2, 512, 4096, 14336, k=64),
    },
    "sketch_outer": {"1024": Shape(16, 128, 1024, 1024, k=4096, kind="sjlt")},
    "outer": {"minilm": Shape(32, 16, 384, 384)},
    "score_outer": {"1024": Shape(16, 128, 1024, 1024, k=8)},
    "ghost_dot": {"1024": Shape(16, 64, 1024, 1024)},
    "ghost_norm": {"1024": Shape(16, 128, 1024, 1024)},
}
SKETCH_SHAPES = {"589k-dense": (16, 589_824, 512, "rademacher"), "589k-sjlt": (16, 589_824, 512, "sjlt")}
RANK_SHAPES = {"200x100k": (200, 100_000)}
OPS = (*OUTER_SHAPES, "sketch", "rank", "vote")


def cases(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32, backend: str = "auto") -> Iterable[Case]:
    """The cases of one operation, made one at a time (some inputs are large)."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    for name, shape in OUTER_SHAPES.get(op, {}).items():
        x, dy = random(shape.n, shape.t, shape.i), random(shape.n, shape.t, shape.o)
        yield _OUTER_CASES[op](name, shape, x, dy, random, backend)
    if op == "sketch":
        for name, (n, d, k, kind) in SKETCH_SHAPES.items():
            yield _sketch_case(name, random(n, d), Side(kind, "bench/single", k, d), backend)  # type: ignore[arg-type]
    if op in ("rank", "vote"):
        for name, (m, n) in RANK_SHAPES.items():
            yield _rank_case(op, name, random(m, n).float(), backend)


def _work(shape: Shape, x: Tensor) -> float:
    return shape.n * shape.t * (shape.i + shape.o) * x.element_size()


def _project_outer(name: str, s: Shape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
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


def _sketch_outer(name: str, s: Shape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
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


def _outer(name: str, s: Shape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
    return Case(
        "outer",
        name,
        lambda: ops.outer(x, dy, backend=backend),
        lambda: ops.outer(x.double(), dy.double(), backend="reference"),
        {"torch.bmm": lambda: dy.mT @ x},
        _work(s, x) + 4.0 * s.n * s.i * s.o,
        2.0 * s.n * s.t * s.i * s.o,
    )


def _score_outer(name: str, s: Shape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
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


def _ghost_dot(name: str, s: Shape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
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
            "torch, T x T written": lambda: (
                torch.einsum("atd,bsd->abts", x, x).mul_(torch.einsum("atd,bsd->abts", dy, dy)).sum((2, 3))
            ),
        },
        2 * _work(s, x),
        2.0 * s.n * s.n * s.t * s.t * (s.i + s.o),
    )


def _ghost_norm(name: str, s: Shape, x: Tensor, dy: Tensor, random: Any, backend: str) -> Case:
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


def _sketch_case(name: str, g: Tensor, side: Side, backend: str) -> Case:
    dense = side.kind != "sjlt"
    return Case(
        "sketch",
        name,
        lambda: ops.sketch(g, side, backend=backend),
        lambda: ops.sketch(g.double(), side, backend="reference"),
        {},
        float(g.nbytes),
        2.0 * g.numel() * (side.k if dense else 1),
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


def measure(case: Case, device: str = "cpu", repeats: int = 15) -> dict[str, Any]:
    """Verify, then time ours and every baseline in turn; times in seconds as 20th, 50th and 80th percentile."""
    error = verify(case)
    calls = {"ours": case.ours, **case.baselines}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    budget, begin = 20.0, time.perf_counter()
    for round_ in range(repeats + 2):
        for name in list(calls)[:: 1 if round_ % 2 else -1]:
            seconds = _time(calls[name], device)
            if round_ > 1:
                spent[name].append(seconds)
        if round_ > 4 and time.perf_counter() - begin > budget:
            break
    times = {name: _percentiles(values) for name, values in spent.items()}
    ours = times["ours"]["p50"]
    return {
        "op": case.op,
        "case": case.name,
        "error": error,
        "times": times,
        "ratios": {name: times[name]["p50"] / ours for name in case.baselines},
        "bytes_per_s": case.bytes / ours,
        "flops_per_s": case.flops / ours,
        "ns_per_element": ours / case.elements * 1e9 if case.elements else None,
        "peak_bytes": _peak(device),
    }


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
