"""Scores of other libraries: our side of what they are given, what is kept of a run, and the tables beside ours."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from torch import Tensor

from benchmarks import lds, lds_peers, protocol
from benchmarks.lds_peers import Checkpoints
from influence_fast.data.batching import collate
from influence_fast.gradients import losses as sample_losses

SETTINGS = {"samples": 24, "query_samples": 24, "epochs": 1}
ROWS = [{"input_ids": list(range(1, n)), "labels": [-100, *range(2, n)]} for n in (4, 7, 5)]


def digits() -> lds.Task:
    """Each row is a query too."""
    task = lds.TASKS["digits"](SETTINGS)
    return lds.Task(task.kind, task.rows, task.rows, task.make, task.layers, 20, 1e-2)


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=2, pad_token_id=0, eos_token_id=7)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_losses_and_margins_are_those_of_our_losses(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = lds.Digits().eval() if kind == "classification" else tiny_gpt2()
    batch = dict(collate(digits().rows[:3] if kind == "classification" else ROWS, model))
    given = {name: column for name, column in batch.items() if name in ("input_ids", "labels")}
    logits = lds_peers.logits_of(model, given)
    expected = sample_losses.named(kind)(model, batch)
    torch.testing.assert_close(lds_peers.losses(kind, logits, batch["labels"]), expected)
    # Over one target log(p / (1 - p)) is of the loss alone.
    one = {"labels": batch["labels"]} if kind == "classification" else {"labels": batch["labels"][:, :3]}
    if kind == "causal-lm":
        logits = logits[:, :3]
        one["labels"][:, 2:] = -100
    p = (-lds_peers.losses(kind, logits, one["labels"])).exp()
    torch.testing.assert_close(
        lds_peers.margins(kind, logits, one["labels"]), (p / (1 - p)).log(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(lds_peers.chances(kind, logits, one["labels"]), p)


def test_linear_layers_for_conv1d_are_the_same_function() -> None:
    model = tiny_gpt2()
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    linear = lds_peers.with_linear(model)
    assert not any(type(module).__name__ == "Conv1D" for module in linear.modules())
    torch.testing.assert_close(lds_peers.logits_of(linear, batch), lds_peers.logits_of(model, batch))
    assert model.config.pad_token_id == 0


def test_a_run_keeps_scores_and_says_what_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(checkpoints: Checkpoints, folder: Path) -> dict[str, Tensor]:
        total = sum(float(model.head.bias.detach().sum()) for model in checkpoints.models)
        return {"": torch.full((24, 24), total), "nan": torch.full((24, 24), torch.nan)}

    def broken(checkpoints: Checkpoints, folder: Path) -> dict[str, Tensor]:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(lds_peers, "PEERS", {"click": {"wide": wide, "broken": broken}})
    weights = [lds.fit(digits(), torch.arange(24))[1][-1] for _ in range(2)]
    (tmp_path / "digits").mkdir()
    protocol.save(tmp_path / "digits" / "models.pt", [weights, [weights[0]]])
    out = tmp_path / "out.safetensors"
    given = ["--task", "digits", "--work", tmp_path, "--out", out, "--samples", 24, "--query-samples", 24]
    run = CliRunner().invoke(lds_peers.main, [*map(str, given), "--only", "click"])
    assert run.exit_code == 0, run.output
    with safe_open(out, "pt") as file:
        found = {name: float(file.get_tensor(name)[0, 0]) for name in file.keys()}  # noqa: SIM118
        said = {name: json.loads(text) for name, text in file.metadata().items()}
    sums = [float(part["head.bias"].sum()) for part in weights]
    expected = {"wide, 1 model": sums[1], "wide, 2 epochs": sum(sums), "wide, 2 models": sums[1] + sums[0]}
    assert found == pytest.approx(expected)
    assert said["not_run"] == {"broken": "RuntimeError: no such layer", "wide (nan)": "scores that are not finite"}
    refused = CliRunner().invoke(lds_peers.main, [*map(str, given), "--only", "none"])
    assert "expected some of click" in refused.output
    refused = CliRunner().invoke(lds_peers.main, ["--task", "gpt", "--work", str(tmp_path), "--out", str(out)])
    assert "there is no models.pt" in refused.output


def test_ours_stand_beside_the_best_of_others_on_the_same_checkpoints(tmp_path: Path) -> None:
    reached = {
        "ekfac, 1 model": 0.5, "ekfac (damping 1), 1 model": 0.6, "dot, 1 model": 0.1, "K EK-FAC, 1 model": 0.4,
        "traker, 1 model": 0.7, "traker, 5 models": 0.9,
    }  # fmt: skip
    table = [{"name": name, "lds": value, "se": 0.1, "se_best": 0.05} for name, value in reached.items()]

    def measure(pair: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"se_best": torch.tensor([0.0, 0.01 * sum(map(len, pair))])}

    others = {"K EK-FAC, 1 model", "traker, 1 model", "traker, 5 models"}
    pairs = lds.beside(dict.fromkeys(reached, torch.ones(1)), others, table, measure)
    assert [(pair["ours"], pair["theirs"], pair["kind"]) for pair in pairs] == [
        ("ekfac, 1 model", "traker, 1 model", "any"),
        ("ekfac, 1 model", "K EK-FAC, 1 model", "its own"),
    ]
    assert [pair["difference"] for pair in pairs] == pytest.approx([-0.2, 0.1])
    assert [pair["se"] for pair in pairs] == pytest.approx([0.29, 0.31])
    document = {
        "task": "digits", "sizes": {"rows": 4, "queries": 2}, "subsets": 3, "training": {"repeats": 1, "epochs": 2},
        "table": table, "pairs": pairs, "others": {"versions": {"trak": "1"}, "not_run": {"bergson": "ValueError: x"}},
    }  # fmt: skip
    (tmp_path / "digits.json").write_text(json.dumps(document))
    lds.write_tables(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| ekfac, 1 model | traker | -0.200 | 0.290 | K EK-FAC | +0.100 | 0.310 |" in text
    assert "- bergson: `ValueError: x`" in text
    assert "Versions: trak 1." in text


@pytest.mark.parametrize("name", ["kronfluence", "traker", "dattri"])
def test_a_row_helps_itself_most(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(lds_peers.MODULES[name]) is None:
        pytest.skip(f"{name} is not installed")
    small = {"traker": lds_peers.traker(8), "dattri": lds_peers.dattri_trak(8)}
    method = small.get(name, lds_peers.kronfluence({"": None}))
    monkeypatch.setattr(lds_peers, "PEERS", {name: {name: method}})
    torch.manual_seed(0)
    task = digits()
    weights = lds.fit(task, torch.arange(24))[1][-1]
    found = lds_peers.scored(task, [(0, weights)], name)
    assert found["errors"] == {}
    scores = found["scores"][name]
    assert scores.shape == (24, 24)
    own = scores.diagonal()
    assert (own > scores.mean(1)).float().mean() > 0.9
