"""The CUDA kernels against the float64 reference: on a GPU where there is one, and everywhere on the host machine of
``csrc/cuda/simt``, which runs the same sources and reports races, stray accesses and missed barriers (test_simt.py)."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import test_specs
import torch
from backends import Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations import make_extras
from torch import Tensor

from influence_fast import BackendError, InputError, ops
from influence_fast.ops import cuda, reference
from influence_fast.ops.cuda import ghost, outer_products, ranks, sketches
from influence_fast.ops.cuda import native as on_gpu
from influence_fast.ops.dispatch import OPERATIONS
from influence_fast.ops.projections import Projection, Side

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape).to(dtype).to(device)


def check(got: Tensor, expected: Tensor, length: int, *inputs: Tensor) -> None:
    """Norm-wise, within what float32 sums of this length lose (inputs are exact in both).

    A projection keeps norms on average: those of ``inputs``, ``g`` or ``x, dy``, stand in where a few outputs cancel.
    """
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    size = math.prod(tensor.double().square().sum(-1) for tensor in inputs) if inputs else torch.zeros(())
    size = torch.as_tensor(size).sum().sqrt().to(expected.device).maximum(expected.norm()).clamp_min(1e-30)
    error = (got.double() - expected).norm() / size
    assert error <= 2**-24 * (8 + 2 * math.sqrt(length)), f"{error:.2e} over {length} terms"


def sides(kind: str, k_in: int, k_out: int, i: int, o: int) -> tuple[Side, Side]:
    return Side(kind, "m.q/right", k_in, i), Side(kind, "m.q/left", k_out, o)


# N, T, i, o, k_in, k_out
LAYERS = [
    (1, 1, 1, 1, 1, 1),
    (2, 5, 16, 24, 4, 8),
    (3, 63, 129, 63, 16, 7),
    (1, 129, 40, 131, 63, 65),
    (1, 70, 136, 264, 128, 100),
    (1, 3, 8, 2000, 5, 33),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize("shape", LAYERS)
def test_project_outer(device: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    n, t, i, o, k_in, k_out = shape
    x, dy = random(n, t, i, dtype=dtype, device=device), random(n, t, o, dtype=dtype, device=device)
    p_in, p_out = sides(kind, k_in, k_out, i, o)
    got = ops.project_outer(x, dy, p_in, p_out, backend="cuda")
    check(got, reference.project_outer(x.double(), dy.double(), p_in, p_out, None), t + i + o, x, dy)


def test_project_outer_of_samples_that_end_within_a_tile(device: str) -> None:
    """Of 64 tokens, and in the first, at its end or nowhere."""
    x, dy = random(5, 150, 16, device=device), random(5, 150, 24, device=device)
    lengths = torch.tensor([150, 70, 3, 128, 0], device=device)
    p_in, p_out = sides("rademacher", 128, 100, 16, 24)
    got = ops.project_outer(x, dy, p_in, p_out, lengths, backend="cuda")
    check(got, ops.project_outer(x.double(), dy.double(), p_in, p_out, lengths), 190, x, dy)


SPECS = ("matches_reference", "lengths", "strides", "integers_have_the_same_bits")
# The others have tests of their own here.
IN_SPECS = ("outer", "score_outer", "ghost_dot", "ghost_norm")


@pytest.mark.parametrize("op", IN_SPECS)
@pytest.mark.parametrize("spec", SPECS)
def test_as_every_backend(device: str, spec: str, op: str, generator: torch.Generator) -> None:
    """What test_specs.py asks of all of them."""
    cases: dict[str, Any] = {"matches_reference": test_specs.SHAPES, "lengths": test_specs.LENGTHS}
    for case in cases.get(spec, [None]):
        test = getattr(test_specs, f"test_{spec}")
        test(op, *([] if case is None else [case]), Backend("cuda", device), generator)


@pytest.mark.parametrize("op", IN_SPECS)
@pytest.mark.parametrize("shape", [(2, 150, 130, 5), (1, 65, 16, 300)])
def test_long_samples_and_wide_weights(
    device: str, op: str, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    """Several tiles of tokens, features, queries and rows of the weight; the second set of samples is long, then short."""
    n, t, i, o = shape
    for turn, dtype in enumerate(DTYPES):
        x, dy = random(n, t, i, dtype=dtype), random(n, t, o, dtype=dtype)
        lengths = torch.tensor([t - turn, 66][:n])
        e = make_extras(generator, i, o, "rademacher", 4)
        if turn == 1:
            e.xb, e.dyb = random(2, 70, i), random(2, 70, o)
        live = torch.arange(t) < lengths[:, None]
        test_specs.check(op, Backend("cuda", device), x, dy, lengths, live, e)


def test_scores_of_many_samples(device: str) -> None:
    """More samples and rows than are made at once on the host; more than one tile of samples and of queries."""
    for n, i, o, m in ((18, 30, 140, 2), (70, 3, 2, 66)):
        x, dy, q = random(n, 2, i, device=device), random(n, 2, o, device=device), random(m, o, i, device=device)
        got = ops.score_outer(x, dy, q, backend="cuda")
        check(got, ops.score_outer(x.double(), dy.double(), q.double()), i * o)
        assert torch.equal(ops.score_outer(x[n - 2 :], dy[n - 2 :], q, backend="cuda"), got[n - 2 :])


def test_parts_of_inner_products_in_pieces(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = random(3, 70, 16, device=device), random(3, 70, 8, device=device)
    lengths = torch.tensor([70, 3, 66]).to(device)
    whole = ops.ghost_dot(x, dy, x, dy, lengths, lengths, backend="cuda")
    monkeypatch.setattr(ghost, "_SCRATCH", 1)
    assert torch.equal(ops.ghost_dot(x, dy, x, dy, lengths, lengths, backend="cuda"), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 5, 16, 24, 8), (1, 40, 129, 63, 100), (1, 33, 200, 140, 512)])
@pytest.mark.parametrize("scaled", [False, True])
def test_sketch_outer(device: str, shape: tuple[int, ...], dtype: torch.dtype, scaled: bool) -> None:
    n, t, i, o, k = shape
    x, dy = random(n, t, i, dtype=dtype, device=device), random(n, t, o, dtype=dtype, device=device)
    scale = torch.rand(o, i).to(device) + 0.5 if scaled else None
    side = Side("sjlt", "m.q/single", k, i * o)
    expected = reference.sketch_outer(x.double(), dy.double(), side, None, scale)
    check(ops.sketch_outer(x, dy, side, scale=scale, backend="cuda"), expected, t + i * o, x, dy)


def test_sketch_outer_of_many_tiles_and_outputs(device: str) -> None:
    """Several strips with parts to add, more outputs than shared memory holds, tiles that straddle chunks."""
    x, dy = random(2, 3, 300, device=device), random(2, 3, 390, device=device)
    for k in (24, 1000, 9001):
        side = Side("sjlt", "wide", k, 300 * 390)
        expected = reference.sketch_outer(x.double(), dy.double(), side, None, None)
        check(ops.sketch_outer(x, dy, side, backend="cuda"), expected, 3 + 300 * 390 // k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 129, 1), (9, 1000, 63), (33, 300, 64), (2, 700, 300), (2, 9000, 16), (1, 9000, 257)]
)
def test_sketch(device: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    n, d, k = shape
    g, side = random(n, d, dtype=dtype, device=device), Side(kind, "flat/single", k, d)
    check(ops.sketch(g, side, backend="cuda"), reference.sketch(g.double(), side), d, g)


def test_long_sketches_go_through_every_loop(device: str) -> None:
    """More chunks than one batch of signs, more blocks than one chain of additions (limits are small on the host)."""
    for kind, d, k in (("sjlt", 9000, 1), ("sjlt", 50_000, 300), ("sjlt", 5000, 7), ("rademacher", 9000, 129)):
        g, side = random(2, d, device=device), Side(kind, "flat/single", k, d)
        check(ops.sketch(g, side, backend="cuda"), reference.sketch(g.double(), side), d, g)


def test_sketch_takes_rows_in_pieces(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g, side = random(40, 2100, device=device), Side("rademacher", "flat/single", 129, 2100)
    whole = ops.sketch(g, side, backend="cuda")
    assert on_gpu.library.sketch_splits(side.kind, side.features, side.k) > 1
    monkeypatch.setattr(sketches, "_SCRATCH", 1)
    assert torch.equal(ops.sketch(g, side, backend="cuda"), whole)


@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_matrix(device: str, kind: str, dtype: torch.dtype) -> None:
    side = Side(kind, "m.q/right", 63, 129)
    for rows, cols in (((0, 63), (0, 129)), ((3, 9), (70, 77)), ((5, 5), (0, 3))):
        got = ops.random_matrix(side, rows, cols, dtype=dtype, device=device, backend="cuda")
        expected = reference.random_matrix(side, rows, cols, dtype, torch.device("cpu")).to(device)
        assert got.dtype == dtype
        # Gaussian entries go through another library's log, cos and sin.
        near = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2} if kind == "gaussian" else {}
        torch.testing.assert_close(got, expected, rtol=near.get(dtype, 0), atol=near.get(dtype, 0) / 4)


def test_random_matrix_far_out(device: str) -> None:
    first = 2**33 + 5
    side = Side("sjlt", "far", 1000, first + 300)
    got = ops.random_matrix(side, (0, 1000), (first, first + 300), device=device, backend="cuda")
    assert torch.equal(got.cpu(), reference.random_matrix(side, (0, 1000), (first, first + 300), *MAIN_FLOAT))


MAIN_FLOAT = (torch.float32, torch.device("cpu"))


def poisoned(x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    out = torch.full_like(x, math.nan)
    for row, (begin, end) in enumerate(spans):
        out[row, begin:end] = x[row, begin:end]
    return out


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_do_not_count_are_not_read(device: str, kind: str, dtype: torch.dtype) -> None:
    n, t, i, o = 4, 70, 40, 24
    x, dy = random(n, t, i, dtype=dtype), random(n, t, o, dtype=dtype)
    p_in, p_out = sides(kind, 8, 12, i, o)
    single = Side("sjlt", "m.q/single", 50, i * o)
    for spans in ([(0, 70), (0, 1), (0, 33), (0, 0)], [(0, 70), (69, 70), (3, 66), (70, 70)]):
        mask = torch.tensor([[b <= k < e for k in range(t)] for b, e in spans]).to(device)
        lengths = mask.sum(1) if spans[1] == (0, 1) else mask
        bad_x, bad_dy = poisoned(x, spans).to(device), poisoned(dy, spans).to(device)
        double = [(v * mask.cpu()[..., None]).double().to(device) for v in (x, dy)]
        got = ops.project_outer(bad_x, bad_dy, p_in, p_out, lengths, backend="cuda")
        check(got, reference.project_outer(*double, p_in, p_out, None), t + i + o)
        got = ops.sketch_outer(bad_x, bad_dy, single, lengths, backend="cuda")
        check(got, reference.sketch_outer(*double, single, None, None), t + i * o)
        # Sides that the fused kernel does not take.
        got = ops.project_outer(bad_x, bad_dy, None, p_out, lengths, backend="cuda")
        check(got, reference.project_outer(*double, None, p_out, None), t + i + o)


def test_packed_samples(device: str) -> None:
    lengths = torch.tensor([3, 0, 66, 1]).to(device)
    x, dy = random(70, 40, device=device), random(70, 24, device=device)
    p_in, p_out = sides("rademacher", 8, 12, 40, 24)
    single = Side("sjlt", "m.q/single", 50, 40 * 24)
    for right in (p_in, None, Side("rademacher", "wide", 200, 40)):
        got = ops.project_outer(x, dy, right, p_out, lengths, backend="cuda")
        check(got, ops.project_outer(x.double(), dy.double(), right, p_out, lengths), 134)
    got = ops.sketch_outer(x, dy, single, lengths, backend="cuda")
    check(got, ops.sketch_outer(x.double(), dy.double(), single, lengths), 70 + 40 * 24)


def views(x: Tensor) -> Iterator[Tensor]:
    """The same numbers with other strides: transposed, misaligned rows, within NaN."""
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
    padded = x.new_full((*x.shape[:-1], x.shape[-1] + 5), math.nan)
    padded[..., 3:-2] = x
    yield padded[..., 3:-2]
    if x.dim() == 3:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_do_not_matter(device: str, dtype: torch.dtype) -> None:
    x, dy = random(2, 37, 48, dtype=dtype, device=device), random(2, 37, 72, dtype=dtype, device=device)
    g = random(5, 1000, dtype=dtype, device=device)
    p_in, p_out = sides("rademacher", 8, 12, 48, 72)
    single, flat = Side("sjlt", "m.q/single", 50, 48 * 72), Side("sjlt", "f", 64, 1000)
    dense = Side("rademacher", "f", 64, 1000)
    project = ops.project_outer(x, dy, p_in, p_out, backend="cuda")
    sketched = ops.sketch_outer(x, dy, single, backend="cuda")
    for vx, vdy in zip(views(x), views(dy), strict=True):
        assert torch.equal(ops.project_outer(vx, vdy, p_in, p_out, backend="cuda"), project)
        assert torch.equal(ops.sketch_outer(vx, vdy, single, backend="cuda"), sketched)
    for side in (flat, dense):
        whole = ops.sketch(g, side, backend="cuda")
        for vg in views(g):
            assert torch.equal(ops.sketch(vg, side, backend="cuda"), whole)


def test_samples_far_apart(device: str) -> None:
    """Strides that 32 bits cannot hold; only the pages of the samples are ever touched."""
    far = 2**31 + 8
    memory = torch.empty(far + 5000, dtype=torch.bfloat16, device=device)

    def apart(*shape: int) -> Tensor:
        width = math.prod(shape[1:])
        out = memory.as_strided(shape, (far, *torch.empty(shape[1:], device="meta").stride()))
        for row in range(shape[0]):
            out[row] = random(width, dtype=memory.dtype, device=device).view(shape[1:])
        return out

    x = apart(2, 10, 48)
    dy, p_in, p_out = random(2, 10, 24, dtype=x.dtype, device=device), *sides("rademacher", 8, 12, 48, 24)
    single = Side("sjlt", "m.q/single", 50, 48 * 24)
    near = x.contiguous()
    assert torch.equal(ops.outer(x, dy, backend="cuda"), ops.outer(near, dy, backend="cuda"))
    assert torch.equal(ops.ghost_norm(x, dy, backend="cuda"), ops.ghost_norm(near, dy, backend="cuda"))
    check(
        ops.project_outer(x, dy, p_in, p_out, backend="cuda"),
        reference.project_outer(x.double(), dy.double(), p_in, p_out, None),
        82,
    )
    check(
        ops.sketch_outer(x, dy, single, backend="cuda"),
        reference.sketch_outer(x.double(), dy.double(), single, None, None),
        82,
    )
    g = apart(2, 1000)
    for side in (Side("sjlt", "f", 64, 1000), Side("rademacher", "f", 64, 1000)):
        check(ops.sketch(g, side, backend="cuda"), reference.sketch(g.double(), side), 1000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_come_out_exact(device: str, dtype: torch.dtype) -> None:
    """Sums below 2^24 and scales that are powers of two round nowhere: the reference's bits."""

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape).to(dtype).to(device)

    x, dy, g = integers(3, 140, 64), integers(3, 140, 72), integers(4, 3000)
    for kind in ("rademacher", "sjlt"):
        p_in, p_out = sides(kind, 16, 4, 64, 72)
        got = ops.project_outer(x, dy, p_in, p_out, backend="cuda")
        assert torch.equal(got, ops.project_outer(x, dy, p_in, p_out, backend="reference"))
        for k in (4, 64, 256):
            side = Side(kind, "f", k, 3000)
            assert torch.equal(ops.sketch(g, side, backend="cuda"), ops.sketch(g, side, backend="reference"))
    single = Side("sjlt", "m.q/single", 50, 64 * 72)
    got = ops.sketch_outer(x, dy, single, backend="cuda")
    assert torch.equal(got, ops.sketch_outer(x, dy, single, backend="reference"))


