"""The operations as citizens of torch: opcheck, tracing, shapes without values, batching and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from influence_fast import InputError, Projection, ops

N, T, I, O = 2, 3, 5, 4
LEFT, RIGHT = ops.Side("rademacher", 1, 3, O), ops.Side("sjlt", "in", 2, I)
SINGLE = ops.Side("sjlt", 7, 6, I * O, nonzeros=2)
LENGTHS = torch.tensor([2, 3])


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


X, DY, G = tensor(N, T, I), tensor(N, T, O), tensor(N, I * O)
ADAM = ops.AdamState(tensor(O, I), tensor(O, I).abs())
SPARSE = ops.SparseSide(torch.tensor([[0], [1], [0], [2], [2]]), torch.ones(5, 1), 3)
# Each registered operation, by what calls it, and on which tensors.
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "outer": (lambda x, dy: ops.outer(x, dy, LENGTHS), (X, DY)),
    "project_outer": (lambda x, dy: ops.project_outer(x, dy, RIGHT, LEFT, LENGTHS), (X, DY)),
    "project_outer, given": (lambda x, dy, p: ops.project_outer(x, dy, p, None), (X, DY, tensor(2, I))),
    "sketch_outer": (lambda x, dy: ops.sketch_outer(x, dy, SINGLE), (X, DY)),
    "sketch_outer, Adam": (lambda x, dy: ops.sketch_outer(x, dy, Projection("sjlt", 6), adam=ADAM), (X, DY)),
    "score_outer": (lambda x, dy, q: ops.score_outer(x, dy, q), (X, DY, tensor(3, O, I))),
    "ghost_dot": (lambda a, b, c, d: ops.ghost_dot(a, b, c, d), (X, DY, tensor(3, T, I), tensor(3, T, O))),
    "ghost_norm": (lambda x, dy: ops.ghost_norm(x, dy), (X, DY)),
    "sketch": (lambda g: ops.sketch(g, SINGLE), (G,)),
    "sketch, parts": (lambda a, b: ops.sketch([a, b], ops.Side("rademacher", 3, 6, I * O)), (G[:, :7], G[:, 7:])),
    "project": (lambda x: ops.project(x, ops.Side("gaussian", 5, 2, I)), (X,)),
    "project, transposed": (lambda x: ops.project(x, ops.Side("sjlt", 5, I, 9), transpose=True), (X,)),
    "sparse": (lambda x: ops.project(x, SPARSE), (X,)),
    "rank": (lambda g: ops.rank(g), (G,)),
    "vote": (lambda g: ops.vote(g, 3), (G,)),
    "rank_and_vote": (lambda g: ops.rank_and_vote(g, 3), (G,)),
}
LINEAR = ("outer", "project_outer", "project_outer, given", "sketch", "sketch, parts", "project", "project, transposed")

name = torch.ops.influence_fast
CHECKED: dict[str, tuple[Any, ...]] = {
    "outer": (X, DY, LENGTHS, "auto"),
    "project_outer": (X, DY, None, None, RIGHT.text, LEFT.text, LENGTHS, "auto"),
    "sketch_outer": (X, DY, None, SINGLE.text, None, tensor(O, I), None, None, 0.0, 0.0, 0.0, "auto"),
    "score_outer": (X, DY, tensor(3, O, I), None, "auto"),
    "ghost_dot": (X, DY, X, DY, None, LENGTHS, "auto"),
    "ghost_norm": (X, DY, None, "auto"),
    "sketch": (G, None, SINGLE.text, "auto"),
    "sketch_transposed": (tensor(N, 6), SINGLE.text, "auto"),
    "rank": (G, "auto"),
    "vote": (G, 3, "auto"),
    "rank_and_vote": (G, 3, "auto"),
    "random_matrix": (LEFT.text, 0, 3, 1, 4, torch.float64, torch.device("cpu"), "auto"),
}


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected)


def test_every_operation_is_checked() -> None:
    from influence_fast.ops import torch_ops

    assert set(CHECKED) == set(torch_ops.CALLS)


@pytest.mark.parametrize("op", CHECKED)
def test_opcheck(op: str) -> None:
    linear = op in ("outer", "project_outer", "sketch", "sketch_transposed")
    args = [
        a.clone().requires_grad_() if linear and isinstance(a, Tensor) and a.is_floating_point() else a
        for a in CHECKED[op]
    ]
    torch.library.opcheck(getattr(name, op), tuple(args))


@pytest.mark.parametrize("case", CASES)
def test_traced_is_eager(case: str) -> None:
    run, tensors = CASES[case]
    other = tuple(2 * t for t in tensors)
    traced = make_fx(run)(*tensors)
    # Not a constant: other values give other results.
    same(traced(*other), run(*other))


@pytest.mark.parametrize("case", ["project_outer", "sketch", "project", "vote"])
def test_compiled_whole(case: str) -> None:
    run, tensors = CASES[case]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for factor in (1, 3):
        given = tuple(factor * t for t in tensors)
        same(compiled(*given), run(*given))


def test_compiled_with_a_gradient_and_a_projection() -> None:
    projection = Projection(dim=(2, 3))

    def loss(x: Tensor, dy: Tensor) -> Tensor:
        return ops.project_outer(x, dy, projection, projection).square().sum()

    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(loss(x, DY), x)[0]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x, DY).backward()
    same(x.grad, expected)


def test_exported() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, dy: Tensor) -> Tensor:
            return ops.sketch(ops.outer(x, dy).flatten(1), SINGLE)

    program = torch.export.export(Model(), (X, DY))
    same(program.module()(3 * X, DY), Model()(3 * X, DY))


@pytest.mark.parametrize("case", CASES)
def test_shapes_without_values(case: str) -> None:
    run, tensors = CASES[case]
    expected = run(*tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = run(*(mode.from_tensor(t) for t in tensors))
    for part, wanted in zip(*[(v if isinstance(v, tuple) else (v,)) for v in (got, expected)], strict=True):
        assert (part.shape, part.dtype, part.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def test_meta_tensors() -> None:
    got = ops.project_outer(X.to("meta"), DY.to("meta"), RIGHT, LEFT)
    assert (got.device.type, got.shape) == ("meta", (N, 3, 2))


@pytest.mark.parametrize("case", CASES)
def test_batched(case: str) -> None:
    run, tensors = CASES[case]
    many = tuple(torch.stack([t, -t, 3 * t], 1) for t in tensors)
    expected = [run(*(t.select(1, i) for t in many)) for i in range(3)]
    if isinstance(expected[0], tuple):
        expected = tuple(torch.stack(part) for part in zip(*expected, strict=True))  # type: ignore[assignment]
    else:
        expected = torch.stack(expected)  # type: ignore[assignment]
    same(torch.func.vmap(run, in_dims=1)(*many), expected)
    if len(tensors) > 1:
        one = torch.func.vmap(run, in_dims=(1, *[None] * (len(tensors) - 1)))(many[0], *tensors[1:])
        same(one[1], run(many[0].select(1, 1), *tensors[1:]))


@pytest.mark.parametrize("case", LINEAR)
def test_derivatives(case: str) -> None:
    run, tensors = CASES[case]
    wide = tuple(t.double().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(run, wide, check_forward_ad=True)
    # Of second derivatives one random direction: all of them take most of the time, and are of the same code.
    assert torch.autograd.gradgradcheck(run, wide, fast_mode=True)


@pytest.mark.parametrize("lengths", [torch.tensor([2, 0]), torch.tensor([[True, False, True], [False, True, True]])])
def test_tokens_that_do_not_count_have_no_gradient(lengths: Tensor) -> None:
    wide = X.double().requires_grad_(), DY.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, dy: ops.project_outer(x, dy, RIGHT, None, lengths), wide)


def test_derivative_of_packed_samples() -> None:
    wide = tensor(5, I, dtype=torch.float64).requires_grad_(), tensor(5, O, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, dy: ops.project_outer(x, dy, RIGHT, LEFT, torch.tensor([2, 0, 3])), wide)


def test_transforms_compose() -> None:
    def loss(g: Tensor) -> Tensor:
        return ops.sketch(g, SINGLE).square().sum()

    many = torch.stack([G, 2 * G])
    same(torch.func.vmap(torch.func.grad(loss))(many), torch.stack([torch.func.grad(loss)(g) for g in many]))
    matrix = SINGLE.matrix()
    same(torch.func.grad(loss)(G), 2 * G @ matrix.T @ matrix)
    value, tangent = torch.func.jvp(lambda g: ops.sketch(g, SINGLE), (G,), (2 * G,))
    same(tangent, 2 * value)
    same(torch.func.functionalize(loss)(G), loss(G))


@pytest.mark.parametrize("case", ["ghost_norm", "rank", "score_outer"])
def test_what_has_no_derivative_says_so(case: str) -> None:
    run, tensors = CASES[case]
    with pytest.raises(InputError, match="no derivative"):
        run(*(t.clone().requires_grad_() for t in tensors)).sum().backward()
    with pytest.raises(InputError, match="no derivative"):
        torch.func.jvp(run, tensors, tensors)


def test_half_precision_gradients_keep_their_dtype() -> None:
    g = G.to(torch.bfloat16).requires_grad_()
    ops.sketch(g, SINGLE).sum().backward()
    assert g.grad is not None
    assert g.grad.dtype == torch.bfloat16


def test_modes_that_change_nothing() -> None:
    expected = ops.project_outer(X, DY, RIGHT, LEFT)
    with torch.inference_mode():
        same(ops.project_outer(X, DY, RIGHT, LEFT), expected)
    with torch.autocast("cpu", torch.bfloat16):
        same(ops.project_outer(X, DY, RIGHT, LEFT), expected)
