"""Approximate search by partitions of similar length."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import gradients, write_store

import influence_fast as inf
from influence_fast.search import norm_partitions


@pytest.mark.parametrize("factory", ["IVF8,Flat", "HNSW16", "SQ8", "PCA8,Flat"])
def test_approximate_indexes_measure_their_recall(tmp_path: Path, store: inf.GradientStore, factory: str) -> None:
    queries = gradients(9, 1)
    index = inf.InfluenceIndex.build(store, factory, queries=queries)
    assert 0 < index.recall <= 1
    assert f"recall@10 {index.recall:.3f}" in repr(index)
    index.save(tmp_path / "i")
    again = inf.InfluenceIndex.load(tmp_path / "i")
    assert again.recall == index.recall
    for one, other in zip(index.search(queries, 5), again.search(queries, 5), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "HNSW16"])
def test_long_rows_are_found_by_inner_product(tmp_path: Path, factory: str) -> None:
    random = torch.Generator().manual_seed(3)
    parts, longest = [], torch.empty(0)
    for number, rows in enumerate((8000, 500)):
        lengths = (1.5 * torch.randn(rows, 1, generator=random)).exp() * (1 + 9 * number)
        longest = torch.cat([longest, lengths[:, 0]])
        part = {name: lengths * values for name, values in gradients(rows, 4 + number).items()}
        parts.append(write_store(tmp_path / f"part-{number}", part, shard_rows=3000))
    index = inf.InfluenceIndex.build(parts[0], factory, path=tmp_path / "index")
    index.add(parts[1])
    index.save(tmp_path / "grown")
    queries = gradients(40, 6)
    every = {name: torch.cat([part.read(name) for part in parts]) for name in queries}
    true = (torch.cat(list(queries.values()), 1) @ torch.cat(list(every.values()), 1).T).topk(10).indices
    assert longest[true].median() > 3 * longest.median()
    for found in (index, inf.InfluenceIndex.load(tmp_path / "grown")):
        got = found.search(queries, 10)[1]
        assert (got[:, :, None] == true[:, None]).any(2).float().mean() > 0.95


def test_missing_answers_never_become_ids(store: inf.GradientStore) -> None:
    index = inf.InfluenceIndex.build(store, "IVF32,Flat")
    index.meta["breadth"] = 1
    [partition] = index._partitions
    assert (partition.search(gradients(4, 2)["a"].repeat(1, 3)[:, :16].numpy(), 200, 1) == -1).any()
    _, ids = index.search(gradients(4, 2), 200)
    assert ids.min() >= 0
    assert all(len(set(row)) == 200 for row in ids.tolist())


@pytest.mark.parametrize(("enough", "begin"), [(1, 1), (3, 1), (37, 1), (37, 64), (900, 1)])
def test_a_search_is_no_wider_than_it_has_to_be(monkeypatch: pytest.MonkeyPatch, enough: int, begin: int) -> None:
    true, asked = torch.arange(10).expand(4, 10), []

    def find(partitions: Any, rows: Any, queries: Any, k: int, breadth: int, cosine: bool) -> tuple[None, torch.Tensor]:
        asked.append(breadth)
        # One query of four lacks a row of ten: 0.975, less than a standard error above 0.96.
        return None, torch.where((torch.arange(40).view(4, 10) > 0) | (breadth >= enough), true, -1)

    monkeypatch.setattr(norm_partitions, "find_rows", find)
    monkeypatch.setattr(norm_partitions, "best_rows", lambda *_: (None, true))
    breadth, share = norm_partitions.tune([types.SimpleNamespace(limit=500)], None, None, 10, begin, True, 0.96)
    if enough > 500:
        assert (breadth, share) == (500, 0.975)
    else:
        assert enough <= breadth <= 1 + 9 * enough // 8
        assert share == 1
        assert len(asked) < 16


def test_threads_share_one_query_or_many(store: inf.GradientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = inf.InfluenceIndex.build(store, "IVF4,SQ8"), gradients(3, 2)
    monkeypatch.setattr(norm_partitions.load_faiss(), "omp_get_max_threads", lambda: 3)
    [partition] = index._partitions
    scores, ids = index.search(queries, 5)
    assert norm_partitions._inner(partition.index).parallel_mode == 0
    one = index.search({name: values[:1] for name, values in queries.items()}, 5)
    assert norm_partitions._inner(partition.index).parallel_mode == 1
    assert torch.equal(one[0], scores[:1])
    assert torch.equal(one[1], ids[:1])
