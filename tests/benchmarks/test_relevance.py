"""A query's class under LoRA, at toy size: LoRA alone is trained, and layers are put together for each query alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from audits import write_rows
from click.testing import CliRunner, Result
from torch import nn

import influence_fast as inf
from benchmarks import protocol, relevance
from benchmarks.generative import SETS
from benchmarks.training import causal_model, with_lora


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(relevance.main, [str(argument) for argument in arguments])


def test_layers_are_put_together_for_each_query_as_the_library_does() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, 30, generator=random).round(decimals=1)
    found = relevance.by_query(values)
    assert set(found) == set(relevance.AGGREGATIONS)
    whole = {str(i): layer for i, layer in enumerate(values)}
    for query in range(4):
        for name in ("mean", "rank", "vote"):
            theirs = inf.aggregate(whole, name, queries=[query], fraction=relevance.FRACTION)
            apart = (found[name][query] - theirs).abs()
            assert float(apart.max()) < (0.25 if name == "vote" else 1e-6)
            # Those that differ there are in the same order here.
            lower = theirs[:, None] < theirs[None] - 1e-6
            assert bool((found[name][query][:, None] < found[name][query][None])[lower].all())
    mirrored = relevance.by_query(-values)
    torch.testing.assert_close(found["vote for"], 29 / 120 - mirrored["vote"])


def test_gradients_of_lora_on_an_embedding_are_those_of_autograd(tmp_path: Path) -> None:
    row = {"input_ids": [1, 5, 6, 5, 2], "labels": [-100, -100, 6, 5, 2]}
    settings = {"epochs": 0}
    with protocol.Progress() as progress:
        model = with_lora(causal_model(20, [row], tmp_path / "x.pt", progress, 0, settings)[0], 0).eval()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all("lora_" in name for name in trained)
    for value in trained.values():
        nn.init.normal_(value)
    layers = inf.select_layers(model, "trained")
    assert len(layers) == len(trained)
    store = inf.build_store(tmp_path / "store", model, [row, row], layers, "identity", progress=False)
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:])).backward()
    for layer in layers:
        value = trained.get(layer, trained.get(f"{layer}.weight"))
        assert value is not None
        assert value.grad is not None
        found = store.read(layer, [1])[0]
        torch.testing.assert_close(found, value.grad.flatten(), rtol=1e-3, atol=1e-4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for task in SETS:
        (tmp_path / "data" / task).mkdir(parents=True)
        for side, count in (("train", 24), ("test", 6)):
            rows = [
                {"prompt": f"add {i} and {i} -> ", "class_id": i % 3, "answer": 2 * i, "reason": f"twice {i}."}
                for i in range(count)
            ]
            if task == "grammars":
                rows = [{name: value for name, value in row.items() if name != "reason"} for row in rows]
            write_rows(tmp_path / "data" / task / f"{side}.jsonl", rows)
    return tmp_path / "data"


def test_a_run_of_both_data_sets(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevance, "PROJECTION", "sjlt:64")
    out = tmp_path / "out.json"
    given = ["--data", data, "--work", tmp_path / "work", "--out", out, "--seeds", 1, "--threads", 1]
    given += ["--base-epochs", 1, "--epochs", 1]
    assert invoke(*given, "--seconds", 0).exit_code == 3
    result = invoke(*given)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert [run["task"] for run in document["runs"]] == list(SETS)
    run = document["runs"][0]
    assert {relevance.place_of(row["layer"]) for row in run["relevance"]} == {
        "embedding", "block 0", "block 1", "block 2", "block 3", "head",
    }  # fmt: skip
    assert {row["group"] for row in run["groups"]} == {
        "embedding", "block 0", "block 1", "block 2", "block 3", "head", "middle", "all",
    }  # fmt: skip
    assert all(0 <= row[metric] <= 1 for row in run["groups"] for metric in relevance.METRICS)
    assert "wrote" in invoke(*given).output
    assert json.loads(out.read_text())["runs"] == document["runs"]
    document["runs"] += [{**run, "seed": 1} for run in document["runs"]]
    out.write_text(json.dumps(document))
    page = tmp_path / "page.md"
    page.write_text("<!-- relevance -->\n<!-- end of relevance -->\n")
    assert invoke("--out", out, "--page", page).exit_code == 0
    text = page.read_text()
    auc = np.mean([row["roc_auc"] for row in relevance.of_group([run], "all", "rank", "dot")])
    assert f"| all, rank | {auc:.3f} /" in text
    assert "nan" not in text