def test_float32_keeps_all_its_bits(device: str) -> None:
    """One token, one feature: the value itself, not a rounding of it to fewer bits."""
    x = (1 + torch.randint(0, 2**23, (64, 1, 1)) * 2.0**-23).to(device)
    one = torch.ones_like(x)
    for side in (Side("rademacher", "a", 1, 1), Side("sjlt", "a", 1, 1)):
        got = ops.project_outer(x, one, side, side, backend="cuda").abs()
        assert torch.equal(got, x)
        assert torch.equal(ops.sketch(x[:, 0], side, backend="cuda").abs(), x[:, 0])
    assert torch.equal(ops.sketch_outer(x, one, Side("sjlt", "a", 1, 1), backend="cuda").abs(), x[:, 0])


def test_two_runs_give_the_same_bits(device: str, request: pytest.FixtureRequest) -> None:
    x, dy, g = random(2, 70, 68, device=device), random(2, 70, 72, device=device), random(3, 3000, device=device)
    p_in, p_out = sides("rademacher", 16, 40, 68, 72)
    flat = [Side(kind, "f", k, 3000) for kind in ("rademacher", "sjlt") for k in (16, 300)]
    single, some = Side("sjlt", "m.q/single", 300, 68 * 72), (x[:, :, :20], dy)
    q = random(3, 72, 20, device=device)

    def run() -> list[Tensor]:
        return [
            ops.outer(*some, backend="cuda"),
            ops.score_outer(*some, q, backend="cuda"),
            ops.ghost_dot(*some, *some, backend="cuda"),
            ops.ghost_norm(*some, backend="cuda"),
            ops.ghost_norm(x[:, :9], dy[:, :9], backend="cuda"),
            ops.project_outer(x, dy, p_in, p_out, backend="cuda"),
            ops.sketch_outer(x, dy, single, backend="cuda"),
            *(ops.sketch(g, side, backend="cuda") for side in flat),
        ]

    first = run()
    for seed in range(2, 4):
        if device == "cpu":
            request.getfixturevalue("simt").seed(seed)
        for a, b in zip(first, run(), strict=True):
            assert torch.equal(a, b)


