"""Layer group x method x aggregation in one call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from stores import write_store

import influence_fast as inf
from influence_fast.evaluation.rankings import baselines, groups_by_name


def test_the_whole_table_in_one_call(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    noise = torch.arange(60) % 4 == 0
    layers = ["h.0.attn.q", "h.1.attn.q", "h.1.mlp.up", "wte_embed", "classifier"]
    sign = 1 - 2 * noise.float()

    # In steps of an eighth inner products are exact, and so are the ranks that the table is held against.
    def draw(rows: int) -> torch.Tensor:
        return (8 * torch.randn(rows, 3, generator=random)).round() / 8

    train = {name: draw(60) + 2 * sign[:, None] for name in layers}
    train["classifier"] = draw(60)
    queries = {name: draw(8) + 2 for name in layers}
    stores = (
        write_store(tmp_path / "t", train, columns={"loss": noise.float() * torch.rand(60, generator=random)}),
        write_store(tmp_path / "q", queries, columns={"correct": torch.arange(8) > 2}),
    )
    keys = [("dot", "all", "mean"), ("cosine", "head", "rank-c"), ("loss", "", "")]
    found = inf.evaluate(
        *stores,
        noise,
        matrices={"mine": {"x": torch.randn(2, 60, generator=random)}},
        accuracy=dict(zip(keys, (0.9, 0.5, 0.8), strict=True)),
    )
    cells = {(row["method"], row["group"], row["aggregation"]): row for row in found.rows}
    assert [row["method"] for row in found.rows[:3]] == ["random", "loss", "self-influence"]
    assert {g for m, g, _ in cells if m == "dot"} == {
        "embedding",
        "attention",
        "mlp",
        "head",
        "block 0",
        "block 1",
        "all",
    }
    assert {a for m, _, a in cells if m == "dot"} == {"mean", "rank-c", "vote-c"}
    assert {(g, a) for m, g, a in cells if m == "mine"} == {
        (g, a) for g in ("x", "all") for a in ("mean", "rank", "vote")
    }
    expected = inf.aggregate(inf.influence(*stores), "vote-c", layers=groups_by_name(layers)["attention"])
    assert cells["dot", "attention", "vote-c"]["auc_ndr"] == pytest.approx(inf.ndr_auc(expected, noise))
    assert found.best["auc_ndr"] == max(row["auc_ndr"] for row in found.rows[3:])
    assert cells["dot", "attention", "mean"]["over_random"][0] > 0.2
    assert "Not better than a random order" in found.warnings[0]
    assert "mine x mean" in found.warnings[0] or "dot head" in found.warnings[0]
    assert set(found.correlation) == {"ndr@10", "ndr@20", "ndr@30", "auc_ndr", "roc_auc"}
    reached = [0.9, 0.5, 0.8]
    assert found.correlation["auc_ndr"] == pytest.approx(
        spearmanr([cells[k]["auc_ndr"] for k in keys], reached).statistic
    )
    assert set(baselines(train)) == {"random", "self-influence"}
