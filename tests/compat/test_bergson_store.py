"""bergson's gradient stores against files that are written here byte by byte, and against bergson where it is installed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import influence_fast as inf
from influence_fast import InputError, StoreError
from influence_fast.compat.bergson import export_store, import_store, open_store

SIZES = {"a": 6, "b.c": 4}
ROWS = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
INFO = {"attribute_tokens": False, "num_items": 7, "num_grads": 7, "grad_sizes": SIZES, "base_dtype": "float32"}
QUERIES = {"a": torch.ones(2, 6), "b.c": torch.arange(8.0).view(2, 4)}


def written(folder: Path, rows: Tensor = ROWS, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "gradients.bin").write_bytes(rows.contiguous().view(torch.uint8).numpy().tobytes())
    info = {name: value for name, value in {**INFO, **changes}.items() if value is not None}
    (folder / "info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def literal(rows: Tensor) -> Tensor:
    return QUERIES["a"] @ rows[:, :6].T + QUERIES["b.c"] @ rows[:, 6:].T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_store_is_gradients_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    store = open_store(written(tmp_path / "s", ROWS.to(dtype), base_dtype=str(dtype).removeprefix("torch.")))
    assert (store.layers, store.dims, store.rows, store.samples, store.offsets) == (["a", "b.c"], SIZES, 7, 7, None)
    assert torch.equal(store["b.c"], ROWS.to(dtype)[:, 6:])
    scores = inf.influence(store, QUERIES)
    found = sum(scores.layer(name) for name in store)
    torch.testing.assert_close(found, literal(ROWS.to(dtype).float()), check_dtype=False)


def test_old_stores_have_a_dtype_of_fields(tmp_path: Path) -> None:
    for number, (formats, dtype) in enumerate(
        [(["(6,)<f4", "(4,)<f4"], torch.float32), (["float16"], torch.float16), (["<f8"], torch.float64)]
    ):
        changes = {"base_dtype": None, "dtype": {"names": ["a", "b.c"], "formats": formats}}
        store = open_store(written(tmp_path / str(number), ROWS.to(dtype), **changes))
        assert torch.equal(store["a"], ROWS.to(dtype)[:, :6])


def test_tokens_are_added_to_items_and_searched(tmp_path: Path) -> None:
    folder = written(tmp_path / "s", attribute_tokens=True, num_items=4)
    offsets = np.array([0, 2, 2, 3, 7])
    np.save(folder / "offsets.npy", offsets)
    store = open_store(folder)
    assert (store.samples, store.rows) == (4, 7)
    items = torch.stack([ROWS[low:high].sum(0) for low, high in itertools.pairwise(offsets)])
    torch.testing.assert_close(store.per_item("b.c"), items[:, 6:])
    torch.testing.assert_close(store.per_item("a", range(1, 3)), items[1:3, :6])
    ours = import_store(store, tmp_path / "ours", ids=["p", "q", "r", "s"])
    torch.testing.assert_close(ours.read("a"), items[:, :6])
    found, ids = inf.InfluenceIndex.build(ours).search(QUERIES, k=4)
    best, order = literal(items).topk(4)
    torch.testing.assert_close(found, best, check_dtype=False)
    assert ids == [["pqrs"[i] for i in row] for row in order.tolist()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read(tmp_path: Path, dtype: str) -> None:
    gradients = {"a": ROWS[:, :6], "b.c": ROWS[:, 6:]}
    out = tmp_path / "out"
    export_store(gradients, out, dtype=dtype, names={"b.c": "z"}, offsets=[0, 3, 7], projection="rademacher:2x2:seed5")
    store = open_store(out)
    assert (store.layers, store.samples, store.projection) == (["a", "z"], 2, inf.Projection("rademacher", (2, 2), 5))
    assert torch.equal(store["z"], ROWS[:, 6:].to(getattr(torch, dtype)))
    bits = ROWS.to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()
    assert (out / "gradients.bin").read_bytes() == bits
    ours = import_store(written(tmp_path / "s"), tmp_path / "ours")
    export_store(ours, tmp_path / "again")
    assert (tmp_path / "again/gradients.bin").read_bytes() == (tmp_path / "s/gradients.bin").read_bytes()
    assert json.loads((tmp_path / "again/info.json").read_text(encoding="utf-8")) == INFO


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected a gradient store of bergson"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="expected 308 bytes"):
        open_store(written(tmp_path / "short", grad_sizes={"a": 11}))
    with pytest.raises(StoreError, match="got 'int8'"):
        open_store(written(tmp_path / "int", base_dtype="int8"))
    folder = written(tmp_path / "tokens", attribute_tokens=True)
    np.save(folder / "offsets.npy", np.array([0, 9]))
    with pytest.raises(StoreError, match="to the 7 rows"):
        open_store(folder)
    with pytest.raises(InputError, match="for each of the 7 items"):
        import_store(written(tmp_path / "s"), tmp_path / "ours", ids=[1])
    for arguments, message in (
        ({"dtype": "int8"}, "dtype"),
        ({"names": {"x": "y"}}, "names"),
        ({"names": {"a": "b.c"}}, "two layers"),
        ({"offsets": [0, 4]}, "offsets"),
    ):
        with pytest.raises(InputError, match=message):
            export_store(dict(open_store(tmp_path / "s")), tmp_path / "out", **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds a store"):
        export_store(dict(open_store(tmp_path / "s")), tmp_path / "s")


def test_bergson_reads_and_searches_what_we_write(tmp_path: Path) -> None:
    data = pytest.importorskip("bergson.data")
    attributor = pytest.importorskip("bergson.query.attributor")
    gradients = {"a": ROWS[:, :6], "b.c": ROWS[:, 6:]}
    export_store(gradients, tmp_path / "s", projection="rademacher:2x2")
    assert np.array_equal(data.load_gradients(tmp_path / "s"), ROWS.numpy())
    scores, rows = attributor.Attributor(tmp_path / "s").search(QUERIES, k=3)
    best, order = literal(ROWS).topk(3)
    torch.testing.assert_close(scores, best)
    assert torch.equal(rows, order)
    theirs = data.create_index(tmp_path / "theirs", num_grads=7, grad_sizes=SIZES, dtype=np.float32)
    theirs[:] = ROWS.numpy()
    theirs.flush()
    assert torch.equal(open_store(tmp_path / "theirs")["a"], ROWS[:, :6])
