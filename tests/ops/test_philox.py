"""Random entries: published Philox vectors, and the same bits from the extension as from plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from backends import Backend

from influence_fast import ops
from influence_fast.ops import philox
from influence_fast.ops.projections import Side

# Known-answer vectors published with Random123 (Salmon et al. 2011): counter, key, output.
ONES = 0xFFFFFFFF
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], output: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in philox.philox4x32(counter, key)) == output
    native = pytest.importorskip("influence_fast_cpu")
    assert native.philox4x32_10(*counter, *key) == output


RANGES = [
    ((0, 40), (0, 700)),
    ((3, 4), (127, 130)),
    ((17, 33), (5, 6)),
    ((2, 2), (0, 9)),
    ((0, 5), (4294967000, 4294967600)),
]


@pytest.mark.parametrize(("rows", "cols"), RANGES)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
def test_same_bits_everywhere(kind: str, rows: tuple[int, int], cols: tuple[int, int], backend: Backend) -> None:
    backend.need("random_matrix")
    for k in (40, 128, 333):
        side = Side(kind, "layer/left", k, 1 << 33)
        expected = ops.random_matrix(side, rows, cols, backend="reference")
        actual = ops.random_matrix(side, rows, cols, device=backend.device, backend=backend.name)
        assert torch.equal(actual.cpu(), expected)


def box_muller(side: Side, rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
    """The entries in float64, of uniform numbers rounded to float32; the scale of 64 outputs is exact."""
    columns = torch.arange(cols[0] // 4, -(-cols[1] // 4))
    words = philox.philox4x32((columns, torch.arange(*rows)[:, None], 0, 0), side.words)
    entries = []
    for a, b in (words[:2], words[2:]):
        angle = ((b.float() * 2.0**-32) * torch.tensor(2 * math.pi)).double()
        radius = (-2 * ((a.float() + 0.5) * 2.0**-32).double().log()).sqrt()
        entries += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(entries, -1).flatten(-2)[:, cols[0] % 4 :][:, : cols[1] - cols[0]] / 8


@pytest.mark.parametrize(("rows", "cols"), RANGES)
def test_gaussian_within_two_units(rows: tuple[int, int], cols: tuple[int, int], backend: Backend) -> None:
    """The reference, in torch's float32, within three: a root (1/2) of a logarithm (1, halved), a cosine (1) and their
    product (1/2) are 2.5 units, and libraries promise no more than one unit for a logarithm or a cosine."""
    backend.need("random_matrix")
    side = Side("gaussian", "layer/left", 64, 1 << 33)
    expected = box_muller(side, rows, cols)
    actual = ops.random_matrix(side, rows, cols, device=backend.device, backend=backend.name).cpu()
    size = expected.float().abs()
    unit = torch.nextafter(size, torch.tensor(torch.inf)) - size
    assert bool(((actual - expected).abs() <= (3 if backend.name == "reference" else 4) * unit).all())


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sjlt"])
def test_a_part_is_the_part_of_the_whole(kind: str, backend: Backend) -> None:
    backend.need("random_matrix")
    side = Side(kind, "x/right/seed3", 50, 900)
    whole = ops.random_matrix(side, device=backend.device, backend=backend.name)
    part = ops.random_matrix(side, (7, 31), (129, 640), device=backend.device, backend=backend.name)
    if kind == "gaussian" and backend.name == "reference":  # torch's logarithm may depend on the place in a vector
        torch.testing.assert_close(part, whole[7:31, 129:640], rtol=6 * 2.0**-23, atol=0)
    else:
        assert torch.equal(part, whole[7:31, 129:640])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, backend: Backend) -> None:
    backend.need("random_matrix", dtype)
    for kind in ("rademacher", "sjlt"):
        side = Side(kind, "x", 12, 200)
        actual = ops.random_matrix(side, dtype=dtype, device=backend.device, backend=backend.name)
        assert torch.equal(actual.cpu(), ops.random_matrix(side, dtype=dtype, backend="reference"))


def test_sketch_of_unit_vectors_is_the_matrix(backend: Backend) -> None:
    """What the kernels multiply by is what random_matrix shows."""
    backend.need("sketch")
    for kind in ("rademacher", "sjlt"):
        for k in (7, 16, 70):
            side = Side(kind, "x", k, 300)
            units = torch.eye(300, device=backend.device)
            expected = ops.random_matrix(side, backend="reference").T
            assert torch.equal(ops.sketch(units, side, backend=backend.name).cpu(), expected)
