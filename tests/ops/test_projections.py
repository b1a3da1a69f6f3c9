"""Projections: how they are named and read, and that they keep inner products as Johnson and Lindenstrauss promise."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from influence_fast import ops
from influence_fast.errors import InputError
from influence_fast.ops.projections import Projection, Side


@pytest.mark.parametrize(
    "text", ["identity", "rademacher:16x16", "sjlt:4096", "gaussian:8x4:seed3", "rademacher:7:seed-1"]
)
def test_text_round_trip(text: str) -> None:
    assert str(Projection.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "rademacher", "rademacher:", "sjlt:4x", "fjlt:3", "sjlt:0", "gaussian:3x0", "sjlt:4:seed"]
)
def test_bad_text(text: str) -> None:
    with pytest.raises(InputError, match=r"projection|kind|dim"):
        Projection.parse(text)


def test_identifiers_and_keys() -> None:
    projection = Projection("rademacher", (4, 8), seed=5)
    left, right = projection.side("layer.0", "left", 10), projection.side("layer.0", "right", 12)
    assert left is not None
    assert right is not None
    assert (left.identifier, left.k, left.features) == ("layer.0/left/seed5", 4, 10)
    assert (right.identifier, right.k, right.features) == ("layer.0/right/seed5", 8, 12)
    assert Projection("sjlt", 3).side("a", "single", 9) == Side("sjlt", "a/single", 3, 9)
    assert Projection("identity").side("a", "left", 9) is None
    digest = hashlib.md5(b"layer.0/left/seed5").digest()
    assert left.words == (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))


def test_sizes() -> None:
    assert Projection("identity").output_dim((3, 5)) == 15
    assert Projection("sjlt", 7).output_dim((3, 5)) == 7
    assert Projection(dim=(2, 4)).output_dim((3, 5)) == 8
    with pytest.raises(InputError, match="single"):
        Projection(dim=(2, 4)).side("a", "single", 9)
    with pytest.raises(InputError, match="role"):
        Projection(dim=2).side("a", "middle", 9)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="k: expected a whole number from 1"):
        Side("sjlt", "a", 0, 9)


@pytest.mark.parametrize(("k", "features"), [(1, 5), (7, 7), (7, 100), (64, 1000), (100, 63), (128, 1280)])
def test_sjlt_is_balanced(k: int, features: int) -> None:
    """One non-zero per feature, +-1; every output gathers the same number of features, up to one."""
    for name in ("a", "b", "c"):
        matrix = Side("sjlt", name, k, features).matrix()
        assert bool((matrix.abs().sum(0) == 1).all())
        assert bool(((matrix == 0) | (matrix.abs() == 1)).all())
        count = matrix.abs().sum(1)
        assert count.min() == features // k
        assert count.max() == math.ceil(features / k)


def vectors(features: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    g = torch.randn(features, generator=generator, dtype=torch.float64)
    h = 0.6 * g + torch.randn(features, generator=generator, dtype=torch.float64)
    rows = features // 20
    a, b = (torch.randn(rows, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(20, generator=generator, dtype=torch.float64)
    tail = torch.randn(features, generator=generator, dtype=torch.float64)
    return {
        "dense": (g, h),
        # Gradients are outer products: rows are multiples of each other.
        "rank one": ((a[:, None] * x).flatten(), (b[:, None] * x).flatten()),
        "constant": (torch.ones(features, dtype=torch.float64), torch.ones(features, dtype=torch.float64)),
        "few large": (tail.pow(3), tail.pow(3) + g),
    }


@pytest.mark.parametrize("which", list(vectors(400)))
@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sjlt"])
def test_inner_products_are_kept(kind: str, which: str) -> None:
    """Unbiased, with variance at most (|g|^2 |h|^2 + <g,h>^2) / k; over 600 fixed seeds, so never by chance."""
    k, features, draws = 16, 400, 600
    g, h = vectors(features)[which]
    both = torch.stack([g, h]).float()
    products = []
    for seed in range(draws):
        sketched = ops.sketch(both, Side(kind, f"layer/single/seed{seed}", k, features)).double()
        products.append(sketched[0] @ sketched[1])
    product = torch.stack(products)
    true, bound = g @ h, (g @ g * (h @ h) + (g @ h) ** 2) / k
    assert abs(product.mean() - true) < 4 * (bound / draws).sqrt()
    assert product.var() < 1.25 * bound
    # And it is a random projection, not a lucky one.
    assert product.var() > 0.2 * (bound - 2 * (g * g * h * h).sum() / k).clamp_min(0)


def test_two_sided_projection_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(2, 6, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    x[1], dy[1] = x[0] + 0.5 * x[1], dy[0] + 0.5 * dy[1]
    gradient = ops.outer(x, dy).flatten(1)
    products = []
    for seed in range(400):
        projection = Projection("rademacher", (8, 8), seed=seed)
        small = ops.project_outer(x, dy, projection, projection).flatten(1)
        products.append(small[0] @ small[1])
    product, true = torch.stack(products), gradient[0] @ gradient[1]
    assert abs(product.mean() - true) < 4 * product.std() / 20


RAW = [
    Side("rademacher", 5, 6, 300),
    Side("gaussian", -1, 6, 300, scale=0.5),
    Side("sjlt", 2**63, 6, 300, nonzeros=3, scale=2),
    Side("random_mask", 5, 6, 300),
    Side("grass", 5, 6, 300, nonzeros=2),
    Side("rademacher", 5, 30, 300, offset=77),
    Side("sjlt", 5, 7, 300, offset=1 << 40),
    Side("gaussian", 5, 7, 300, offset=3),
]


@pytest.mark.parametrize("side", RAW, ids=repr)
def test_a_raw_side_is_its_matrix(side: Side) -> None:
    g = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    matrix = side.matrix(torch.float64, backend="reference")
    expected = g.double() @ matrix.T
    torch.testing.assert_close(ops.sketch(g, side).double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        ops.sketch(g.double(), side), expected, rtol=0, atol=1e-5 * (side.kind == "gaussian") + 1e-12
    )
    torch.testing.assert_close(ops.project(g, side, transpose=False).double(), expected, rtol=0, atol=1e-4)
    y = expected.float()
    torch.testing.assert_close(ops.project(y, side, transpose=True).double(), y.double() @ matrix, rtol=0, atol=1e-3)
    x, dy = g.view(4, 6, 50), torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(2))
    flat = (dy.mT @ x).flatten(1).double()
    torch.testing.assert_close(ops.sketch_outer(x, dy, side).double(), flat @ matrix.T, rtol=0, atol=1e-4)
    one = ops.project_outer(g[:, None], dy[:, :1], side, None)
    torch.testing.assert_close(one.double(), dy[:, 0, :, None].double() * expected[:, None], rtol=0, atol=1e-4)
    assert Side.read(side.text) == side


def test_a_scale_of_one_gives_integers() -> None:
    ones = torch.ones(8, 10241)
    odd = ops.sketch(ones, Side("rademacher", 3, 512, 10241))
    assert bool((odd.remainder(2) == 1).all())
    assert Side("rademacher", "name", 4, 9).scale == 0.5


def test_nonzeros_of_a_column() -> None:
    side = Side("sjlt", 3, 16, 100, nonzeros=4)
    index, sign = side.entries()
    assert (index.shape, sign.dtype) == ((100, 4), torch.int8)
    given = ops.SparseSide(index, sign, 16)
    assert torch.equal(given.matrix(), side.matrix())
    g = torch.randn(3, 100)
    torch.testing.assert_close(ops.sketch(g, given), ops.sketch(g, side))
    y = torch.randn(3, 16)
    torch.testing.assert_close(ops.project(y, given, transpose=True), y @ side.matrix())


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sjlt"])
def test_pieces_of_a_vector_have_the_bits_of_the_whole(kind: str) -> None:
    side = Side(kind, 9, 12, 70000)  # type: ignore[arg-type]
    g = torch.randn(2, 70000, generator=torch.Generator().manual_seed(3))
    out = torch.empty(2, 12)
    for begin in (0, 32768, 65536):
        end = min(begin + 32768, 70000)
        assert ops.sketch(g[:, begin:end], side.columns(begin, end), out=out, accumulate=begin > 0) is out
    assert torch.equal(out, ops.sketch(g, side))


@pytest.mark.parametrize("side", [*RAW[:5], torch.randn(4, 300), Projection("sjlt", 9)], ids=lambda s: type(s).__name__)
def test_parameters_are_one_vector(side: Side | torch.Tensor | Projection) -> None:
    g = torch.randint(-3, 4, (2, 300)).float()
    parts = {"a": g[:, :200].view(2, 20, 10), "b": g[:, 200], "c": g[:, 201:]}
    whole = ops.sketch(g, side)
    torch.testing.assert_close(ops.sketch(parts, side), whole, rtol=1e-5, atol=1e-4)
    half = ops.sketch(list(parts.values()), side, dtype=torch.bfloat16)
    torch.testing.assert_close(half, whole.bfloat16(), rtol=0.02, atol=0.05)


def test_a_mask_keeps_one_feature_of_each_run() -> None:
    chosen, then = Side("random_mask", 1, 7, 100).mask()
    assert then is None
    assert torch.equal(chosen, chosen.unique())
    ends = torch.arange(1, 8) * 100 // 7
    assert torch.equal(torch.searchsorted(ends, chosen, right=True), torch.arange(7))
    assert len({tuple(Side("random_mask", key, 7, 100).mask()[0].tolist()) for key in range(5)}) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("identity", 1, 2, 3), "kind: expected"),
        (("sjlt", 1.5, 2, 3), "key: expected a whole number"),
        (("sjlt", 1 << 64, 2, 3), "key: expected a whole number"),
        (("sjlt", 1, 2, 3, math.inf), "scale: expected a finite"),
        (("sjlt", 1, 2, 3, 1.0, 3), "nonzeros: expected at most k = 2"),
        (("rademacher", 1, 2, 3, 1.0, 2), "nonzeros: expected 1 for rademacher"),
        (("random_mask", 1, 4, 3), "k, offset: expected at most the 3 features"),
        (("sjlt", 1, 2, 3, 1.0, 1, -1), "offset: expected a whole number from 0"),
    ],
)
def test_raw_sides_that_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Side(*arguments)


def test_sketch_refuses_what_does_not_fit() -> None:
    g, side = torch.ones(2, 9), Side("sjlt", 1, 4, 9)
    for arguments, message in (
        ({"accumulate": True}, "accumulate: expected out"),
        ({"out": torch.empty(2, 5)}, r"out: expected \(2, 4\)"),
    ):
        with pytest.raises(InputError, match=message):
            ops.sketch(g, side, **arguments)
    with pytest.raises(InputError, match="expected 10 features, the sum over g, got 9"):
        ops.sketch([g, g[:, :1]], side)
    with pytest.raises(InputError, match="at least one"):
        ops.sketch([], side)
    with pytest.raises(InputError, match="no part of columns"):
        Side("grass", 1, 2, 9).columns(0, 3)


def test_gaussian_entries_are_the_same_kept_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    g, side = torch.randn(5, 3000), Side("gaussian", 77, 40, 3000)
    kept = ops.sketch(g, side)
    monkeypatch.setenv("INFLUENCE_FAST_MATRIX_BYTES", "1000")
    assert torch.equal(ops.sketch(g, side), kept)
    monkeypatch.setenv("INFLUENCE_FAST_MATRIX_BYTES", "many")
    with pytest.raises(InputError, match="expected a number of bytes"):
        ops.sketch(g, side)
