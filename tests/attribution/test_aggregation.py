"""Aggregation against literal definitions."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from scipy.stats import rankdata
from stores import write_store
from torch import Tensor

import influence_fast as inf
from influence_fast import _distributed as processes
from influence_fast.evaluation.metrics import order

L, M, N = 3, 5, 12


def values(seed: int = 0, shape: tuple[int, int, int] = (L, M, N), levels: int = 6) -> dict[str, Tensor]:
    """Few levels, so that ties are common."""
    random = torch.Generator().manual_seed(seed)
    return {f"l{i}": torch.randint(levels, shape[1:], generator=random).float() - 2 for i in range(shape[0])}


def literal(
    data: dict[str, Tensor], base: str, queries: list[int], fraction: float = 0.2, trim: float = 0.1
) -> np.ndarray:
    cube = np.stack([v.double().numpy()[queries] for v in data.values()])
    n = cube.shape[-1]
    ranks = np.stack([[rankdata(row) - 1 for row in layer] for layer in cube])
    flat = cube.reshape(-1, n)
    if base == "mean":
        return flat.mean(0)
    if base == "rank":
        return ranks.reshape(-1, n).mean(0)
    if base == "vote":
        return -np.maximum(round(fraction * n) - ranks, 0).sum((0, 1))
    if base == "min":
        return flat.min(0)
    if base == "median":
        return np.median(flat, 0)
    cut = int(trim * len(flat))
    return np.sort(flat, 0)[cut : len(flat) - cut].mean(0)


@pytest.mark.parametrize("base", ["mean", "rank", "vote", "min", "median", "trimmed"])
def test_definitions(base: str) -> None:
    data, correct = values(), torch.tensor([True, False, True, True, False])
    everything = literal(data, base, [0, 1, 2, 3, 4])
    np.testing.assert_allclose(inf.aggregate(data, base), everything, rtol=1e-6)
    kept = literal(data, base, [0, 2, 3])
    for name, queries in ((f"{base}-c", correct), (base, correct), (base, [0, 2, 3])):
        np.testing.assert_allclose(inf.aggregate(data, name, queries=queries), kept, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 30), st.floats(0.02, 1), st.integers(0, 99))
def test_vote_and_rank_of_any_shape(layers: int, m: int, n: int, fraction: float, seed: int) -> None:
    data = values(seed, (layers, m, n))
    np.testing.assert_allclose(inf.aggregate(data, "rank"), literal(data, "rank", list(range(m))), rtol=1e-6)
    if round(fraction * n):
        got = inf.aggregate(data, "vote", fraction=fraction)
        np.testing.assert_array_equal(got, literal(data, "vote", list(range(m)), fraction))


def test_many_at_once_equal_one_at_a_time() -> None:
    data, correct = values(), torch.tensor([False, True, True, False, True])
    groups = {"first": ["l0"], "rest": ["l1", "l2"], "weighted": {"l0": 3.0, "l2": 1.0}}
    methods = ["mean", "rank", "vote", "mean-c", "rank-c", "vote-c"]
    many = inf.aggregate_many(data, methods, groups, queries=correct)
    for group, layers in groups.items():
        for method in methods:
            torch.testing.assert_close(many[group][method], inf.aggregate(data, method, queries=correct, layers=layers))
    expected = (3 * data["l0"][correct].mean(0) + data["l2"][correct].mean(0)) / 4
    torch.testing.assert_close(many["weighted"]["mean"].float(), expected)


def test_plain_and_correct_forms_in_one_pass() -> None:
    train, queries = integers(8), integers(6, seed=1)
    matrix = inf.influence(train, queries)
    matrix.query_correct = torch.tensor([True, False, True, True, False, True])
    both = inf.aggregate_many(matrix, ["vote", "vote-c", "rank"])["all"]
    dense = {name: matrix.layer(name) for name in matrix.layers}
    torch.testing.assert_close(both["vote"], inf.aggregate(dense, "vote"))
    torch.testing.assert_close(both["vote-c"], inf.aggregate(dense, "vote", queries=matrix.query_correct))


def test_order_breaks_ties_by_the_second_score_and_then_by_row() -> None:
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    assert order(scores).tolist() == [1, 4, 0, 2, 3]
    assert order(scores, torch.tensor([5.0, 2.0, 3.0, 3.0, 1.0])).tolist() == [4, 1, 2, 3, 0]


def test_lowest_is_most_harmful() -> None:
    data = {"a": torch.randn(7, 20)}
    data["a"][:, 13] = -9
    for method in inf.aggregate_many(data, ["mean", "rank", "vote", "min", "median", "trimmed"])["all"].values():
        assert method.argmin() == 13


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"method": "borda"}, r"method: expected one of mean, rank, vote.*got 'borda'"),
        ({"fraction": 0.0}, "fraction: expected"),
        ({"method": "vote", "fraction": 0.01}, "0.01 of 12 samples rounds to no vote"),
        ({"trim": 0.5}, "trim: expected"),
        ({"layers": ["x"]}, "no layer is named 'x'; there are l0, l1, l2"),
        ({"layers": []}, "at least one layer"),
        ({"layers": {"l0": -1.0}}, "not negative"),
        ({"layers": {"l0": 1.0, "l1": 2.0}, "method": "median"}, "weights have no meaning for 'median'"),
        ({"method": "rank-c"}, "needs to know which queries"),
        ({"queries": torch.zeros(M, dtype=torch.bool)}, "none is left"),
        ({"queries": [M]}, "numbers from 0 to 4"),
        ({"queries": torch.ones(3, dtype=torch.bool)}, r"a boolean mask \(5,\)"),
    ],
)
def test_errors(settings_: dict, message: str) -> None:
    with pytest.raises(inf.InputError, match=message):
        inf.aggregate(values(), **settings_)


@pytest.mark.parametrize("method", ["mean", "rank", "vote", "min"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(method: str, bad: float) -> None:
    data = values()
    data["l1"][3, 2] = bad
    with pytest.raises(inf.InputError, match="layer 'l1' has NaN or infinity for training row 2"):
        inf.aggregate(data, method)


def integers(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Gradients whose inner products are exact in float32: they rank alike whatever the order of the sums."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randint(-40, 41, (rows, dim), generator=random).float() for name, dim in (("a", 6), ("b", 10))}


def stored(tmp_path: Path, rows: int = 300) -> tuple[inf.GradientStore, dict[str, Tensor]]:
    return write_store(tmp_path / "s", integers(rows), shard_rows=64), integers(25, seed=1)


@pytest.mark.parametrize("method", ["dot", "cosine", "datainf"])
def test_any_memory_gives_the_same_scores(tmp_path: Path, method: str) -> None:
    store, queries = stored(tmp_path)
    mask = torch.arange(25) % 3 == 0
    # Ranks jump where two rows are as near to each other as rounding: only exact products have the same ones.
    names = ["mean", "mean-c", "median", *(("rank", "vote", "rank-c", "vote-c") if method == "dot" else ())]
    found = []
    for memory in (76 * 300, 120 * 300, "1GiB"):
        matrix = inf.influence(store, queries, method, memory=memory)
        matrix.query_correct = mask
        found.append(inf.aggregate_many(matrix, names)["all"])
    dense = {name: matrix.layer(name) for name in matrix.layers}
    for method in names:
        expected = inf.aggregate(dense, method, queries=mask if method.endswith("-c") else None)
        for scores in found:
            torch.testing.assert_close(scores[method], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(inf.InputError, match="memory: 22799 bytes hold no row of 300 samples; this takes 22800"):
        inf.aggregate(inf.influence(store, queries, memory=76 * 300 - 1), "rank")
    for bad in ("2 apples", 0, True, "GiB"):
        with pytest.raises(inf.InputError, match="memory: expected bytes, or text such as 2GiB"):
            inf.influence(store, queries, memory=bad)


def test_the_mean_forms_no_row_of_influence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, queries = stored(tmp_path)
    expected = inf.aggregate(inf.influence(store, queries), "mean")
    monkeypatch.setattr(inf.InfluenceMatrix, "_rows", None)
    found = inf.aggregate(inf.influence(store, queries, memory=1), "mean")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_a_stopped_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = importlib.import_module("influence_fast.attribution.aggregation")
    monkeypatch.setattr(room, "_SAVE_SECONDS", 0)
    # Memory for five rows of influence, then for ten.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    store, queries = stored(tmp_path)
    names = ["rank", "vote", "mean"]
    expected = inf.aggregate_many(inf.influence(store, queries, memory=300 * 92), names)["all"]
    computed: list[tuple[str, int]] = []
    piece = inf.InfluenceMatrix.piece

    def stopping(matrix: inf.InfluenceMatrix, name: str, rows: slice) -> Tensor:
        if len(computed) == stop:
            raise KeyboardInterrupt
        computed.append((name, rows.start))
        return piece(matrix, name, rows)

    monkeypatch.setattr(inf.InfluenceMatrix, "piece", stopping)
    stop = 7
    with pytest.raises(KeyboardInterrupt):
        inf.aggregate_many(inf.influence(store, queries, memory=300 * 92), names, checkpoint=tmp_path / "c")
    with pytest.raises(inf.StoreError, match="partial sums of another job"):
        inf.aggregate_many(inf.influence(store, queries, "cosine"), names, checkpoint=tmp_path / "c")
    # What is done decides what is left out: another number there is seen.
    partial = tmp_path / "c" / "partial.safetensors"
    raw = partial.read_bytes()
    at = next(i for i in range(raw.index(b"done"), len(raw)) if raw[i : i + 1].isdigit())
    partial.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(inf.StoreError, match="damaged partial sums"):
        inf.aggregate_many(inf.influence(store, queries, memory=300 * 92), names, checkpoint=tmp_path / "c")
    partial.write_bytes(raw)
    stop = 100
    # Blocks of another size may follow.
    found = inf.aggregate_many(inf.influence(store, queries, memory=300 * 112), names, checkpoint=tmp_path / "c")["all"]
    assert len(computed) < 14
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12 * float(expected[name].abs().max()))
    assert not list((tmp_path / "c").iterdir())
    (tmp_path / "c" / "partial.safetensors").write_bytes(b"nothing")
    with pytest.raises(inf.StoreError, match="damaged partial sums"):
        inf.aggregate(inf.influence(store, queries), "rank", checkpoint=tmp_path / "c")
    with pytest.raises(inf.InputError, match="checkpoint: needs an InfluenceMatrix"):
        inf.aggregate(values(), "rank", checkpoint=tmp_path / "d")


def score_together(folder: Path) -> None:
    with processes.joined():
        stores = (inf.GradientStore.open(folder / name) for name in "tq")
        matrix = inf.influence(*stores, "dot", memory=12_000)
        found = inf.aggregate_many(matrix, ["mean", "rank", "vote", "median"], together=True)["all"]
        with pytest.raises(inf.InputError, match="checkpoint: expected None"):
            inf.aggregate_many(matrix, ["rank"], checkpoint=folder, together=True)
        torch.save(found, folder / f"found-{processes.here()[0]}.pt")


def test_processes_share_layers_and_queries(tmp_path: Path) -> None:
    # Products of integers are exact in any order, so in blocks of any size and with any number of threads.
    data = [
        {
            f"l{i}": torch.randint(-99, 99, (n, 6), generator=torch.Generator().manual_seed(n + i)).float()
            for i in range(2)
        }
        for n in (40, 9)
    ]
    train, queries = (write_store(tmp_path / name, rows) for name, rows in zip("tq", data, strict=True))
    log = tmp_path / "log"
    assert run_ranks(score_together, tmp_path, log=log, ranks=3) == 0, log.read_text()
    expected = inf.aggregate_many(inf.influence(train, queries, "dot"), ["mean", "rank", "vote", "median"])["all"]
    for rank in range(3):
        found = torch.load(tmp_path / f"found-{rank}.pt")
        for name in ("rank", "vote", "median"):
            assert torch.equal(found[name], expected[name]), name
        torch.testing.assert_close(found["mean"], expected["mean"], rtol=1e-12, atol=1e-15)
