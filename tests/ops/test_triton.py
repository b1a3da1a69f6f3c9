"""Triton kernels through the interpreter on tiny shapes, and compiled for real cards, which needs none.

On a machine with a GPU the same kernels also go through all of ``test_ops.py``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from operations import Extras, call, make_extras
from torch import Tensor

import influence_fast
from influence_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ("outer", "project_outer", "sketch_outer", "score_outer", "ghost_dot", "ghost_norm")
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def inputs(generator: torch.Generator, integers: bool, dtype: torch.dtype, packed: bool = False):
    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-3, 4, shape, generator=generator).to(dtype).to(DEVICE)
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    if packed:
        return draw(20, 21), draw(20, 37), torch.tensor([17, 0, 3])
    x, dy, lengths = draw(3, 18, 21), draw(3, 18, 37), torch.tensor([18, 0, 7])
    for row, length in enumerate(lengths):
        x[row, length:] = dy[row, length:] = float("nan")
    return x, dy, lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "gaussian", "dense"])
@pytest.mark.parametrize("op", OPS)
def test_against_the_reference(op: str, kind: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    if kind != "rademacher" and (dtype != torch.float32 or op not in ("project_outer", "sketch_outer")):
        pytest.skip("no projection, or covered")
    for packed in (False, True):
        x, dy, lengths = inputs(generator, False, dtype, packed)
        e = make_extras(generator, 21, 37, kind, 19)
        e.xb, e.dyb = e.xb.to(x), e.dyb.to(x)
        expected = call(op, x.double(), dy.double(), lengths, double(e), "reference")
        got = call(op, x, dy, lengths, e, "triton")
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("op", ["outer", "score_outer"])
def test_tiles_of_16_bit_inputs_reach_every_edge(op: str, generator: torch.Generator) -> None:
    """Integers, whose sums are exact: tiles are larger from 64 inputs and outputs on."""

    def draw(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(DEVICE, torch.bfloat16)

    x, dy, lengths = draw(1, 5, 70), draw(1, 5, 64), torch.tensor([3], device=DEVICE)
    queries = () if op == "outer" else (draw(1, 64, 70),)
    expected = getattr(ops, op)(x.double(), dy.double(), *(q.double() for q in queries), lengths, backend="reference")
    assert torch.equal(getattr(ops, op)(x, dy, *queries, lengths, backend="triton").double(), expected)


def test_parts_of_a_float32_add_up_to_it(generator: torch.Generator) -> None:
    """A row of one number is projected to that number, to the last bit, with a sign."""
    values = torch.randn(9, generator=generator) * torch.logspace(-30, 30, 9)
    g = torch.zeros(9, 200)
    g[torch.arange(9), torch.arange(9) * 20] = values
    side = ops.Side("rademacher", 3, 24, 200)
    got = ops.sketch(g.to(DEVICE), side, backend="triton").cpu()
    assert torch.equal(got, ops.random_matrix(side)[:, torch.arange(9) * 20].T * values[:, None])


def double(e: Extras) -> Extras:
    return replace(e, xb=e.xb.double(), dyb=e.dyb.double())


@pytest.mark.parametrize("op", OPS)
def test_integers_are_exact(op: str, generator: torch.Generator) -> None:
    x, dy, lengths = inputs(generator, True, torch.float32)
    e = make_extras(generator, 21, 37, "sjlt", 16, scaled=False)
    e.q, e.xb, e.dyb = e.q.round(), e.xb.round(), e.dyb.round()
    assert torch.equal(call(op, x, dy, lengths, e, "triton"), call(op, x, dy, lengths, e, "reference"))


@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "gaussian"])
@pytest.mark.parametrize(("n", "d", "k"), [(3, 700, 19), (1, 129, 40), (18, 64, 5), (2, 40, 100), (0, 8, 4)])
def test_sketch(kind: str, n: int, d: int, k: int, generator: torch.Generator) -> None:
    g, side = (
        torch.randn(n, d, generator=generator).to(DEVICE),
        influence_fast.ops.projections.Side(kind, "a/single", k, d),
    )
    expected = ops.sketch(g.double(), side, backend="reference")
    torch.testing.assert_close(ops.sketch(g, side, backend="triton").double(), expected, rtol=1e-5, atol=1e-4)


def test_sketch_outer_in_strips(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    from influence_fast.ops.triton import outer_products

    x, dy, lengths = inputs(generator, False, torch.float32)
    for kind in ("sjlt", "rademacher"):
        e = make_extras(generator, 21, 37, kind, 19)
        whole = call("sketch_outer", x, dy, lengths, e, "triton")
        monkeypatch.setattr(outer_products, "STRIP", 5 * 3 * 21)
        in_strips = call("sketch_outer", x, dy, lengths, e, "triton")
        monkeypatch.undo()
        torch.testing.assert_close(in_strips, whole, rtol=1e-5, atol=1e-4)


_COMPILE = """
import multiprocessing
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from influence_fast.ops.triton import ghost, outer_products, sketches

POINTERS = {"x", "dy", "xa", "dya", "xb", "dyb", "a", "b", "g"}
FLOATS = {"side", "side_in", "side_out", "weight", "q", "out"}
SIZES = {"FEATURES": 128, "ROWS": 16, "K": 64, "K_IN": 64, "K_OUT": 64, "TOKENS": 16, "BLOCK": 32}

def source(kernel, dtype, flag):
    signature, constants = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[name] = SIZES.get(name, (dtype == "fp32") if name == "WIDEN" else flag)
        elif name in POINTERS:
            signature[name] = "*" + dtype
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name.startswith("spans"):
            signature[name] = "*i64"
        else:
            signature[name] = "fp32" if name == "scale" else "i64" if name.startswith("key") else "i32"
    if kernel is sketches._sjlt:
        signature["g"] = "*fp32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants)

kernels = [sketches._project, sketches._sjlt, ghost._ghost]
kernels += [outer_products._project_outer, outer_products._outer, outer_products._score]

def compile_all(dtype):
    said = []
    for kernel in kernels:
        for arch in (80, 90):
            for flag in (True, False):
                built = triton.compile(source(kernel, dtype, flag), target=GPUTarget("cuda", arch, 32))
                assert built.metadata.shared <= 160 * 1024, (kernel, built.metadata.shared)
                said.append(f"{dtype} {kernel.__name__} {arch} {flag} {built.metadata.shared} {len(built.asm['cubin'])}")
    return said

# What both import is imported once.
with multiprocessing.get_context("fork").Pool(2) as pool:
    for said in pool.map(compile_all, ("fp32", "bf16")):
        print(*said, sep="\\n")
"""


def test_every_kernel_compiles_for_both_cards() -> None:
    """Of either dtype, at the same time."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", _COMPILE], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(set(run.stdout.splitlines())) == 48


def test_why_not() -> None:
    assert "radix" in ops.available("rank", "triton", DEVICE)
    assert "float64" in ops.available("outer", "triton", DEVICE, torch.float64)
