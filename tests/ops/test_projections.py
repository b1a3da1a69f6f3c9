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
    assert left.key == (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))


def test_sizes() -> None:
    assert Projection("identity").output_dim((3, 5)) == 15
    assert Projection("sjlt", 7).output_dim((3, 5)) == 7
    assert Projection(dim=(2, 4)).output_dim((3, 5)) == 8
    with pytest.raises(InputError, match="single"):
        Projection(dim=(2, 4)).side("a", "single", 9)
    with pytest.raises(InputError, match="role"):
        Projection(dim=2).side("a", "middle", 9)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="positive"):
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