def test_batch_mates_change_no_bit(device: str) -> None:
    x, dy, g = random(5, 70, 40, device=device), random(5, 70, 24, device=device), random(40, 3000, device=device)
    p_in, p_out = sides("rademacher", 16, 8, 40, 24)
    single, flat = Side("sjlt", "s", 50, 40 * 24), Side("rademacher", "f", 64, 3000)
    q, alone = random(3, 24, 40, device=device), (x[2:3], dy[2:3])
    assert torch.equal(ops.outer(*alone, backend="cuda"), ops.outer(x, dy, backend="cuda")[2:3])
    assert torch.equal(ops.score_outer(*alone, q, backend="cuda"), ops.score_outer(x, dy, q, backend="cuda")[2:3])
    for t in (70, 20):
        ax, ady, bx, bdy = (tensor[:, :t] for tensor in (*alone, x, dy))
        assert torch.equal(ops.ghost_norm(ax, ady, backend="cuda"), ops.ghost_norm(bx, bdy, backend="cuda")[2:3])
        whole = ops.ghost_dot(bx, bdy, bx, bdy, backend="cuda")
        assert torch.equal(ops.ghost_dot(ax, ady, bx, bdy, backend="cuda"), whole[2:3])
    whole = ops.project_outer(x, dy, p_in, p_out, backend="cuda")
    assert torch.equal(ops.project_outer(x[2:3], dy[2:3], p_in, p_out, backend="cuda"), whole[2:3])
    whole = ops.sketch_outer(x, dy, single, backend="cuda")
    assert torch.equal(ops.sketch_outer(x[2:3], dy[2:3], single, backend="cuda"), whole[2:3])
    assert torch.equal(ops.sketch(g[35:36], flat, backend="cuda"), ops.sketch(g, flat, backend="cuda")[35:36])


