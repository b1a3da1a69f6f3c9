"""Stores whose numbers share scales in blocks: how near they are, read, changed, merged, scored, searched and damaged."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stores import append, write_store
from torch import Tensor

import influence_fast as inf
from influence_fast._records import seal
from influence_fast.gradients import store_format
from influence_fast.gradients.block_scales import BITS, blocks, elements, packed, unpacked
from influence_fast.gradients.shard import row_bytes

SHAPES = {"a": (8, 12), "b": (10, 7), "bias": (5, 1)}
KINDS = [(dtype, factors) for dtype in BITS for factors in (None, 1, 2)]


def gradients(rows: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(rows, out * in_, generator=random) for name, (out, in_) in SHAPES.items()}
    # Of every size that a gradient may have.
    return {
        name: values * 10.0 ** torch.randint(-30, 30, (rows, 1), generator=random) for name, values in found.items()
    }


def level(rows: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, out * in_, generator=random) for name, (out, in_) in SHAPES.items()}


@given(st.integers(1, 100), st.integers(0, 5), st.sampled_from([4, 8]), st.integers(0, 2**31), st.integers(-37, 36))
def test_each_number_is_within_half_a_step_of_its_block(n: int, rows: int, bits: int, seed: int, power: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, n, generator=random) * 10.0**power
    values[:, ::5] *= 30
    if rows > 2:
        values[1] = 0
    scale, codes = packed(values, bits)
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (rows, blocks(n)))
    assert codes.shape == (rows, elements(n, bits))
    found, most = unpacked(scale, codes, n, bits), 2 ** (bits - 1) - 1
    for row, back in zip(values.double().split(32, 1), found.double().split(32, 1), strict=True):
        # A bfloat16 has 8 bits, and the scale is rounded up; the smallest scale is 9e-41.
        step = row.abs().amax(1, keepdim=True) / most * (1 + 2.0**-7)
        assert ((row - back).abs() <= step / 2 * (1 + 1e-5) + 1e-40).all()


def test_a_scale_is_the_next_bfloat16_and_codes_reach_their_end() -> None:
    row = torch.tensor([[7.0, -7.0, 3.0, 0.4, 0.6]])
    scale, codes = packed(row, 4)
    assert (scale.tolist(), codes.tolist()) == ([[1.0]], [[15 | 1 << 4, 11 | 8 << 4, 9 | 8 << 4]])
    assert unpacked(scale, codes, 5, 4).tolist() == [[7.0, -7.0, 3.0, 0.0, 1.0]]
    scale, codes = packed(torch.tensor([[7.01, 1.0]]), 4)
    assert scale.item() == 1.0078125
    assert codes.item() & 15 == 15


@pytest.mark.parametrize(("dtype", "factors"), KINDS)
def test_a_store_keeps_them(tmp_path: Path, dtype: str, factors: int | None) -> None:
    data = level(30, 0)
    store = write_store(tmp_path / "s", data, shapes=SHAPES, shard_rows=8, dtype=dtype, factors=factors)
    whole = write_store(tmp_path / "w", data, shapes=SHAPES, shard_rows=8, factors=factors)
    assert store.meta["dtype"] == dtype
    assert repr(store).endswith(f"{dtype})")
    for name in SHAPES:
        near = (store.read(name) - whole.read(name)).norm() / whole.read(name).norm()
        assert 0 < near < (0.01 if dtype == "int8_block" else 0.15)
        assert torch.equal(store.read(name, [9, 2, 29]), store.read(name)[[9, 2, 29]])
        assert torch.equal(store.sqnorm(name), whole.sqnorm(name))
    store.verify()
    width = [store.shards[0].numbers(name) for name in SHAPES]
    assert sum(row_bytes(dtype, w) for w in width) < 0.75 * sum(row_bytes("float32", w) for w in width)


@pytest.mark.parametrize("dtype", BITS)
def test_rows_of_any_length(tmp_path: Path, dtype: str) -> None:
    data = gradients(20, 3)
    store = write_store(tmp_path / "s", data, shapes=SHAPES, dtype=dtype)
    for name, rows in data.items():
        size = rows.double().norm(dim=1)
        assert (
            (store.read(name).double() - rows.double()).norm(dim=1) <= (0.01 if "8" in dtype else 0.15) * size
        ).all()


@pytest.mark.parametrize(("dtype", "factors"), KINDS)
def test_it_lives_and_the_documented_reader_reads_it(tmp_path: Path, dtype: str, factors: int | None) -> None:
    data, more = level(20, 0), level(9, 1)
    settings = {"shapes": SHAPES, "shard_rows": 8, "factors": factors, "dtype": dtype}
    store = write_store(tmp_path / "s", data, **settings)
    behind = write_store(tmp_path / "m", more, **settings)
    expected = {name: torch.cat([store.read(name), behind.read(name)]) for name in SHAPES}
    store = append(tmp_path / "s", more, range(20, 29), **settings)
    store.delete([4, 23])
    kept = [row for row in range(29) if row not in (4, 23)]
    code = re.search(r"plain NumPy::\n\n(.*)\Z", store_format.__doc__ or "", re.S)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(code[1]), names)  # type: ignore[index]
    for _ in range(2):
        for name in SHAPES:
            assert torch.equal(store.read(name), expected[name][kept])
            plain = torch.from_numpy(names["read_store"](tmp_path / "s", name).copy())
            torch.testing.assert_close(plain, store.read(name), rtol=1e-6, atol=1e-6)
        store.compact()
    assert store.meta["dtype"] == dtype
    both = inf.merge_stores([behind, write_store(tmp_path / "n", more, **settings)], tmp_path / "both")
    assert torch.equal(both.read("b"), expected["b"][20:].repeat(2, 1))
    other = write_store(tmp_path / "o", more, shapes=SHAPES, factors=factors)
    with pytest.raises(inf.StoreError, match="another dtype"):
        inf.merge_stores([behind, other], tmp_path / "never")


@pytest.mark.parametrize(("dtype", "factors"), KINDS)
@pytest.mark.parametrize("cosine", [False, True])
def test_scores_and_exact_searches(tmp_path: Path, dtype: str, factors: int | None, cosine: bool) -> None:
    store = write_store(tmp_path / "s", level(500, 0), shapes=SHAPES, shard_rows=90, dtype=dtype, factors=factors)
    queries = level(7, 5)
    matrix = inf.influence(store, queries, "dot")
    for name in SHAPES:
        expected = queries[name].double() @ store.read(name).double().T
        torch.testing.assert_close(matrix.layer(name).double(), expected, rtol=1e-4, atol=1e-4)
    index = inf.InfluenceIndex.build(store, "Flat", "cosine" if cosine else "dot", path=tmp_path / "i")
    for found in (index, inf.InfluenceIndex.load(tmp_path / "i")):
        for layers in (None, ["a"]):
            left, right = (
                torch.cat([side[name].double() for name in layers or SHAPES], 1)
                for side in (queries, {name: store.read(name) for name in SHAPES})
            )
            if cosine:
                left, right = (torch.nn.functional.normalize(side) for side in (left, right))
            best = (left @ right.T).topk(5)
            scores, ids = found.search(queries, 5, layers=layers)
            assert torch.equal(ids, best.indices)
            torch.testing.assert_close(scores.double(), best.values, rtol=1e-5, atol=1e-6)


def test_a_build(tmp_path: Path) -> None:
    model = models.make("bert")
    rows = [{"input_ids": [3 + i, 4, 5 + i], "labels": i % 3} for i in range(10)]
    taken: dict[str, Any] = {"layers": "attention", "projection": "rademacher:8x8", "progress": False}
    for dtype, factors in (("int4", None), ("int8_block", 1)):
        store = inf.build_store(tmp_path / dtype, model, rows, dtype=dtype, factors=factors, **taken)
        assert (
            inf.build_store(tmp_path / dtype, model, rows, dtype=dtype, factors=factors, **taken).digest == store.digest
        )
        with pytest.raises(inf.StoreError, match=f"was built with another dtype: '{dtype}', not 'float32'"):
            inf.build_store(tmp_path / dtype, model, rows, factors=factors, dtype="float32", **taken)
        again = inf.append_store(tmp_path / dtype, model, rows[:3], earlier=rows, progress=False)
        assert torch.equal(again.read(again.layers[0])[10:], again.read(again.layers[0])[:3])


@pytest.mark.parametrize("factors", [None, 1])
def test_damage_is_named_and_earlier_readers_refuse_it(tmp_path: Path, factors: int | None) -> None:
    write_store(tmp_path / "s", level(9, 0), shapes=SHAPES, dtype="int4", factors=factors)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    del manifest["seal"]
    # What a reader that does not know them finds: a dtype that it knows, and a need that it does not.
    assert manifest["dtype"] == "int8"
    assert "block_scales" in manifest["requires"]
    assert manifest["block_scales"] == {"bits": 4, "numbers": 32}
    for change, message in (
        (lambda m: m.update(requires=["rounds"]), "needs a later version of this library, which knows 'rounds'"),
        (lambda m: m["requires"].remove("block_scales"), "damaged"),
        (lambda m: m.pop("block_scales"), "damaged"),
        (lambda m: m.update(dtype="float32"), "damaged"),
        (lambda m: m["block_scales"].update(bits=8), "does not follow|damaged"),
        (lambda m: m["block_scales"].update(bits=3), "bits"),
        (lambda m: m["block_scales"].update(numbers=64), "numbers"),
    ):
        broken = json.loads(json.dumps(manifest))
        change(broken)
        (tmp_path / "s" / "manifest.json").write_bytes(seal(broken))
        with pytest.raises(inf.StoreError, match=message):
            inf.GradientStore.open(tmp_path / "s").read("a")
