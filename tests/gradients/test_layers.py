"""Layer selection on the architectures that matter, plain and adapted."""

from __future__ import annotations

from itertools import chain

import models
import pytest
import torch
from torch import nn

import influence_fast as inf
from influence_fast.gradients.layers import block_of, layer_groups


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return models.make("bert")


def test_kinds_partition_the_model(bert: nn.Module) -> None:
    kinds = [inf.select_layers(bert, kind) for kind in ("embedding", "attention", "mlp", "head")]
    assert sorted(chain.from_iterable(kinds)) == sorted(inf.select_layers(bert, "all"))
    assert [len(k) for k in kinds] == [3, 16, 8, 2]
    assert kinds[3] == ["bert.pooler.dense", "classifier"]


@pytest.mark.parametrize(
    ("name", "task", "attention", "embedding", "head"),
    [
        ("roberta", "classification", 16, 3, ["classifier.dense", "classifier.out_proj"]),
        ("gpt2", "causal", 8, 2, ["lm_head"]),
        ("llama", "causal", 16, 1, ["lm_head"]),
        ("qwen2", "classification", 16, 1, ["score"]),
    ],
)
def test_architectures(name: str, task: str, attention: int, embedding: int, head: list[str]) -> None:
    model = models.make(name, task)
    assert len(inf.select_layers(model, "attention")) == attention
    assert len(inf.select_layers(model, "embedding")) == embedding
    assert inf.select_layers(model, "head") == head


def test_ranges_and_quarters(bert: nn.Module) -> None:
    def blocks(spec: str) -> list[int]:
        return sorted({block_of(name) for name in inf.select_layers(bert, spec)})

    assert blocks("attention[1:3]") == blocks("attention[middle]") == [1, 2]
    assert [blocks(f"mlp[q{q}]") for q in (1, 2, 3, 4)] == [[0], [1], [2], [3]]
    assert blocks("all[-1:]") == blocks("all[-1]") == blocks("all[3]") == [3]
    assert blocks("attention[:]") == [0, 1, 2, 3]


def test_quarters_of_six_blocks() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(2, 2)}) for _ in range(6))})
    assert inf.select_layers(model, "attention[middle]") == [f"layers.{b}.attn" for b in (2, 3, 4)]


def test_lists_names_and_patterns(bert: nn.Module) -> None:
    assert inf.select_layers(bert, "head,classifier,embedding")[-2:] == ["bert.pooler.dense", "classifier"]
    assert inf.select_layers(bert, ["classifier", "bert.pooler.dense"]) == ["bert.pooler.dense", "classifier"]
    assert len(inf.select_layers(bert, r"re:.*\.(query|key)")) == 8
    assert inf.select_layers(bert, "re:classifier") == ["classifier"]


def test_lora() -> None:
    model = models.make("bert", lora=True)
    lora = inf.select_layers(model, "lora")
    assert len(lora) == 16
    assert all(".lora_A.default" in name or ".lora_B.default" in name for name in lora)
    assert set(lora) < set(inf.select_layers(model, "attention"))
    assert inf.select_layers(model, "lora[q1]") == lora[:4]
    assert inf.select_layers(model, "head")[-1] == "base_model.model.classifier.modules_to_save.default"
    assert not any("original_module" in name for name in inf.select_layers(model))


def test_groups_cover_the_layers(bert: nn.Module) -> None:
    groups = layer_groups(bert, inf.select_layers(bert))
    assert list(groups) == ["embedding", *(f"attention q{q}" for q in (1, 2, 3, 4)), "mlp", "head", "all"]
    assert sum(len(g) for g in groups.values()) == 2 * len(groups["all"])
    assert list(layer_groups(bert, ["classifier"])) == ["head", "all"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope", r"'nope' is neither a kind \(all, attention.*classifier"),
        (["classifer"], r"no layer is named 'classifer'; there are .*layer\.\{0\.\.3\}\.attention\.self\.query"),
        ("lora", "'lora' matches nothing"),
        ("attention[9:]", "lies in no block"),
        ("attention[x]", "needs a range of blocks"),
        ("attention[]", "needs a range of blocks"),
        ("re:(", "no regular expression"),
        ("re:zzz", "matches nothing"),
        ([], "the list is empty"),
        ("attention,,head", "'' is neither"),
    ],
)
def test_errors_list_what_there_is(bert: nn.Module, spec: object, message: str) -> None:
    with pytest.raises(inf.InputError, match=message):
        inf.select_layers(bert, spec)


def test_empty_weights_are_no_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    model.extra = nn.Embedding(4, 0)
    model.table = nn.Parameter(torch.empty(0, 2))
    assert inf.select_layers(model, "trained") == ["0", "0.bias"]
