"""Training for the benchmarks: an encoder with LoRA matrices and a small causal model, each epoch kept as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import protocol
from influence_fast.data.batching import collate
from influence_fast.training.callback import by_row

BATCH = 32


def encoder(folder: str, seed: int) -> nn.Module:
    """The pretrained encoder with fresh LoRA matrices on query and value and a fresh head, the same for every arm."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    settings = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=4, lora_dropout=0.05, target_modules=["query", "value"])
    return get_peft_model(model, settings)


def train_epochs(
    make: Callable[[], nn.Module],
    rows: dict[str, list[dict[str, Any]]],
    chosen: list[int],
    path: Path,
    progress: protocol.Progress,
    seed: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Trained weights, accuracies, and the rows' losses and margins of every epoch; an epoch is the unit that is kept.

    Losses and margins ``(n,)`` are of the passes that training makes, NaN for rows that are not ``chosen``.
    """
    from transformers import get_cosine_schedule_with_warmup

    state: dict[str, Any] = (
        protocol.load(path) if path.exists() else {"epochs": [], "weights": [], "seen": [], "seconds": 0.0}
    )
    if len(state["epochs"]) == settings["epochs"]:
        return state
    model = make()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings["lr"])
    steps = settings["epochs"] * -(-len(chosen) // BATCH)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    if state["weights"]:
        load_weights(model, state["weights"][-1])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])

    def loss(part: list[int]) -> Tensor:
        batch = collate([rows["train"][i] for i in part], model)
        found = logits(model, batch)
        seen[:, part] = torch.stack(by_row("classification", found.detach(), batch["labels"])[:2])
        return nn.functional.cross_entropy(found, batch["labels"])

    for epoch in range(len(state["epochs"]), settings["epochs"]):
        seen = torch.full((2, len(rows["train"])), torch.nan)
        begin, name = time.monotonic(), f"{path.stem}, epoch {epoch + 1} of {settings['epochs']}"
        with progress.step(name, "epoch"):
            torch.manual_seed(1000 * seed + epoch)
            model.train()
            one_epoch(progress.each(length_batches(rows["train"], chosen), name), loss, optimizer, schedule)
            state["epochs"].append({split: accuracy(model, rows[split]) for split in ("selection", "test")})
            state["weights"].append({name: p.detach().clone() for name, p in trained.items()})
            state["seen"].append(seen)
            state["seconds"] += time.monotonic() - begin
            _save_epoch(path, state, epoch + 1 == settings["epochs"], optimizer, schedule)
    return state


def one_epoch(
    batches: Iterable[list[int]], loss: Callable[[list[int]], Tensor], optimizer: Any, schedule: Any = None
) -> float:
    """A step for every batch of row numbers; the losses, each times its rows, summed."""
    total = 0.0
    for part in batches:
        found = loss(part)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        total += float(found.detach()) * len(part)
    return total


def _save_epoch(path: Path, state: dict[str, Any], last: bool, optimizer: Any, schedule: Any = None) -> None:
    """What the next epoch goes on from; after the last one the optimizer's state is of no use, and is left out."""
    for name, part in (("optimizer", optimizer), ("schedule", schedule)):
        state.pop(name, None)
        if part is not None and not last:
            state[name] = part.state_dict()
    protocol.save(path, state)


def length_batches(rows: list[dict[str, Any]], chosen: list[int]) -> list[list[int]]:
    """Random batches of samples of like length: sorted within pools of 16 batches, so that little is padding."""
    order = [chosen[i] for i in torch.randperm(len(chosen)).tolist()]
    pools = [
        sorted(order[i : i + 16 * BATCH], key=lambda j: len(rows[j]["input_ids"]))
        for i in range(0, len(order), 16 * BATCH)
    ]
    batches = [pool[i : i + BATCH] for pool in pools for i in range(0, len(pool), BATCH)]
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def accuracy(model: nn.Module, rows: list[dict[str, Any]]) -> float:
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    right = 0
    with torch.no_grad():
        for begin in range(0, len(order), 64):
            batch = collate([rows[i] for i in order[begin : begin + 64]], model)
            right += int((logits(model, batch).argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def causal_model(
    vocabulary: int,
    rows: list[dict[str, Any]],
    path: Path,
    progress: protocol.Progress,
    seed: int,
    settings: dict[str, Any],
    start: dict[str, Tensor] | None = None,
) -> tuple[nn.Module, list[float]]:
    """A Llama of four blocks trained on prompts and answers, from nothing or from ``start``; the loss of each epoch.

    An epoch is kept.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    if start is not None:
        model.load_state_dict(start)
    return model, fit_causal(model, rows, path, progress, seed, settings)


def fit_causal(
    model: nn.Module,
    rows: list[dict[str, Any]],
    path: Path,
    progress: protocol.Progress,
    seed: int,
    settings: dict[str, Any],
) -> list[float]:
    """Train what of a causal model is not frozen, and leave it in ``eval``; the loss of each epoch, which is kept."""
    state: dict[str, Any] = protocol.load(path) if path.exists() else {"loss": []}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.get("lr", 1e-3))
    if state["loss"]:
        model.load_state_dict(state["model"])
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])

    def loss(part: list[int]) -> Tensor:
        batch = collate([rows[i] for i in part], model)
        labels = batch.pop("labels")
        found = model(**batch).logits[:, :-1]
        return nn.functional.cross_entropy(found.flatten(0, 1), labels[:, 1:].flatten())

    for epoch in range(len(state["loss"]), settings["epochs"]):
        name = f"{path.stem}, epoch {epoch + 1} of {settings['epochs']}"
        with progress.step(name, "epoch"):
            torch.manual_seed(1000 * seed + epoch)
            model.train()
            batches = length_batches(rows, list(range(len(rows))))
            state["loss"].append(one_epoch(progress.each(batches, name), loss, optimizer) / len(rows))
            state["model"] = model.state_dict()
            _save_epoch(path, state, epoch + 1 == settings["epochs"], optimizer)
    model.eval()
    return list(state["loss"])


def with_lora(model: nn.Module, seed: int) -> nn.Module:
    """A causal model whose weights are frozen, with fresh LoRA matrices on query, value, embedding and head."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["embed_tokens", "q_proj", "v_proj", "lm_head"]
    settings = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
    return get_peft_model(model, settings)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
