"""Options about data, as commands take them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from audits import run, sentences, write_rows

import influence_fast as inf

TEMPLATE = "{% for m in messages %}w0 {{ m.content }} w1 {% endfor %}{% if add_generation_prompt %}w0 {% endif %}"


def build(folder: Path, out: Path, *given: object, model: str = "model", layers: str = "head") -> inf.GradientStore:
    code, _, err = run("build", "--model", folder / model, "--out", out, "--layers", layers, *given)
    assert code == 0, err
    return inf.GradientStore.open(out)


def test_several_compressed_files_in_part(folder: Path, tmp_path: Path) -> None:
    rows = sentences(12, 1)
    whole = write_rows(tmp_path / "whole.jsonl", rows)
    one = write_rows(tmp_path / "one.jsonl", rows[:5])
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows[5:]).encode()))
    stores = [
        build(folder, tmp_path / "a", "--data", whole, "--limit", 9),
        build(folder, tmp_path / "b", "--data", one, "--data", tmp_path / "two.jsonl.gz", "--limit", 9),
    ]
    assert len(stores[0]) == len(stores[1]) == 9
    assert torch.equal(*(store.read("classifier") for store in stores))


def test_conversations_by_a_template_from_a_file(folder: Path, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "w2 w3"}, {"from": "gpt", "value": "w4"}]
    data = write_rows(tmp_path / "chat.jsonl", [{"conversations": talk}] * 2)
    code, _, err = run("build", "--model", folder / "causal", "--data", data, "--out", tmp_path / "a")
    assert code == 1
    assert "--chat-template FILE" in err
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    given = ["--data", data, "--chat-template", tmp_path / "chat.jinja"]
    chat = build(folder, tmp_path / "b", *given, model="causal", layers="mlp[0]")
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "w0 w2 w3 w1 w0", "completion": "w4 w1"}] * 2)
    same = build(folder, tmp_path / "c", "--data", plain, model="causal", layers="mlp[0]")
    for layer in chat.layers:
        torch.testing.assert_close(chat.read(layer), same.read(layer))
    code, _, err = run(
        "build", "--model", folder / "causal", "--out", tmp_path / "d", *given[:2], "--chat-template", "none"
    )
    assert code == 1
    assert "chat_template: cannot read 'none'" in err


def test_a_loss_from_a_module_beside(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_losses.py").write_text(
        "import torch\n"
        "def half(model, batch):\n"
        "    logits = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits\n"
        "    return torch.nn.functional.cross_entropy(logits, batch['labels'], reduction='none') / 2\n"
        "def mean(model, batch):\n"
        "    return half(model, batch) / len(batch['labels'])\n"
    )
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "rows.jsonl", sentences(12, 1))
    whole = build(folder, tmp_path / "a", "--data", data)
    half = build(folder, tmp_path / "b", "--data", data, "--loss", "my_losses:half")
    torch.testing.assert_close(half.read("classifier"), whole.read("classifier") / 2)
    given = ["--model", folder / "model", "--data", data, "--layers", "head", "--out", tmp_path / "c"]
    code, _, err = run("build", *given, "--loss", "my_losses:mean")
    assert code == 1
    assert "changes with the other rows of its batch" in err


def test_preferences_with_a_strength(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "w2 w3", "chosen": f"w{i}", "rejected": "w30"} for i in range(4, 8)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    code, _, err = run(
        "build", "--model", folder / "causal", "--data", data, "--out", tmp_path / "a", "--layers", "mlp"
    )
    assert code == 1
    assert "--reference DIR" in err
    given = ["--data", data, "--reference", folder / "causal"]
    stores = [
        build(folder, tmp_path / f"b{beta}", *given, "--beta", beta, model="causal", layers="mlp[0]") for beta in (1, 2)
    ]
    # Against itself every pair is undecided: the gradient is as long as the strength.
    torch.testing.assert_close(
        *(store.read(store.layers[0]) * scale for store, scale in zip(stores, (2, 1), strict=True))
    )
    assert stores[0].column("loss").tolist() == pytest.approx([0.6931] * 4, abs=1e-3)
    code, _, err = run("build", "--model", folder / "model", "--data", data, "--beta", 1, "--out", tmp_path / "c")
    assert code == 1


def test_blocks_of_texts(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "texts.jsonl", [{"text": "w2 w3 w4"}] * 8)
    store = build(folder, tmp_path / "a", "--data", data, "--block-size", 6, model="causal", layers="mlp[0]")
    assert len(store) == 4