def test_layers_grouped_in_one_launch(device: str) -> None:
    lengths = torch.tensor([[0, 33], [0, 64], [5, 6]]).to(device)
    layers = []
    for index in range(18):
        i, o = 8 + 5 * index, 40
        x, dy = random(3, 64, i, device=device), random(3, 64, o, device=device)
        layers.append((x, dy, *sides("sjlt" if index % 2 else "rademacher", 16, 16, i, o)))
    for layer, got in zip(layers, cuda.project_outer_grouped(layers, lengths), strict=True):
        assert torch.equal(got, cuda.project_outer(*layer, lengths))


def test_sides_beyond_the_fused_kernel(device: str) -> None:
    x, dy = random(2, 9, 40, device=device), random(2, 9, 24, device=device)
    dense = random(6, 40, device=device)
    left = [Side("rademacher", "l", 200, 24), Side("gaussian", "l", 6, 24), None]
    for p_out in left:
        for p_in in (dense, Side("sjlt", "r", 300, 40), Side("rademacher", "r", 7, 40)):
            expected = reference.project_outer(x.double(), dy.double(), p_in, p_out, None)
            check(ops.project_outer(x, dy, p_in, p_out, backend="cuda"), expected, 70)


def test_dense_sketches_of_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (outer_products, sketches):
        monkeypatch.setattr(module, "ENTRIES", 1000)  # several steps
    x, dy, scale = random(3, 9, 20, device=device), random(3, 9, 30, device=device), torch.rand(30, 20).to(device)
    matrix = random(7, 600, device=device)
    for side in (matrix, Side("rademacher", "s", 7, 600), Side("gaussian", "s", 7, 600)):
        expected = reference.sketch_outer(x.double(), dy.double(), side, None, scale)
        check(ops.sketch_outer(x, dy, side, scale=scale, backend="cuda"), expected, 609)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 129), (300, 5), (0, 4), (4, 0)])
