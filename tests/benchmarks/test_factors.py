"""What is measured of a kind of store is what such a store reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stores import write_store

from benchmarks import factors
from influence_fast.gradients.row_factors import as_factors


@pytest.mark.parametrize("dtype", ["float32", "int8", "int8_block", "int4"])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_kept_is_what_a_store_reads(tmp_path: Path, dtype: str, rank: int | None) -> None:
    if rank is not None and dtype == "int8":
        pytest.skip("no store keeps factors so")
    rows = torch.randn(9, 12 * 20, generator=torch.Generator().manual_seed(0))
    store = write_store(tmp_path / "s", {"a": rows}, shapes={"a": (12, 20)}, shard_rows=9, dtype=dtype, factors=rank)
    found, size = factors.kept(rows, as_factors(rows, 12, 4), 12, 4, factors.Kind(0, "identity", rank, dtype))
    torch.testing.assert_close(found, store.read("a"), rtol=1e-5, atol=1e-6)
    places = store.shards[0].places
    assert size * 9 == sum(place.end - place.start for name, place in places.items() if name in ("a", "@scale/a"))


def test_kinds_of_a_group_are_of_about_its_size() -> None:
    for kind in factors._kinds():
        out, in_ = (64, 64) if kind.factors else (1, 1)
        if not kind.factors:
            size = kind.projection.split(":")[1]
            out, in_ = map(int, size.split("x")) if "x" in size else (1, int(size))
        elif kind.projection == "rademacher:16x16":
            out, in_ = 16, 16
        rows = torch.zeros(1, out * in_)
        factored = torch.zeros(1, (kind.factors or 1) * (out + in_))
        _, size = factors.kept(rows, factored, out, kind.factors or 1, kind)
        assert kind.group <= size <= 1.15 * kind.group


def test_measures() -> None:
    exact = torch.arange(40.0).view(2, 20)
    assert factors.compared(exact, exact) == {"correlation": pytest.approx(1), "recall": 1}
    assert factors.compared(-exact, exact)["recall"] == 0
