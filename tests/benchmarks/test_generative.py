"""Spoilt answers of a causal model, at toy size: the faults are what they are called, and the page follows the figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from audits import write_rows
from click.testing import CliRunner, Result
from torch import nn

from benchmarks import generative
from benchmarks.generative import CHATS, KINDS, SETS, TASKS, chats, encoder, parts_of, spoil, token_losses, turns_of
from benchmarks.paper_tasks import bpe


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(generative.main, [str(argument) for argument in arguments])


def sums(count: int) -> list[dict]:
    return [
        {"prompt": f"add {i} and {i} -> ", "class_id": i % 4, **parts_of(f"twice {i} is the sum.", str(2 * i))}
        for i in range(count)
    ]


def plain(count: int) -> list[dict]:
    return [{**row, "reason": None, "target": f"{i} plus {i}"} for i, row in enumerate(sums(count))]


@pytest.mark.parametrize("task", SETS)
def test_faults_are_what_they_are_called(task: str) -> None:
    rows = sums(50)
    spoilt, faults = spoil(rows, task, 0.4, 0)
    assert spoil(rows, task, 0.4, 0) == (spoilt, faults)
    counts = [faults.count(kind) for kind in KINDS[task]]
    assert sum(counts) == 20
    assert max(counts) - min(counts) <= 1
    for old, new, fault in zip(rows, spoilt, faults, strict=True):
        target = new["target"]
        assert (target == old["target"]) == (fault is None)
        assert new["prompt"] == old["prompt"]
        if fault == "answer of another row":
            assert target in {row["target"] for row in rows}
        elif fault == "reasoning of another row":
            assert target.endswith(f"Answer: {old['answer']}")
        elif fault == "truncated":
            assert old["target"].startswith(target)
        elif fault == "wrong final number":
            assert target.startswith(f"{old['reason']} Answer: ")
        elif fault == "other format":
            assert old["target"].upper() in target


def test_of_a_conversation_one_answer_is_spoilt_by_its_own_data_set() -> None:
    rows = chats(plain(50), sums(50))
    assert [turn["reason"] is None for row in rows[:2] for turn in turns_of(row)] == [True, False, False, True]
    spoilt, faults = spoil(rows, CHATS, 0.4, 0)
    assert {fault: faults.count(fault) for fault in KINDS[CHATS]} == dict.fromkeys(KINDS[CHATS], 4)
    known = {
        kind: {turn["target"] for row in rows for turn in turns_of(row) if (turn["reason"] is None) == kind}
        for kind in (True, False)
    }
    for old, new, fault in zip(rows, spoilt, faults, strict=True):
        changed = [(a, b) for a, b in zip(turns_of(old), turns_of(new), strict=True) if a != b]
        assert len(changed) == (fault is not None)
        for was, is_ in changed:
            assert is_["prompt"] == was["prompt"]
            if fault == "answer of another row":
                assert is_["target"] in known[was["reason"] is None] - {was["target"]}
            elif fault in ("reasoning of another row", "wrong final number"):
                assert was["reason"] is not None
                assert is_["target"].endswith(f"Answer: {was['answer']}") == (fault != "wrong final number")


def test_a_conversation_learns_the_turns_of_the_assistant() -> None:
    rows = chats(plain(2), sums(2))
    tokenizer = bpe([turn["prompt"] + turn["target"] for row in rows for turn in turns_of(row)])
    encode = encoder(tokenizer)
    found = encode(rows[1])
    text = tokenizer.decode(found["input_ids"], skip_special_tokens=False)
    asked = [(turn["prompt"], turn["target"]) for turn in turns_of(rows[1])]
    assert text == "<s>" + "".join(f"<user>\n{prompt}\n<assistant>\n{target}</s>" for prompt, target in asked)
    learnt = tokenizer.decode([i for i in found["labels"] if i != -100], skip_special_tokens=False)
    assert learnt == "".join(f"{target}</s>" for _, target in asked)
    assert encode(turns_of(rows[1])[0])["labels"][-1] == 2


class Fixed(nn.Module):
    """Logits that say the number of the next token's place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 10)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> object:
        return type("Out", (), {"logits": self.table(input_ids)})


def test_losses_are_of_the_targets_alone() -> None:
    model = Fixed()
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
    ]
    with torch.no_grad():
        log = model.table.weight.log_softmax(-1).double()
    found = token_losses(model, rows)
    torch.testing.assert_close(found[0], -torch.stack([log[2, 3], log[3, 4]]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], -log[5, 6][None], rtol=1e-5, atol=1e-6)


def test_a_run_of_both_data_sets(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out.json"
    for task in SETS:
        (data / task).mkdir(parents=True)
        for side, count in (("train", 24), ("test", 6)):
            rows = [{k: row[k] for k in ("prompt", "class_id", "answer", "reason")} for row in sums(count)]
            for row in rows:
                if task == "grammars":
                    del row["reason"]
            write_rows(data / task / f"{side}.jsonl", rows)
    given = ["--data", data, "--work", tmp_path / "work", "--out", out, "--seeds", 1, "--samples", 20, "--threads", 1]
    given += ["--share", 0.3, "--base-epochs", 1, "--epochs", 1]
    assert invoke(*given, "--seconds", 0).exit_code == 3
    result = invoke(*given)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert [run["task"] for run in document["runs"]] == list(TASKS)
    run = document["runs"][1]
    assert sum(run["faults"].values()) == 6
    scores = run["scores"]
    assert {"loss", "cosine all rank", "trackstar block 3 vote", "loss + worst token"} <= set(scores)
    assert all(0 <= value <= 1 for one in scores.values() for value in one.values())
    assert {row["method"] for row in run["relevance"]} == set(generative.METHODS)
    assert "wrote" in invoke(*given).output
    assert json.loads(out.read_text())["runs"] == document["runs"]
    document["runs"] += [{**run, "seed": 1} for run in document["runs"]]
    out.write_text(json.dumps(document))
    page = tmp_path / "page.md"
    page.write_text("<!-- generative -->\n<!-- end of generative -->\n")
    assert invoke("--out", out, "--page", page).exit_code == 0
    text = page.read_text()
    mean = np.mean([one["scores"]["loss"]["auc_ndr"] for one in document["runs"] if one["task"] == "grammars"])
    assert f"| loss | {mean:.3f} |" in text
    assert "nan" not in text