def test_rank_and_vote(
    device: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_SORTED", 200)  # several groups of rows
    for values in (
        torch.randn(shape),
        torch.randint(-2, 3, shape).float() * 0.5,
        torch.zeros(shape).copysign(torch.randn(shape)),
    ):
        values = values.to(dtype).to(device)
        assert torch.equal(ops.rank(values, backend="cuda"), reference.rank(values))
        for k in {1, shape[1] // 3 or 1, shape[1]} if values.numel() else ():
            assert torch.equal(ops.vote(values, k, backend="cuda"), reference.vote(values, k))
            both = ops.rank_and_vote(values, k, backend="cuda")
            assert torch.equal(both[0], ops.rank(values, backend="cuda").double().sum(0))
            assert torch.equal(both[1], ops.vote(values, k, backend="cuda"))
        for view in views(values):
            assert torch.equal(ops.rank(view, backend="cuda"), reference.rank(values))


def test_rank_names_the_row_with_nan(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_SORTED", 20)
    values = random(9, 10, device=device)
    values[7, 3], values[5, 9] = math.nan, -math.inf
    for run in (
        lambda: ops.rank(values, backend="cuda"),
        lambda: ops.vote(values, 2, backend="cuda"),
        lambda: ops.rank_and_vote(values, 2, backend="cuda"),
    ):
        with pytest.raises(InputError, match="row 5 has NaN"):
            run()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(1, high) for high in (3, 70, 140, 140, 70, 70, 400))),
    kinds=st.tuples(*[st.sampled_from(["rademacher", "sjlt"])] * 2),
    op=st.sampled_from(IN_SPECS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(1, 1000),
)
def test_any_shape(
    device: str,
    simt: ModuleType,
    shape: tuple[int, ...],
    kinds: tuple[str, str],
    op: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    simt.seed(seed)
    n, t, i, o, k_in, k_out, k = shape
    x, dy = random(n, t, i, dtype=dtype, device=device), random(n, t, o, dtype=dtype, device=device)
    lengths = torch.randint(0, t + 1, (n,)).to(device)
    p_in, p_out = Side(kinds[0], "r", k_in, i), Side(kinds[1], "l", k_out, o)
    single, flat = Side("sjlt", "s", k, i * o), Side(kinds[0], "f", k, t * i)
    exact = ops.project_outer(x.double(), dy.double(), p_in, p_out, lengths)
    check(ops.project_outer(x, dy, p_in, p_out, lengths, backend="cuda"), exact, t + i + o, x, dy)
    exact = ops.sketch_outer(x.double(), dy.double(), single, lengths)
    check(ops.sketch_outer(x, dy, single, lengths, backend="cuda"), exact, t + i * o, x, dy)
    live = torch.arange(t) < lengths.cpu()[:, None]
    extras = make_extras(torch.Generator().manual_seed(seed), i, o, "sjlt", k)
    test_specs.check(op, Backend("cuda", device), x.cpu(), dy.cpu(), lengths, live, extras)
    exact = reference.sketch(x.flatten(1).double(), flat)
    check(ops.sketch(x.flatten(1), flat, backend="cuda"), exact, t * i, x.flatten(1))


def test_empty(device: str) -> None:
    p_in, p_out = sides("rademacher", 4, 3, 8, 6)
    single = Side("sjlt", "s", 5, 48)
    for n, t in ((0, 4), (2, 0)):
        x, dy = random(n, t, 8, device=device), random(n, t, 6, device=device)
        assert torch.equal(ops.project_outer(x, dy, p_in, p_out, backend="cuda").cpu(), torch.zeros(n, 3, 4))
        assert torch.equal(ops.sketch_outer(x, dy, single, backend="cuda").cpu(), torch.zeros(n, 5))
        assert torch.equal(ops.outer(x, dy, backend="cuda").cpu(), torch.zeros(n, 6, 8))
        assert torch.equal(ops.ghost_dot(x, dy, x, dy, backend="cuda").cpu(), torch.zeros(n, n))
        assert torch.equal(ops.ghost_norm(x, dy, backend="cuda").cpu(), torch.zeros(n))
        for m in (0, 2):
            q = random(m, 6, 8, device=device)
            assert torch.equal(ops.score_outer(x, dy, q, backend="cuda").cpu(), torch.zeros(n, m))
    assert ops.sketch(random(0, 48, device=device), single, backend="cuda").shape == (0, 5)


def test_bindings_name_a_bad_argument(device: str) -> None:
    native: Any = on_gpu.library
    key = {"key0": 0, "key1": 0, "scale": 1.0}
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        native.Side(kind="sjlt", k=0, features=8, **key)
    with pytest.raises(ValueError, match="kind: expected rademacher"):
        native.Side(kind="identity", k=4, features=8, **key)
    side = native.Side(kind="sjlt", k=4, features=8, **key)
    g = native.Matrix(64, "float32", (1, 8), (8, 1))
    rest = {"parts": 0, "device": 0, "stream": 0}
    with pytest.raises(ValueError, match="out: expected an address, got 0"):
        native.sketch(g=g, side=side, out=0, **rest)
    with pytest.raises(ValueError, match="side: features: expected 7, got 8"):
        native.sketch(g=native.Matrix(64, "float32", (1, 7), (8, 1)), side=side, out=64, **rest)
    with pytest.raises(ValueError, match="g: rows: expected 1 to"):
        native.sketch(g=native.Matrix(64, "float32", (0, 8), (8, 1)), side=side, out=64, **rest)
    x, dy = native.Tokens(64, "float32", (1, 1, 2), (2, 2, 1)), native.Tokens(64, "float32", (1, 1, 4), (4, 4, 1))
    signs = native.Side(kind="rademacher", k=4, features=8, **key)
    with pytest.raises(ValueError, match="side: kind: expected sjlt, got rademacher"):
        native.sketch_outer(x=x, dy=dy, spans=0, side=signs, scale=0, out=64, **rest)
    place = {"device": 0, "stream": 0}
    with pytest.raises(ValueError, match="out: expected an address, got 0"):
        native.outer(x=x, dy=dy, spans=0, out=0, **place)
    with pytest.raises(ValueError, match="queries: expected at least 1, got 0"):
        native.score_outer(x=x, dy=dy, spans=0, q=64, queries=0, out=64, gradients=64, parts=0, **place)
    with pytest.raises(ValueError, match="samples x queries: expected a product below 2"):
        native.score_outer_scratch(1 << 40, 2, 4, 1 << 30)
    with pytest.raises(ValueError, match="gradients: expected an address, got 0"):
        native.score_outer(x=x, dy=dy, spans=0, q=64, queries=1, out=64, gradients=0, parts=0, **place)
    pairs = {"xa": x, "dya": dy, "spans_a": 0, "spans_b": 0, "out": 64, "parts": 0, **place}
    with pytest.raises(ValueError, match="dyb: features: expected 4, got 2"):
        native.ghost(xb=x, dyb=x, paired=False, **pairs)
    other = native.Tokens(128, "float32", (1, 1, 2), (2, 2, 1))
    with pytest.raises(ValueError, match="xb, dyb: expected xa and dya where paired"):
        native.ghost(xb=other, dyb=dy, paired=True, **pairs)
    half = native.Tokens(64, "float16", (1, 1, 2), (2, 2, 1)), native.Tokens(64, "float16", (1, 1, 4), (4, 4, 1))
    with pytest.raises(ValueError, match="xb: dtype: expected float32, got float16"):
        native.ghost(xb=half[0], dyb=half[1], paired=False, **pairs)
    far = (
        native.Tokens(64, "float32", (1 << 31, 1, 2), (0, 2, 1)),
        native.Tokens(64, "float32", (1 << 31, 1, 4), (0, 4, 1)),
    )
    with pytest.raises(ValueError, match="samples x tiles: expected 1 to"):
        native.outer(x=far[0], dy=far[1], spans=0, out=64, **place)


def test_packed_inputs_are_copied_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Tensor] = []
    unit_stride = outer_products.unit_stride

    def counted(x: Tensor) -> Tensor:
        copies.append(unit_stride(x))
        return copies[-1]

    monkeypatch.setattr(outer_products, "unit_stride", counted)
    x = random(24, 9, device=device).T.expand(3, -1, -1)  # last stride 9; three samples of the same nine tokens
    spans = torch.tensor([[0, 4], [4, 4], [4, 9]], device=device)
    layers = [(x, random(9, o, device=device).expand(3, -1, -1), *sides("sjlt", 4, 8, 24, o)) for o in (16, 24)]
    got = cuda.project_outer_grouped(layers, spans)
    assert len(copies) == 3  # x and two dy
    assert all(copy.stride(0) == 0 and copy.stride(2) == 1 for copy in copies)
    for (_, dy, p_in, p_out), result in zip(layers, got, strict=True):
        check(result, reference.project_outer(x.double(), dy.double(), p_in, p_out, spans), 9 + 48, x, dy)


def test_reasons() -> None:
    main, gpu = torch.device("cpu"), torch.device("cuda")
    assert "sort" in str(ops.available("rank_and_vote", "triton", gpu))
    assert [op for op, known in OPERATIONS.items() if "cuda" not in known.backends] == []
    assert "not on cpu" in str(cuda.unavailable("sketch", main, torch.float32))
    assert "float64" in str(cuda.unavailable("sketch", gpu, torch.float64))
    with pytest.raises(BackendError, match="not on cpu"):
        ops.sketch(torch.ones(2, 8), Projection("sjlt", 4), backend="cuda")


@pytest.mark.gpu
def test_more_than_2_31_features() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("influence_fast_cuda")
    d = 2**31 + 1000
    g = torch.zeros(2, d, dtype=torch.bfloat16, device="cuda")
    at = torch.tensor([5, 2**31 - 1, 2**31 + 1, d - 1], device="cuda")
    g[1, at] = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.bfloat16, device="cuda")
    for side in (Side("sjlt", "f", 4096, d), Side("rademacher", "f", 64, d)):
        got = ops.sketch(g, side, backend="cuda")
        columns = [reference.random_matrix(side, (0, side.k), (c, c + 1), *MAIN_FLOAT)[:, 0] for c in at.tolist()]
        expected = sum(weight * column for weight, column in zip((1, 2, 4, 8), columns, strict=True))
        torch.testing.assert_close(got[1].cpu(), expected)
        assert not got[0].any()


