"""Moments of a Trainer's optimizer, found again by layer in what it saved; and LESS from end to end."""

from __future__ import annotations

import models
import pytest
import torch
from audits import run, tokenizer
from trainers import trainer

import influence_fast as inf
from influence_fast.data.models import load_model
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.layers import layers_by_name, weight_of


def trained(tmp_path, **options):
    made = trainer(tmp_path, count=4, num_train_epochs=1, save_strategy="epoch", adam_beta1=0.8, **options)
    made.train()
    return made, tmp_path / "out" / "checkpoint-2"


@pytest.mark.parametrize(
    "options",
    [{}, {"lora": True}, {"family": "gpt2", "task": "causal"}, {"family": "gpt2", "lora": True}],
    ids=["whole", "LoRA", "Conv1D and a tied head", "LoRA on Conv1D"],
)
def test_moments_are_those_of_the_optimizer(tmp_path, options):
    made, checkpoint = trained(tmp_path, **options)
    found = inf.read_adam(checkpoint, made.model)
    known = layers_by_name(made.model)
    trainable = {id(p) for p in made.model.parameters() if p.requires_grad}
    assert {id(weight_of(known[name])) for name in found} == trainable
    for name, state in found.items():
        parameter, kept = weight_of(known[name]), made.optimizer.optimizer.state
        turned = not isinstance(known[name], torch.nn.Linear | torch.nn.Parameter)
        for mine, theirs in ((state.m, kept[parameter]["exp_avg"]), (state.v, kept[parameter]["exp_avg_sq"])):
            assert torch.equal(mine, theirs.T if turned else theirs.reshape(mine.shape))
        assert state.betas == (0.8, 0.999)
        assert state.eps == 1e-8


def test_an_adapter_that_was_loaded_for_inference_finds_its_own(tmp_path):
    models.make("bert").save_pretrained(tmp_path / "base")
    made, checkpoint = trained(tmp_path, lora=True)
    made.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    made.model.save_pretrained(checkpoint)
    expected = inf.read_adam(checkpoint, made.model)
    tokenizer().save_pretrained(checkpoint)
    model = load_model(str(checkpoint))[0]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = inf.read_adam(checkpoint, model)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name].v, expected[name].v) for name in found)


def test_what_was_frozen_is_found_by_name_by_flag_or_by_shape(tmp_path):
    made = trainer(tmp_path, count=4, num_train_epochs=1, save_strategy="epoch")
    made.add_callback(inf.InfluenceCallback(tmp_path / "recorded"))
    for name, parameter in made.model.named_parameters():
        parameter.requires_grad = name.startswith("classifier")
    made.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    expected = inf.read_adam(checkpoint, made.model)
    assert set(expected) == {"classifier", "classifier.bias"}
    (one,) = inf.read_training(tmp_path / "recorded").checkpoints
    assert one.trained == ("classifier.weight", "classifier.bias")
    # Loaded anew, all require a gradient, and no other parameters have the shapes of a head.
    loaded = type(made.model).from_pretrained(checkpoint)
    for found in (inf.read_adam(checkpoint, loaded), inf.read_adam(checkpoint, loaded, trained=one.trained)):
        assert set(found) == set(expected)
        assert all(torch.equal(found[name].m, expected[name].m) for name in found)
    with pytest.raises(InputError, match=r"no moments of '.*query', which the optimizer did not train; leave it out"):
        inf.read_adam(checkpoint, loaded, "attention")
    with pytest.raises(InputError, match="trained: this BertForSequenceClassification has no parameter 'head'"):
        inf.read_adam(checkpoint, loaded, trained=["head"])
    # Of two blocks alike, shapes do not say which was trained.
    document = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    of_block = loaded.bert.encoder.layer[0].attention.self.query.weight
    state = {**document["state"][0], "exp_avg": of_block.detach(), "exp_avg_sq": of_block.detach().square()}
    document["param_groups"] = [{**document["param_groups"][0], "params": [0]}]
    torch.save({"state": {0: state}, "param_groups": document["param_groups"]}, checkpoint / "optimizer.pt")
    with pytest.raises(InputError, match=r"has 1 trained parameters, .*requires_grad_\(False\)\), or their names"):
        inf.read_adam(checkpoint, loaded)
    found = inf.read_adam(checkpoint, loaded, trained=["bert.encoder.layer.1.attention.self.query.weight"])
    assert list(found) == ["bert.encoder.layer.1.attention.self.query"]


