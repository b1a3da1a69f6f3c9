"""Pairs that a DPOTrainer trains on, recorded: a Trainer with the passes of TRL's, held against the formula."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import Trainer, TrainingArguments

import influence_fast as inf
from influence_fast.errors import InputError
from influence_fast.training.preferences import check_settings, of_pairs

BETA = 0.3


class Words(nn.Module):
    """Log-probabilities of tokens, as a forward of TRL's gives them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(9, 9)

    def forward(self, input_ids: Tensor) -> Any:
        said = self.table(input_ids[:, :-1]).log_softmax(-1)
        return SimpleNamespace(log_probs=said.gather(-1, input_ids[:, 1:, None])[..., 0])


@dataclass
class DPOConfig(TrainingArguments):
    """What the callback reads of TRL's."""

    beta: float = BETA
    loss_type: str = "sigmoid"
    precompute_ref_log_probs: bool = False


class Pairs(Trainer):
    """DPO by two passes, or one where the reference was asked beforehand."""

    reference: nn.Module

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Tensor:
        given = {name: value for name, value in inputs.items() if not name.startswith("ref_")}
        policy = model(**given).log_probs.sum(1)
        if "ref_chosen_logps" in inputs:
            said = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            with torch.no_grad():
                said = self.reference(**given).log_probs.sum(1)
        return of_pairs(policy, said, BETA)[0].mean()


def rows(count: int = 6) -> list[dict[str, list[int]]]:
    random = torch.Generator().manual_seed(1)
    return [
        {name: torch.randint(9, (4,), generator=random).tolist() for name in ("chosen", "rejected")}
        for _ in range(count)
    ]


def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([row[name] for name in ("chosen", "rejected") for row in some])}


def literal(policy: nn.Module, reference: nn.Module) -> tuple[Tensor, Tensor]:
    """Losses and margins of the rows by the formula, one at a time."""
    margins = []
    for row in rows():
        ratios = [
            policy(torch.tensor([row[name]])).log_probs.sum() - reference(torch.tensor([row[name]])).log_probs.sum()
            for name in ("chosen", "rejected")
        ]
        margins.append(BETA * (ratios[0] - ratios[1]))
    found = torch.stack(margins).detach()
    return -logsigmoid(found), found


def train(folder: Path, callback: Any, collator: Any = collate, **options: Any) -> Pairs:
    given = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "save_strategy": "no", "learning_rate": 0.0}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}
    config = DPOConfig(output_dir=str(folder / "out"), **{**given, **quiet, **options})
    made = Pairs(Words(0), config, data_collator=collator, train_dataset=rows(), callbacks=[])
    made.reference = callback.reference if callback.reference is not None else Words(1)
    made.add_callback(callback)
    made.train()
    return made


def test_losses_and_margins_are_those_of_the_formula(tmp_path: Path) -> None:
    made = train(
        tmp_path, inf.InfluenceCallback(tmp_path / "recorded", reference=Words(1)), gradient_accumulation_steps=2
    )
    losses, margins = literal(made.model, made.reference)
    found = inf.read_training(tmp_path / "recorded")
    torch.testing.assert_close(found.losses[0], losses)
    torch.testing.assert_close(found.margins[0], margins)
    assert list(found.scores()) == ["aum", "mean_loss"]
    assert found.labels is None
    assert not made.model._forward_hooks
    assert not made.reference._forward_hooks


def test_a_reference_that_was_asked_beforehand_is_in_the_batch(tmp_path: Path) -> None:
    reference = Words(1)

    def with_reference(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(some)
        said = reference(**batch).log_probs.sum(1).detach().chunk(2)
        return {**batch, "ref_chosen_logps": said[0], "ref_rejected_logps": said[1]}

    callback = inf.InfluenceCallback(tmp_path / "recorded")
    made = train(tmp_path, callback, with_reference, precompute_ref_log_probs=True)
    losses, margins = literal(made.model, reference)
    found = inf.read_training(tmp_path / "recorded")
    torch.testing.assert_close(found.losses[0], losses)
    torch.testing.assert_close(found.margins[0], margins)


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reference: a pair's loss needs .*reference=trainer.ref_model"):
        train(tmp_path, inf.InfluenceCallback(tmp_path / "a"))
    callback = inf.InfluenceCallback(tmp_path / "c", reference=Words(1))
    with pytest.raises(InputError, match="became a batch of 4 texts; expected two each"):
        train(tmp_path, callback, lambda some: {"input_ids": torch.tensor([row["chosen"] for row in some])})
    with pytest.raises(InputError, match="args: expected DPO's loss_type 'sigmoid', got 'hinge'"):
        train(tmp_path, callback, loss_type="hinge")
    with pytest.raises(InputError, match=r"trainer: DPO with ld_alpha=0.5 has another loss"):
        check_settings("trainer", SimpleNamespace(ld_alpha=0.5))
    assert not any((tmp_path / name).exists() for name in "ac")
