"""What a build computes is asked again whenever it goes on: model, adapters, config, loss, tokenizer, and two rows."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import models
import pytest
import torch
from audits import tokenizer
from stores import gradients, write_store
from torch import Tensor, nn

import influence_fast as inf
from influence_fast import _records
from influence_fast.gradients.differences import best_rows, difference, probe_difference
from influence_fast.gradients.identity import identity_of, probe_of

SAMPLES = models.rows(count=6)


def scaled(network: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits / temperature
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def closed_over(weights: Tensor):
    def weighted(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], weights, reduction="none")

    return weighted


class Carries:
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return scaled(network, batch, self.temperature)

    def method(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return scaled(network, batch, self.temperature)


def build(path: Path, model: nn.Module, **settings) -> inf.GradientStore:
    given = {"layers": "head", "projection": "identity", "progress": False, **settings}
    return inf.build_store(path, model, SAMPLES, **given)


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (
            functools.partial(scaled, temperature=1.0),
            functools.partial(scaled, temperature=5.0),
            "temperature was '1.0'",
        ),
        (functools.partial(scaled, temperature=1.0), functools.partial(scaled, temperature=1 + 1e-12), "temperature"),
        (closed_over(torch.ones(3)), closed_over(torch.tensor([1.0, 1.0, 1.1])), "weights was"),
        (Carries(1.0), Carries(2.0), "self.temperature"),
        (Carries(1.0).method, Carries(2.0).method, "self.temperature"),
        (lambda m, b: scaled(m, b), lambda m, b: 1.00001 * scaled(m, b), "its code differs"),
    ],
)
def test_a_loss_is_its_code_and_what_is_bound_to_it(tmp_path: Path, first, second, what: str) -> None:
    model = models.make("bert")
    kept = build(tmp_path / "s", model, loss=first).read("classifier")
    with pytest.raises(inf.StoreError, match=f"another computation.*{what}"):
        build(tmp_path / "s", model, loss=second)
    assert torch.equal(build(tmp_path / "s", model, loss=first).read("classifier"), kept)


def test_equal_losses_of_another_process_are_the_same() -> None:
    """Nothing of addresses, files or lines is in it."""
    model = models.make("bert")
    for make in (
        lambda: functools.partial(scaled, temperature=2.0),
        lambda: closed_over(torch.ones(3)),
        lambda: Carries(2.0),
        lambda: functools.lru_cache(scaled),
        lambda: {"a": functools.partial(functools.partial(scaled, temperature=1.0), temperature=3.0)}["a"],
    ):
        assert identity_of(model, make()) == identity_of(model, make())


def test_what_a_loss_names_in_its_module_belongs_to_it(tmp_path: Path) -> None:
    text = "import torch\nFACTOR = {factor}\ndef helper(x): return x * {inner}\ndef loss(m, b): return helper(FACTOR * b)\n"

    def made(factor: float, inner: int):
        names: dict = {"__name__": "own"}
        exec(compile(text.format(factor=factor, inner=inner), "own.py", "exec"), names)
        return names["loss"]

    model = models.make("bert")
    base = identity_of(model, made(1.0, 2))
    assert identity_of(model, made(1.0, 2)) == base
    assert "global FACTOR" in str(difference(base, identity_of(model, made(2.0, 2))))
    assert "code" in str(difference(base, identity_of(model, made(1.0, 3))))


def test_a_model_is_more_than_its_weights(tmp_path: Path) -> None:
    model = models.make("bert", lora=True)
    layer = ["base_model.model.classifier.modules_to_save.default"]
    build(tmp_path / "s", model, layers=layer)
    stronger = copy.deepcopy(model)
    for module in stronger.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 1.0001
    with pytest.raises(inf.StoreError, match=r"adapters: default was.*scale 1,.*scale 1\.0001"):
        build(tmp_path / "s", stronger, layers=layer)
    other = copy.deepcopy(model)
    other.base_model.model.config.layer_norm_eps = 1e-6
    with pytest.raises(inf.StoreError, match="config: layer_norm_eps was 1e-12, is 1e-06"):
        build(tmp_path / "s", other, layers=layer)
    # What changes no number is no difference.
    same = copy.deepcopy(model)
    same.base_model.model.config.hidden_dropout_prob = 0.5
    same.base_model.model.config._name_or_path = "elsewhere"
    build(tmp_path / "s", same, layers=layer)


def test_the_probe_sees_what_nothing_names(tmp_path: Path) -> None:
    """A hook changes what comes out, and no config, adapter or weight."""
    model = models.make("bert")
    build(tmp_path / "s", model)
    handle = model.bert.pooler.register_forward_hook(lambda module, args, out: 1.05 * out)
    with pytest.raises(inf.StoreError, match=r"another computation \(the (loss|gradient) of"):
        build(tmp_path / "s", model)
    handle.remove()
    build(tmp_path / "s", model)


def test_stores_without_a_probe_are_held_against_their_rows(tmp_path: Path) -> None:
    model = models.make("bert")
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        path = tmp_path / dtype
        build(path, model, dtype=dtype)
        manifest = _records.unseal("manifest", (path / "manifest.json").read_bytes())
        del manifest["facts"]
        (path / "manifest.json").write_bytes(_records.seal(manifest))
        build(path, model, dtype=dtype)
        handle = model.bert.pooler.register_forward_hook(lambda module, args, out: 1.5 * out)
        with pytest.raises(inf.StoreError, match="another computation"):
            build(path, model, dtype=dtype)
        handle.remove()


def test_tokenizers_and_templates() -> None:
    model, one, other = models.make("bert"), tokenizer(), tokenizer()
    base = identity_of(model, None, one)
    assert difference(base, identity_of(model, None, other)) is None
    # Padding and truncation that a call has set are none of its own.
    other("w1 w2", truncation=True, max_length=2, padding="max_length")
    assert difference(base, identity_of(model, None, other)) is None
    other.chat_template = "{{ messages }}"
    assert "template" in str(difference(base, identity_of(model, None, other)))
    another = tokenizer()
    another.add_tokens(["new"])
    assert "vocabulary" in str(difference(base, identity_of(model, None, another)))
    # Rows that were tokenised by nobody knows whom can be built on.
    assert difference(base, identity_of(model)) is None


def test_queries_of_another_computation_are_refused(tmp_path: Path) -> None:
    model = models.make("bert")
    train = build(tmp_path / "train", model)
    model.config.layer_norm_eps = 1e-3
    queries = build(tmp_path / "queries", model)
    with pytest.raises(
        inf.StoreError, match=r"queries: made by another computation than train \(config: layer_norm_eps"
    ):
        inf.influence(train, queries)
    model.config.layer_norm_eps = 1e-12
    own_loss = build(tmp_path / "own", model, loss=scaled)
    inf.influence(train, own_loss)
    index = inf.InfluenceIndex.build(train, "Flat")
    index.search(own_loss, 2)
    for given in (index.search, index.add):
        with pytest.raises(
            inf.StoreError, match=r"made by another computation than the index \(config: layer_norm_eps"
        ):
            given(queries)


def test_probes_survive_another_machine_and_nothing_more() -> None:
    names, given = ["a", "b"], gradients(4, 0)
    losses = torch.tensor([2.0, 0.5, 1e-5, 1.0])
    base = probe_of(range(4), names, given, losses)
    noise = {name: g * (1 + 1e-4 * torch.randn(g.shape)) for name, g in given.items()}
    assert probe_difference(base, probe_of(range(4), names, noise, losses * (1 + 1e-5)), names, 2e-3) is None
    for change, what in (
        ({"a": 1.01 * given["a"]}, "gradient of layer 'a' for row 0 had length"),
        ({"b": -given["b"]}, "gradient of row 0 points elsewhere"),
    ):
        found = probe_difference(base, probe_of(range(4), names, {**given, **change}, losses), names, 2e-3)
        assert what in str(found)
    assert "the loss of row 0" in str(
        probe_difference(base, probe_of(range(4), names, given, 1.01 * losses), names, 2e-3)
    )
    # A row that is predicted with certainty has a gradient of rounding alone.
    sure = [row for row in base if row["row"] == 2]
    turned = probe_of([2], names, {name: -g[2:3] for name, g in given.items()}, losses[2:3])
    assert probe_difference(sure, turned, names, 2e-3) is None
    assert [row["row"] for row in best_rows(base)] == [0, 3]
    assert best_rows([{**base[0], "loss": math.nan}]) == []


def test_facts_of_version_0_1_know_nothing(tmp_path: Path) -> None:
    one, other = (write_store(tmp_path / str(seed), gradients(4, seed)) for seed in (0, 1))
    inf.influence(one, other)