def test_what_is_no_state_of_adam_is_refused(tmp_path):
    made, checkpoint = trained(tmp_path)
    file = checkpoint / "optimizer.pt"
    document = torch.load(file, weights_only=True)
    with pytest.raises(InputError, match="trained parameters, and this"):
        inf.read_adam(checkpoint, models.make("bert", lora=True))
    with pytest.raises(InputError, match="moments of shape"):
        inf.read_adam(checkpoint, models.make("roberta"))
    for changed, words in (
        ({"param_groups": []}, "no state of an optimizer"),
        ({**document, "param_groups": [{"params": [0]}]}, "not Adam"),
        ({**document, "state": {0: {"exp_avg_sq_row": torch.ones(3)}}}, "no exp_avg and exp_avg_sq"),
        ({**document, "state": {}}, "no moments of any layer"),
    ):
        torch.save(changed, file)
        with pytest.raises(InputError, match=words):
            inf.read_adam(checkpoint, made.model)
    torch.save({**document, "state": {0: document["state"][0]}}, file)
    with pytest.raises(InputError, match="no moments of 'classifier'"):
        inf.read_adam(checkpoint, made.model, ["classifier"])
    file.write_bytes(b"cut")
    with pytest.raises(StoreError, match="damaged"):
        inf.read_adam(checkpoint, made.model)
    torch.save(torch.nn.Linear(2, 2), file)
    with pytest.raises(StoreError, match="more than numbers"):
        inf.read_adam(checkpoint, made.model)
    file.unlink()
    with pytest.raises(InputError, match="there is no"):
        inf.read_adam(checkpoint, made.model)


def test_less_from_a_training_to_scores(tmp_path):
    """As the guide has it, against the formula on literal gradients."""
    folder = tmp_path / "recorded"
    options = {"save_strategy": "epoch", "lora": True, "count": 4, "callbacks": [inf.InfluenceCallback(folder)]}
    made = trainer(tmp_path, **options)
    made.train()
    rows, asked = made.train_dataset, models.rows(count=3, seed=9)
    layers = inf.select_layers(made.model, "trained")
    stores: list[list] = [[], []]
    checkpoints = inf.read_training(folder).checkpoints
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for number, one in enumerate(checkpoints):
        # The weights of then, in the model of now.
        made._load_from_checkpoint(str(one.path))
        states = inf.read_adam(one.path, made.model)
        for kept, part, adam in zip(stores, (rows, asked), (states, None), strict=True):
            path = tmp_path / f"{number}-{len(part)}"
            kept.append(inf.build_store(path, made.model, part, layers, "identity", adam=adam, progress=False))
        own = models.oracle(made.model.eval(), rows, layers)
        theirs = models.oracle(made.model, asked, layers)
        updates = []
        for name in layers:
            state, (b1, b2) = states[name], states[name].betas
            g = own[name]
            update = (b1 * state.m.double() + (1 - b1) * g) / (b2 * state.v.double() + (1 - b2) * g**2 + 1e-8).sqrt()
            updates.append(update.flatten(1))
        g, q = torch.cat(updates, 1), torch.cat([theirs[name].flatten(1) for name in layers], 1)
        expected += one.learning_rate * (q / q.norm(dim=1)[:, None]) @ (g / g.norm(dim=1)[:, None]).T
    found = inf.less(*stores, [one.learning_rate for one in checkpoints])
    torch.testing.assert_close(found.layer("all").double(), expected, atol=1e-4, rtol=1e-3)


def test_the_command_line_builds_of_a_checkpoint(tmp_path, folder):
    checkpoint = trained(tmp_path)[1]
    tokenizer().save_pretrained(checkpoint)
    given = ["--data", folder / "train.jsonl", "--layers", "head", "--projection", "identity"]
    code, _, err = run("build", "--model", checkpoint, *given, "--out", tmp_path / "a", "--adam", checkpoint)
    assert code == 0, err
    rows = inf.GradientStore.open(tmp_path / "a")
    assert "adam" in rows.meta["facts"]["identity"]
    code, _, err = run(
        "build", "--model", folder / "model", *given, "--out", tmp_path / "b", "--adam", tmp_path / "none"
    )
    assert code != 0
    assert "there is no" in err
