"""Every operation on every backend against the float64 reference: dtypes, shapes, lengths, poisoned pads, bits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from backends import BACKENDS, Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations import Extras, call, make_extras, random
from tolerances import assert_close
from torch import Tensor

from influence_fast import ops
from influence_fast.errors import BackendError, InputError
from influence_fast.ops.projections import Projection, Side

pytestmark = pytest.mark.usefixtures("poisoned")

OUTER_OPS = ("outer", "project_outer", "sketch_outer", "score_outer", "ghost_dot", "ghost_norm")
KINDS = ("rademacher", "gaussian", "sjlt", "dense")
SHAPES = [(1, 1, 1, 1), (3, 7, 63, 129), (2, 33, 129, 63), (4, 16, 64, 16), (0, 3, 4, 5), (2, 0, 4, 5), (1, 300, 9, 40)]
LENGTHS = ("all", "ragged", "left-padded", "holes", "packed")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def spoil(x: Tensor, live: Tensor) -> Tensor:
    return torch.where(live[..., None], x, float("nan"))


def batch(generator: torch.Generator, n: int, t: int, how: str) -> tuple[Tensor | None, Tensor]:
    """``lengths`` as a caller passes them, and the ``(n, t)`` mask of tokens that count."""
    if how == "all":
        return None, torch.ones(n, t, dtype=torch.bool)
    count = torch.randint(0, t + 1, (n,), generator=generator)
    if how == "holes":
        mask = torch.rand(n, t, generator=generator) < 0.6
        return mask, mask
    if how == "left-padded":
        mask = torch.arange(t) >= t - count[:, None]
        return mask, mask
    return count, torch.arange(t) < count[:, None]


def check(op: str, backend: Backend, x: Tensor, dy: Tensor, lengths: Tensor | None, live: Tensor, e: Extras) -> None:
    """Compare with the reference in float64, which sees only what counts; the backend sees NaN elsewhere."""
    # The second half of ghost_dot passes through the same rounding as the first.
    e.xb, e.dyb = e.xb.to(x.dtype).float(), e.dyb.to(x.dtype).float()
    clean = [torch.where(live[..., None], side, 0).double() for side in (x, dy)]
    expected = call(op, *clean, None, e, "reference")
    absolute = call(op, *(c.abs() for c in clean), None, e.absolute(op), "reference")
    actual = call(op, spoil(x, live).to(backend.device), spoil(dy, live).to(backend.device), lengths, e, backend.name)
    length = x.shape[1] * 2 + x.shape[2] * dy.shape[2]
    if op == "ghost_norm":
        # The root of a sum that cancels magnifies its error; compare what is summed.
        actual, expected, absolute = actual**2, expected**2, absolute**2
    assert_close(op, actual, expected, absolute, length)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OUTER_OPS)
def test_matches_reference(op: str, shape: tuple[int, ...], backend: Backend, generator: torch.Generator) -> None:
    n, t, i, o = shape
    for turn, dtype in enumerate(DTYPES):
        backend.need(op, dtype)
        how, kind = LENGTHS[(turn + n) % 4], KINDS[(turn + t) % 4]
        lengths, live = batch(generator, n, t, how)
        x, dy = random(generator, n, t, i).to(dtype), random(generator, n, t, o).to(dtype)
        check(op, backend, x, dy, lengths, live, make_extras(generator, i, o, kind, 5 + 11 * turn))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("most", [1, 3, 12])
def test_pairs_of_few_tokens(dtype: torch.dtype, most: int, backend: Backend, generator: torch.Generator) -> None:
    """Such as factors of rows: many pairs are taken at once, whatever stands beside them in a batch."""
    backend.need("ghost_dot", dtype)
    for na, nb, i, o in ((1, 1, 1, 1), (7, 19, 5, 40), (2, 80, 300, 17), (0, 3, 4, 4), (3, 0, 4, 4), (3, 4, 0, 4)):
        if backend.name == "triton" and na * nb > 40:
            continue
        sides = []
        for n in (na, nb):
            count = torch.randint(0, most + 1, (n,), generator=generator)
            live = torch.arange(most) < count[:, None]
            sides.append(
                (random(generator, n, most, i).to(dtype), random(generator, n, most, o).to(dtype), count, live)
            )
        (xa, dya, la, live_a), (xb, dyb, lb, live_b) = sides
        whole = [
            torch.where(live[..., None], side, 0).double()
            for side, live in ((xa, live_a), (dya, live_a), (xb, live_b), (dyb, live_b))
        ]
        expected = ops.ghost_dot(*whole, backend="reference")
        absolute = ops.ghost_dot(*(side.abs() for side in whole), backend="reference")
        given = [
            spoil(side, live).to(backend.device)
            for side, live in ((xa, live_a), (dya, live_a), (xb, live_b), (dyb, live_b))
        ]
        found = ops.ghost_dot(*given, la, lb, backend=backend.name)
        assert_close("ghost_dot", found, expected, absolute, most * most * 2 + i * o)
        if na and nb > 4 and backend.name == "cpu":
            part = ops.ghost_dot(
                given[0][-1:], given[1][-1:], given[2][3:], given[3][3:], la[-1:], lb[3:], backend="cpu"
            )
            assert torch.equal(part[0], found[-1, 3:])


@pytest.mark.parametrize("how", LENGTHS)
@pytest.mark.parametrize("op", OUTER_OPS)
def test_lengths(op: str, how: str, backend: Backend, generator: torch.Generator) -> None:
    backend.need(op)
    n, t, i, o = 5, 9, 12, 20
    e = make_extras(generator, i, o, "rademacher", 4)
    x, dy = random(generator, n, t, i), random(generator, n, t, o)
    lengths, live = batch(generator, n, t, how)
    if how != "packed":
        check(op, backend, x, dy, lengths, live, e)
        return
    packed = [side[live].to(backend.device) for side in (x, dy)]
    clean = [torch.where(live[..., None], side, 0).double() for side in (x, dy)]
    actual = call(op, *packed, lengths, e, backend.name)
    torch.testing.assert_close(actual.cpu().double(), call(op, *clean, None, e, "reference"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", OUTER_OPS)
def test_strides(op: str, backend: Backend, generator: torch.Generator) -> None:
    """Transposed, sliced and expanded inputs; inputs that begin anywhere in memory."""
    backend.need(op)
    n, t, i, o = 3, 5, 18, 33
    e = make_extras(generator, i, o, "sjlt", 17)
    live = torch.ones(n, t, dtype=torch.bool)
    transposed = random(generator, i, t, n).permute(2, 1, 0), random(generator, t, n, o).transpose(0, 1)
    sliced = random(generator, n, 2 * t, i + 7)[:, ::2, 3 : 3 + i], random(generator, n, t, 2 * o)[..., ::2]
    expanded = random(generator, 1, t, i).expand(n, t, i), random(generator, n, 1, o).expand(n, t, o)
    for x, dy in (transposed, sliced, expanded):
        check(op, backend, x, dy, None, live, e)
        if backend.name == "reference":
            continue  # torch's matmul takes another way through strided memory
        x, dy = x.to(backend.device), dy.to(backend.device)
        assert torch.equal(
            call(op, x, dy, None, e, backend.name), call(op, x.contiguous(), dy.contiguous(), None, e, backend.name)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["project_outer", "sketch_outer"])
def test_every_size_of_projection(op: str, kind: str, backend: Backend, generator: torch.Generator) -> None:
    """k of one, of odd numbers, of one and several vectors, and larger than the features."""
    backend.need(op)
    n, t, i, o = 3, 4, 50, 21
    x, dy = random(generator, n, t, i), random(generator, n, t, o)
    for k in (1, 3, 8, 15, 16, 17, 32, 33, 64, 65, 130):
        scaled = k % 2 == 0
        check(
            op, backend, x, dy, None, torch.ones(n, t, dtype=torch.bool), make_extras(generator, i, o, kind, k, scaled)
        )


@pytest.mark.parametrize("k", [24, 31, 70])
def test_wide_rademacher_sides(k: int, backend: Backend, generator: torch.Generator) -> None:
    """Features beyond one block of those that stay in cache, and not a multiple of a vector; samples of any length."""
    n, t, i, o = 3, 19, 1043, 130
    e = make_extras(generator, i, o, "rademacher", k)
    for dtype in DTYPES:
        backend.need("project_outer", dtype)
        x, dy = random(generator, n, t, i).to(dtype), random(generator, n, t, o).to(dtype)
        lengths, live = batch(generator, n, t, "ragged")
        check("project_outer", backend, x, dy, lengths, live, e)


@pytest.mark.parametrize(("left", "right"), [(True, False), (False, True), (False, False)])
def test_project_one_side(left: bool, right: bool, backend: Backend, generator: torch.Generator) -> None:
    backend.need("project_outer")
    x, dy = random(generator, 4, 6, 40), random(generator, 4, 6, 50)
    e = make_extras(generator, 40, 50, "rademacher", 9)
    e.p_in, e.p_out = e.p_in if right else None, e.p_out if left else None
    lengths, live = batch(generator, 4, 6, "ragged")
    check("project_outer", backend, x, dy, lengths, live, e)


@pytest.mark.parametrize("op", OUTER_OPS)
def test_integers_have_the_same_bits(op: str, backend: Backend, generator: torch.Generator) -> None:
    """Sums of small integers are exact in float32, in whatever order: all backends agree to the bit."""
    for kind, dtype in (("rademacher", torch.float32), ("sjlt", torch.bfloat16)):
        backend.need(op, dtype)
        x = torch.randint(-3, 4, (4, 9, 30), generator=generator).to(dtype)
        dy = torch.randint(-3, 4, (4, 9, 25), generator=generator).to(dtype)
        e = make_extras(generator, 30, 25, kind, 16, scaled=False)
        if kind == "rademacher":
            e.p_out = Side(kind, "a/left", 64, 25)
        e.q = e.q.round()
        e.xb, e.dyb = e.xb.round(), e.dyb.round()
        lengths, _ = batch(generator, 4, 9, "ragged")
        expected = call(op, x.double(), dy.double(), lengths, e, "reference").float()
        found = call(op, x.to(backend.device), dy.to(backend.device), lengths, e, backend.name).cpu()
        # A root is rounded, in float64 first for one of the two.
        torch.testing.assert_close(found, expected, rtol=1.2e-7 if op == "ghost_norm" else 0, atol=0)


@pytest.mark.parametrize("op", OUTER_OPS)
def test_threads_and_repeats_have_the_same_bits(op: str, backend: Backend, generator: torch.Generator) -> None:
    backend.need(op)
    if backend.name == "reference":
        pytest.skip("torch's own sums may depend on threads")
    for n, t, i, o in ((9, 20, 33, 40), (1, 300, 200, 70)):
        x, dy = random(generator, n, t, i).to(backend.device), random(generator, n, t, o).to(backend.device)
        lengths, _ = batch(generator, n, t, "ragged")
        for kind in ("rademacher", "sjlt"):
            e = make_extras(generator, i, o, kind, 20)
            threads, results = torch.get_num_threads(), []
            try:
                for count in (1, 2, 3, 3):
                    torch.set_num_threads(count)
                    results.append(call(op, x, dy, lengths, e, backend.name))
            finally:
                torch.set_num_threads(threads)
            assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_sketch(kind: str, backend: Backend, generator: torch.Generator) -> None:
    for turn, (n, d, k) in enumerate(
        [(1, 1, 1), (3, 129, 63), (17, 1000, 16), (0, 5, 3), (2, 33000, 37), (9, 640, 300)]
    ):
        dtype = DTYPES[turn % 3]
        backend.need("sketch", dtype)
        g = random(generator, n, d + 3).to(dtype)[:, 1 : d + 1]
        side = random(generator, k, d) if kind == "dense" else Side(kind, "a/single", k, d)
        matrix = side.double() if isinstance(side, Tensor) else side.matrix(torch.float64, backend="reference")
        on_device = side.to(backend.device) if isinstance(side, Tensor) else side
        actual = ops.sketch(g.to(backend.device), on_device, backend=backend.name)
        if backend.name == "reference":
            actual = actual.float()
        assert_close("sketch", actual, g.double() @ matrix.T, g.double().abs() @ matrix.abs().T, d)


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
def test_sketch_bits(kind: str, backend: Backend, generator: torch.Generator) -> None:
    """Integers exactly, threads and repeats to the bit, many rows and one, aligned and not."""
    backend.need("sketch")
    for n, d, k in ((1, 70000, 64), (20, 5000, 16), (3, 4097, 256), (9, 1001, 4)):
        g = torch.randint(-8, 9, (n, d), generator=generator).float()
        side = Side(kind, "a/single", k, d)
        exact = ops.sketch(g.double(), side, backend="reference")
        expected = exact.float()
        assert torch.equal(ops.sketch(g.to(backend.device), side, backend=backend.name).cpu(), expected)
        if backend.name == "cpu":
            assert torch.equal(ops.sketch(g.double(), side, backend="cpu"), exact)
        if backend.name == "reference":
            continue
        g = random(generator, n, d).to(backend.device)
        first, threads = ops.sketch(g, side, backend=backend.name), torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(ops.sketch(g, side, backend=backend.name), first)
        finally:
            torch.set_num_threads(threads)


def test_sketch_outer_is_sketch_of_outer(backend: Backend, generator: torch.Generator) -> None:
    backend.need("sketch_outer")
    x, dy = torch.randint(-3, 4, (3, 4, 37), generator=generator), torch.randint(-3, 4, (3, 4, 19), generator=generator)
    x, dy = x.float().to(backend.device), dy.float().to(backend.device)
    for kind in ("rademacher", "sjlt"):
        projection = Projection(kind, 64)
        fused = ops.sketch_outer(x, dy, projection, backend=backend.name)
        assert torch.equal(fused, ops.sketch(ops.outer(x, dy).flatten(1), projection))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 20), st.integers(1, 70), st.integers(1, 70)),
    k=st.integers(1, 70),
    op=st.sampled_from(OUTER_OPS),
    kind=st.sampled_from(KINDS),
    how=st.sampled_from(LENGTHS[:4]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    chosen=st.sampled_from([b for b in BACKENDS if b.name == "cpu"] or BACKENDS),
)
def test_any_shape(
    shape: tuple[int, int, int, int],
    k: int,
    op: str,
    kind: str,
    how: str,
    dtype: torch.dtype,
    seed: int,
    chosen: Backend,
) -> None:
    n, t, i, o = shape
    generator = torch.Generator().manual_seed(seed)
    lengths, live = batch(generator, n, t, how)
    with chosen as backend:
        x, dy = random(generator, n, t, i).to(dtype), random(generator, n, t, o).to(dtype)
        check(op, backend, x, dy, lengths, live, make_extras(generator, i, o, kind, k))


def test_float64_goes_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(1, 2, 3, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "influence_fast"):
        assert ops.outer(x, x).dtype == torch.float64
    assert not caplog.records
    if any(b.name == "cpu" for b in BACKENDS):
        with pytest.raises(BackendError, match="float64"):
            ops.outer(x, x, backend="cpu")


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected auto"):
        ops.choose("outer", backend="gpu")
    monkeypatch.setenv("INFLUENCE_FAST_BACKEND", "reference")
    assert ops.choose("outer") == "reference"
    assert ops.choose("outer", backend="auto") == "reference"
    with pytest.raises(InputError, match="op"):
        ops.available("inner", "reference")


X, DY = torch.ones(2, 3, 4), torch.ones(2, 3, 5)


@pytest.mark.parametrize(
    ("call_", "words"),
    [
        (lambda: ops.outer(X, DY[:, :2]), "x, dy: expected the same leading shape"),
        (lambda: ops.outer(X, DY.double()), "x, dy: expected the same"),
        (lambda: ops.outer(X.long(), DY.long()), "x: expected float32"),
        (lambda: ops.outer([1.0], DY), "x: expected a torch tensor, got list"),  # type: ignore[arg-type]
        (lambda: ops.outer(X, DY, torch.tensor([1, 4])), "lengths: expected values from 0 to 3, got 1 to 4"),
        (lambda: ops.outer(X, DY, torch.tensor([1.0, 2.0])), "lengths: expected integers"),
        (lambda: ops.outer(X[0], DY[0]), "packed x .* needs the integer length"),
        (lambda: ops.outer(X[0], DY[0], torch.tensor([1, 1])), "add up to 3 packed tokens, got 2"),
        (lambda: ops.project_outer(X, DY, torch.ones(2, 5), None), r"p_in: expected a float matrix \(k, 4\)"),
        (lambda: ops.project_outer(X, DY, None, Side("sjlt", "a", 2, 4)), r"p_out: expected a \(k, 5\)"),
        (lambda: ops.sketch_outer(X, DY, Projection("identity")), "projection: identity does not sketch"),
        (lambda: ops.sketch_outer(X, DY, Projection(dim=2), None, torch.ones(4, 5)), r"scale: expected shape \(5, 4\)"),
        (lambda: ops.score_outer(X, DY, torch.ones(1, 4, 5)), r"q: expected shape \(m, 5, 4\)"),
        (lambda: ops.ghost_dot(X, DY, X, X), "xb, dyb: expected features 4 and 5"),
        (lambda: ops.sketch(X, Projection(dim=2)), "g: expected 2 dimensions"),
    ],
)
def test_bad_input_names_the_argument(call_: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call_()


def test_what_is_not_linear_has_no_gradient(backend: Backend) -> None:
    backend.need("sketch_outer")
    x = torch.ones(1, 2, 3, device=backend.device, requires_grad=True)
    scale = torch.ones(3, 3, device=backend.device, requires_grad=True)
    out = ops.sketch_outer(x, x, Projection("sjlt", 2), None, scale, backend=backend.name)
    assert math.isfinite(float(out.detach().sum()))
    with pytest.raises(InputError, match="has no derivative"):
        out.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_adam_is_applied_to_every_entry(kind: str, backend: Backend, generator: torch.Generator) -> None:
    """Against the formula on whole gradients in float64, with m, v and gradients of one size."""
    backend.need("sketch_outer")
    n, t, i, o, k = 3, 5, 37, 20, 11
    x, dy = (torch.randn(n, t, width, generator=generator) for width in (i, o))
    m, v = torch.randn(o, i, generator=generator), torch.rand(o, i, generator=generator) + 0.5
    lengths = torch.tensor([5, 0, 3])
    live = (torch.arange(t) < lengths[:, None])[..., None]
    g = ((dy * live).mT.double() @ (x * live).double()) * 1.0
    update = (0.8 * m.double() + 0.2 * g) / (0.9 * v.double() + 0.1 * g**2 + 1e-3).sqrt()
    if kind == "dense":
        side: torch.Tensor | ops.Side = torch.randn(k, i * o, generator=generator)
        matrix = side.double()
    else:
        side = ops.Side(kind, 4, k, i * o)  # type: ignore[arg-type]
        matrix = side.matrix(torch.float64, backend="reference")
    device = backend.device
    adam = ops.AdamState(m.to(device), v.to(device), (0.8, 0.9), 1e-3)
    given = side.to(device) if isinstance(side, torch.Tensor) else side
    got = ops.sketch_outer(x.to(device), dy.to(device), given, lengths.to(device), adam=adam, backend=backend.name)
    torch.testing.assert_close(got.cpu().double(), update.flatten(1) @ matrix.T, rtol=1e-5, atol=2e-4)


def test_adam_states_that_are_refused() -> None:
    m = torch.ones(3, 2)
    for arguments, message in (
        ((m, m[:2]), "v: expected the shape"),
        ((m, m.long()), "v: expected float32"),
        ((m, m, (0.9, 1.5)), "betas, eps"),
    ):
        with pytest.raises(InputError, match=message):
            ops.AdamState(*arguments)
    x, dy = torch.ones(1, 2, 2), torch.ones(1, 2, 3)
    with pytest.raises(InputError, match="expected one of the two"):
        ops.sketch_outer(x, dy, Projection("sjlt", 2), None, m, adam=ops.AdamState(m, m))
    with pytest.raises(InputError, match=r"adam.m: expected shape \(3, 2\)"):
        ops.sketch_outer(x, dy, Projection("sjlt", 2), adam=ops.AdamState(m.T, m.T))