@pytest.mark.gpu
def test_nothing_waits_for_the_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("influence_fast_cuda")
    x, dy, q = (torch.randn(*shape, device="cuda") for shape in ((2, 70, 40), (2, 70, 24), (3, 24, 40)))
    spans = torch.tensor([[0, 70], [3, 60]], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for some in (None, spans):
            cuda.outer(x, dy, some)
            cuda.project_outer(x, dy, None, Side("sjlt", "l", 7, 24), some)
            cuda.score_outer(x, dy, q, some)
            cuda.ghost_dot(x, dy, x, dy, some, some)
            cuda.ghost_norm(x, dy, some)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_launches_follow_the_current_stream() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("influence_fast_cuda")
    side, stream = Side("sjlt", "f", 64, 100_000), torch.cuda.Stream()
    g = torch.zeros(64, 100_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        g.fill_(1)
        got = ops.sketch(g, side, backend="cuda")
    stream.synchronize()
    assert torch.equal(got.cpu(), reference.sketch(g.cpu(), side))


STRAY_READS = """
import ctypes, math, mmap, sys
import torch
import simt
from pathlib import Path
from influence_fast.ops import cuda
from influence_fast.ops.cuda import native
from influence_fast.ops.projections import Side

native.library = simt.load(Path(sys.argv[1]))
libc, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []


def at_the_edge(tensor):  # its last byte is followed by a page that cannot be touched
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + pages), page, 0) == 0
    kept.append(memory)
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages - size)
    return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)


native.empty = lambda like, *shape: at_the_edge(torch.full(shape, math.nan))
shapes = ((2, 3, 8, 16, 4), (1, 33, 129, 131, 65), (2, 130, 72, 8, 100), (1, 16, 128, 128, 24))
for dtype, shapes in ((torch.float32, shapes), (torch.bfloat16, shapes[:2])):
    for n, t, i, o, k in shapes:
        x, dy = (at_the_edge(torch.randn(n, t, f).to(dtype)) for f in (i, o))
        spans, scale = at_the_edge(torch.tensor([[0, t], [1, t - 1]][-n:])), at_the_edge(torch.rand(o, i))
        for kind in ("rademacher", "sjlt"):
            assert cuda.project_outer(x, dy, Side(kind, "r", k, i), Side(kind, "l", k, o), spans).isfinite().all()
            flat = x.flatten(1)[:, -3000:]
            assert cuda.sketch(flat, Side(kind, "f", 3 * k, flat.shape[1])).isfinite().all()
        assert cuda.sketch_outer(x, dy, Side("sjlt", "s", 7 * k, i * o), spans, scale).isfinite().all()
        q, b = at_the_edge(torch.randn(3, o, i)), [at_the_edge(torch.randn(2, 70, f).to(dtype)) for f in (i, o)]
        assert cuda.outer(x, dy, spans).isfinite().all()
        assert cuda.score_outer(x, dy, q, spans).isfinite().all()
        for other, tokens in (([x, dy], spans), (b, None)):
            assert cuda.ghost_dot(x, dy, *other, spans, tokens).isfinite().all()
            assert cuda.ghost_norm(*other, tokens).isfinite().all()
        assert cuda.rank(x[0]).isfinite().all()
        assert all(found.isfinite().all() for found in cuda.rank_and_vote(x[0], 2))
"""


def test_nothing_beyond_the_tensors_is_touched(simt: ModuleType) -> None:
    done = subprocess.run([sys.executable, "-c", STRAY_READS, str(simt.__file__)], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
