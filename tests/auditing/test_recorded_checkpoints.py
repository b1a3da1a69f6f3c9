"""TracIn and LESS as methods of an audit: the same as their parts by hand, and what they need said where it is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from training.trainers import arguments, without_dropout
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, Trainer

import influence_fast as inf
from influence_fast.auditing.disk import stored_rows
from influence_fast.auditing.run import plan_audit
from influence_fast.data.models import load_model

LAYERS = "attention[1]"


def trained(folder: Path, task: str) -> tuple[str, list[dict]]:
    """A recorded training of two epochs with a checkpoint each: the folder of its last model, and its rows."""
    made, rows = models.make("bert" if task == "classification" else "llama", task), models.rows(task, 12)
    made.save_pretrained(folder / "base")
    if task != "classification":
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    trainer = Trainer(
        model=without_dropout(made),
        args=arguments(folder, save_strategy="epoch", per_device_train_batch_size=4, learning_rate=0.01),
        train_dataset=rows,
        data_collator=models.collate,
        callbacks=[inf.InfluenceCallback(folder / "recorded")],
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return str(folder / "model"), rows


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[dict]]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, *trained(folder, "classification")


def by_hand(folder: Path, rows: list[dict], queries: list[dict], layers: list[str], adam: bool) -> torch.Tensor:
    stores, asked, rates = [], [], []
    for number, one in enumerate(inf.read_training(folder / "recorded").checkpoints):
        model = AutoModelForSequenceClassification.from_pretrained(one.path)
        moments = inf.read_adam(one.path, model, layers) if adam else None
        at = folder / f"by-hand-{adam}-{number}"
        how = {"projection": "sjlt:16", "progress": False, "verify": False}
        stores.append(inf.build_store(at / "t", model, rows, layers, adam=moments, **how))
        asked.append(inf.build_store(at / "q", model, queries, layers, **how))
        rates.append(one.learning_rate)
    return inf.aggregate((inf.less if adam else inf.tracin)(stores, asked, rates), "mean")


def test_both_are_their_parts_by_hand(training: tuple[Path, str, list[dict]], tmp_path: Path) -> None:
    folder, model, rows = training
    settings = {"layers": LAYERS, "projection": "sjlt:16", "methods": ["dot", "tracin", "less"], "progress": False}
    settings |= {"training": folder / "recorded", "aggregations": ["mean"], "rank_by": "less:all:mean", "evidence": 0}
    result = inf.audit(model, rows, rows[:5], out=tmp_path / "audit", **settings)
    layers = result.groups["all"]
    for name, adam in (("tracin", False), ("less", True)):
        found = result.rankings[inf.RankingKey(name, "all", "mean")]
        torch.testing.assert_close(found, by_hand(folder, rows, rows[:5], layers, adam), rtol=1e-4, atol=1e-7)
    steps = [one.step for one in inf.read_training(folder / "recorded").checkpoints]
    assert [one["step"] for one in result.facts["checkpoints"]] == steps
    stores = sorted(path.name for path in (tmp_path / "audit" / "stores").iterdir())
    assert stores == sorted(["train", "queries", *(f"{n}-{s}" for n in ("train", "adam", "queries") for s in steps)])
    # As many rows as the disk was asked for; and the same audit goes on from its stores.
    plan = plan_audit(model, rows, rows[:5], None, {k: v for k, v in settings.items() if k != "progress"})
    assert sum(len(inf.GradientStore.open(tmp_path / "audit" / "stores" / name)) for name in stores) == stored_rows(
        plan
    )
    again = inf.audit(model, rows, rows[:5], out=tmp_path / "audit", **settings)
    torch.testing.assert_close(again.scores, result.scores, rtol=0, atol=0)


def test_adapters_are_loaded_from_their_checkpoints(tmp_path: Path) -> None:
    model, rows = trained(tmp_path, "causal-lm")
    result = inf.audit(
        model, rows, rows[:4], methods=["tracin", "less"], training=tmp_path / "recorded", evidence=0, progress=False
    )
    assert all("lora_" in name for name in result.groups["all"])
    # By the definition, of the last checkpoint alone where the first counts nothing.
    first, last = inf.read_training(tmp_path / "recorded").checkpoints
    network = load_model(str(last.path), "causal-lm")[0]
    plain = [models.oracle(network, part, result.groups["all"]) for part in (rows, rows[:4])]
    early = load_model(str(first.path), "causal-lm")[0]
    before = [models.oracle(early, part, result.groups["all"]) for part in (rows, rows[:4])]
    wanted = sum(
        one.learning_rate * torch.stack([(q[name].flatten(1) @ t[name].flatten(1).T) for name in t]).sum(0).mean(0)
        for one, (t, q) in ((first, before), (last, plain))
    )
    found = result.rankings[inf.RankingKey("tracin", "all", "mean")]
    torch.testing.assert_close(found / found.norm(), wanted / wanted.norm(), rtol=1e-3, atol=1e-5)


def test_of_a_model_with_frozen_weights_the_trained_layers_are_scored(tmp_path: Path) -> None:
    made, rows = models.make("bert"), models.rows("classification", 8)
    for name, parameter in made.named_parameters():
        parameter.requires_grad = name.startswith("classifier") or ".1.attention.self." in name
    given = arguments(tmp_path, save_strategy="epoch", num_train_epochs=1, learning_rate=0.01)
    recorded = [inf.InfluenceCallback(tmp_path / "recorded")]
    trainer = Trainer(without_dropout(made), given, models.collate, rows, callbacks=recorded)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    layers = inf.select_layers(made, "trained")
    how = {"methods": ["less"], "aggregations": ["mean"], "evidence": 0, "progress": False}
    # From files, which do not say what was frozen, and in memory.
    results = [
        inf.audit(model, rows, rows[:3], training=tmp_path / "recorded", **how)
        for model in (str(tmp_path / "model"), made)
    ]
    expected = torch.zeros(3, 8, dtype=torch.float64)
    for one in inf.read_training(tmp_path / "recorded").checkpoints:
        assert set(one.trained or ()) == {name for name, p in made.named_parameters() if p.requires_grad}
        network = AutoModelForSequenceClassification.from_pretrained(one.path)
        own, theirs = (models.oracle(network, part, layers) for part in (rows, rows[:3]))
        states = inf.read_adam(one.path, network, layers, one.trained)
        steps = []
        for name in layers:
            (b1, b2), state = states[name].betas, states[name]
            m, v, g = state.m.double(), state.v.double(), own[name].reshape(8, *state.m.shape)
            steps.append(((b1 * m + (1 - b1) * g) / (b2 * v + (1 - b2) * g**2 + state.eps).sqrt()).flatten(1))
        sides = torch.cat([theirs[name].flatten(1) for name in layers], 1), torch.cat(steps, 1)
        asked, updates = (torch.nn.functional.normalize(side, dim=1) for side in sides)
        expected += one.learning_rate * asked @ updates.T
    for result in results:
        assert result.groups["all"] == layers
        found = result.rankings[inf.RankingKey("less", "all", "mean")]
        torch.testing.assert_close(found, expected.mean(0), rtol=1e-3, atol=1e-6)
    with pytest.raises(inf.InputError, match=r"layers: .* has no moments of '.*layer.0.attention.self.query'"):
        inf.audit(str(tmp_path / "model"), rows, rows[:3], training=tmp_path / "recorded", layers="attention[0]", **how)


def test_what_is_missing_is_said(training: tuple[Path, str, list[dict]], tmp_path: Path) -> None:
    folder, model, rows = training

    def refused(words: str, recorded: Path | None, method: str = "tracin", **settings: object) -> None:
        given = {"layers": LAYERS, "methods": [method], "training": recorded, "progress": False, **settings}
        with pytest.raises(inf.InputError, match=words):
            inf.audit(model, rows, rows[:3], **given)

    refused(r"training: tracin goes over the checkpoints of a training; name the folder.*--training", None)
    refused(
        r"checkpoints: the self-check ranks by tracin at each", folder / "recorded", self_check=0.4, checkpoints=[model]
    )
    shutil.copytree(folder / "recorded", tmp_path / "none")
    (tmp_path / "none" / "training.json").unlink()
    refused(r"has no checkpoint, and less needs some", tmp_path / "none", "less")
    refused(r"training: the checkpoint .* lacks layer|layers: ", folder / "recorded", "less", layers="nowhere")
    with pytest.raises(inf.InputError, match=r"'tracin' needs a training that InfluenceCallback recorded"):
        inf.influence({"a": torch.ones(2, 2)}, {"a": torch.ones(1, 2)}, "tracin")
    one = inf.read_training(folder / "recorded").checkpoints[0]
    moved = one.path.rename(one.path.with_name("away"))
    try:
        refused(r"training: the checkpoint .* is gone, and tracin needs it", folder / "recorded")
    finally:
        moved.rename(one.path)
    kept = (one.path / "optimizer.pt").rename(tmp_path / "optimizer.pt")
    try:
        refused(r"has no optimizer.pt, which less needs", folder / "recorded", "less")
    finally:
        shutil.move(kept, one.path / "optimizer.pt")
