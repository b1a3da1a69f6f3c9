"""Whatever tensor an operation is given: the right result or an InputError, never a look at memory that is not its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import call, make_extras
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from influence_fast import InputError, ops
from influence_fast.ops import cpu
from influence_fast.ops.projections import Side

pytest.importorskip("influence_fast_cpu")
N, T, I, O = 3, 4, 5, 6
_BITS = {"rtol": 0, "atol": 0}
SIDE = Side("rademacher", "s", 4, 30)


def run(op: str, x: Any, dy: Any, lengths: Any = None) -> Tensor:
    e = make_extras(torch.Generator().manual_seed(7), I, O, "sjlt", 4)
    more: dict[str, tuple[Any, ...]] = {
        "project_outer": (e.p_in, e.p_out),
        "sketch_outer": (e.single,),
        "score_outer": (e.q,),
        "ghost_dot": (e.xb, e.dyb),
        "dot_outer": (e.xb, e.dyb),
    }
    return getattr(ops, op)(x, dy, *more.get(op, ()), lengths, backend="cpu")


# Every operation on the pair (x, dy), and those on one matrix.
OPERATIONS = ("outer", "project_outer", "sketch_outer", "score_outer", "ghost_dot", "ghost_norm")
PAIRED: dict[str, Callable[..., Tensor]] = {op: partial(run, op) for op in (*OPERATIONS, "dot_outer")}
SINGLE: dict[str, Callable[[Tensor], Any]] = {
    "rank": lambda g: ops.rank(g, backend="cpu"),
    "vote": lambda g: ops.vote(g, 2, backend="cpu"),
    "rank_and_vote": lambda g: torch.stack(ops.rank_and_vote(g, 2, backend="cpu")),
    "sketch": lambda g: ops.sketch(g, SIDE, backend="cpu"),
    "project": lambda g: ops.project(g, SIDE, backend="cpu"),
}


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(N, T, I, generator=random), torch.randn(N, T, O, generator=random)


def matrix() -> Tensor:
    return torch.randn(7, 30, generator=torch.Generator().manual_seed(1))


def negated(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([torch.zeros_like(x), -x], -1)).conj().imag


def strided(x: Tensor) -> Tensor:
    out = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 2), float("nan"))[..., 1:-1:3]
    return out.copy_(x)


def misaligned(x: Tensor) -> Tensor:
    raw = torch.zeros(x.numel() * 4 + 1, dtype=torch.uint8).numpy()
    raw[1:] = x.contiguous().view(torch.uint8).numpy().reshape(-1)
    return torch.frombuffer(raw.data, dtype=torch.float32, count=x.numel(), offset=1).reshape(x.shape)


class Own(torch.Tensor):
    """A subclass that changes nothing."""


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": negated,
    "strided": strided,
    "misaligned": misaligned,
    "transposed": lambda x: x.mT.contiguous().mT,
    "parameter": lambda x: nn.Parameter(x.clone()),
    "of a graph": lambda x: x.clone().requires_grad_() * 1,
    "subclass": lambda x: x.as_subclass(Own),
    "inference": lambda x: _inference(x),
    "offset": lambda x: torch.cat([torch.full_like(x, float("nan"))[:1], x])[1:],
    "read-only": lambda x: torch.from_numpy(x.numpy().copy()),
}


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def freed_with_offset(x: Tensor) -> Tensor:
    base = torch.cat([x, x])
    part = base[len(x) :]
    base.untyped_storage().resize_(0)
    return part


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "freed": freed,
    "freed with an offset": freed_with_offset,
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "complex": lambda x: x.to(torch.complex64),
    "int": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "mkldnn": lambda x: x.to_mkldnn(),
    "lazy": lambda x: nn.LazyLinear(3).weight,
    "list": lambda x: x.tolist(),
    "none": lambda x: None,
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("kind", SAME)
def test_tensors_of_any_kind_are_their_values(kind: str) -> None:
    x, dy = pair()
    for op, made in PAIRED.items():
        assert torch.equal(made(SAME[kind](x), SAME[kind](dy)), made(x, dy)), op
    for op, of_one in SINGLE.items():
        got, expected = of_one(SAME[kind](matrix())), of_one(matrix())
        # A matrix product of torch may round otherwise where memory begins elsewhere; all else is ours.
        torch.testing.assert_close(
            got, expected, **({"rtol": 1e-5, "atol": 1e-5} if op == "project" else _BITS), msg=op
        )
    sides = [
        ops.project_outer(x, dy, made(torch.ones(3, I)), None, backend="cpu") for made in (SAME[kind], Tensor.clone)
    ]
    assert torch.equal(*sides)
    flat, flat_dy, lengths = x.flatten(0, 1), dy.flatten(0, 1), torch.tensor([5, 0, 7])
    packed = [ops.outer(made(flat), made(flat_dy), lengths, backend="cpu") for made in (SAME[kind], Tensor.clone)]
    assert torch.equal(*packed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_values_to_read_is_an_error(kind: str) -> None:
    x, dy = pair()
    change = REFUSED[kind]
    for op in PAIRED:
        for arguments in ((change(x), dy), (x, change(dy)), (change(x), change(dy))):
            refused(op, lambda op=op, given=arguments: PAIRED[op](*given))
    for op in SINGLE:
        refused(op, lambda op=op: SINGLE[op](change(matrix())))
    if kind != "none":
        refused("p_in", lambda: ops.project_outer(x, dy, change(torch.ones(3, I)), None, backend="cpu"))


def refused(what: str, run: Callable[[], Any], *errors: type[Exception], match: str = "") -> None:
    with pytest.raises(errors or InputError) as caught:
        run()
    assert match in str(caught.value), what


def test_shapes_alone_beside_values_are_refused() -> None:
    x, dy = pair()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(dy)
    for unreal in (fake, dy.to("meta")):
        for op, made in PAIRED.items():
            refused(op, lambda made=made, unreal=unreal: made(x, unreal))
    refused("g", lambda: cpu.ghost_norm(fake, fake, None))


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Not set_default_device(None) behind it, after which torch 2.6 has no default device to tell.
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_defaults_of_torch_change_nothing(dtype: torch.dtype) -> None:
    (x, dy), given = pair(), matrix()
    e = make_extras(torch.Generator().manual_seed(7), I, O, "sjlt", 4)
    lengths = torch.tensor([4, 0, 2])
    for op in OPERATIONS:
        expected = call(op, x, dy, lengths, e, "cpu")
        with defaults(dtype, "meta"):
            got = call(op, x, dy, lengths, e, "cpu")
        assert torch.equal(got, expected), op
    for op, of_one in SINGLE.items():
        expected = of_one(given)
        with defaults(dtype, "meta"):
            got = of_one(given)
        assert torch.equal(got, expected), op


BAD = [
    [2**63 - 1, 2**63 - 1, 14],
    [2**62, 2**62, 2**62],
    [-(2**63), 2**63 - 1, 13],
    [-1, 6, 7],
    [13, 0, 0],
    [0, 0, 0],
]


@pytest.mark.parametrize("values", BAD)
def test_lengths_that_would_wrap(values: list[int]) -> None:
    x, dy = pair()
    for op, made in PAIRED.items():
        if op != "dot_outer":
            packed = x.flatten(0, 1), dy.flatten(0, 1), torch.tensor(values)
            refused(op, lambda made=made, given=packed: made(*given), match="lengths")
        if min(values) < 0 or max(values) > T:
            refused(op, lambda made=made: made(x, dy, torch.tensor(values)), match="lengths")


def test_lengths_of_other_kinds() -> None:
    x, dy = pair()
    expected = ops.outer(x, dy, torch.tensor([4, 0, 2]), backend="cpu")
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint64):
        assert torch.equal(ops.outer(x, dy, torch.tensor([4, 0, 2], dtype=dtype), backend="cpu"), expected)
    assert torch.equal(ops.outer(x, dy, torch._neg_view(torch.tensor([-4, 0, -2])), backend="cpu"), expected)
    assert torch.equal(ops.outer(x, dy, [4, 0, 2], backend="cpu"), expected)
    packed = x.flatten(0, 1), dy.flatten(0, 1)
    assert torch.equal(
        ops.outer(*packed, [5, 0, 7], backend="cpu"), ops.outer(*packed, torch.tensor([5, 0, 7]), backend="cpu")
    )
    for bad in (
        torch.tensor([2**64 - 1, 0, 0], dtype=torch.uint64),
        torch.tensor([4.0, 0, 2]),
        torch.tensor([4, 0]),
        torch.tensor([[4, 0, 2]]),
        torch.tensor([4, 0, 2]).to_sparse(),
        torch.tensor([4, 0, 2], device="meta"),
        [2**70, 0, 0],
        "abc",
        [1, [2], 3],
    ):
        for tokens in ((x, dy), packed):
            with pytest.raises(InputError, match=r"lengths|all have values"):
                ops.outer(*tokens, bad, backend="cpu")


def test_a_side_too_large_for_a_kernel() -> None:
    side = Side("sjlt", "s", 1 << 31, 30)
    refused("side", lambda: ops.random_matrix(side, (0, 1), (0, 3), backend="cpu"), match="k: expected less than 2^31")


def test_a_transform_of_torch_is_the_same_call_many_times() -> None:
    x, dy = pair()
    both = torch.stack([x, 2 * x])
    for made in PAIRED.values():
        many = torch.func.vmap(lambda one, made=made: made(one, dy), randomness="same")(both)
        torch.testing.assert_close(many, torch.stack([made(x, dy), made(2 * x, dy)]))


def test_a_storage_that_shrank() -> None:
    x, dy = pair()
    x.untyped_storage().resize_(x.nbytes - 4)
    for op, made in PAIRED.items():
        refused(op, lambda made=made: made(x, dy), match="whose storage was freed")
    x.untyped_storage().resize_(x.nbytes)


@settings(max_examples=int(os.environ.get("INFLUENCE_FAST_EXAMPLES", "60")), deadline=None)
@given(
    st.sampled_from(list(OPERATIONS)),
    st.tuples(*[st.integers(0, 9)] * 4),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.integers(0, 7),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**32),
)
def test_odd_shapes_strides_and_places(op, shape, steps, offset, dtype, seed) -> None:
    """Zero sizes, gaps between everything, memory that begins anywhere; NaN lies in all gaps."""
    random = torch.Generator().manual_seed(seed)
    n, t, i, o = shape
    e = make_extras(random, max(i, 1), max(o, 1), "sjlt", 3)

    def laid_out(width: int) -> tuple[Tensor, Tensor]:
        values = torch.randn(n, t, width, generator=random).to(dtype)
        size = [a * b for a, b in zip((n, t, width), steps, strict=True)]
        count = max(1, size[0] * size[1] * size[2])
        room = torch.full((count * values.element_size() + offset + 8,), 255, dtype=torch.uint8)
        whole = torch.frombuffer(room.numpy().data, dtype=dtype, count=count, offset=offset)
        whole.fill_(float("nan"))
        part = whole[: size[0] * size[1] * size[2]].view(size)[:: steps[0], :: steps[1], :: steps[2]]
        return values, part.copy_(values)

    (x, odd_x), (dy, odd_dy) = laid_out(max(i, 1)), laid_out(max(o, 1))
    lengths = torch.randint(0, t + 1, (n,), generator=random)
    expected = call(op, x, dy, lengths, e, "cpu")
    got = call(op, odd_x, odd_dy, lengths, e, "cpu")
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
