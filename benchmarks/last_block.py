"""Fine-tuning of an encoder's last block and head, on what the frozen blocks below give: computed once for every row.

A fine-tuning then takes seconds, so that what cleaning is worth can be asked with many models on two cores. The model is an
ordinary PEFT adapter, and gives the same logits whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.data.batching import collate

Cached = list[Tensor]


def last_block_encoder(folder: str, seed: int) -> nn.Module:
    """The pretrained BERT with fresh LoRA matrices on all linear layers of its last block, and a fresh head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    settings = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["query", "key", "value", "dense"],
        layers_to_transform=[model.config.num_hidden_layers - 1],
    )  # fmt: skip
    return get_peft_model(model, settings)


def below(model: nn.Module, rows: list[dict[str, Any]], size: int = 64) -> Cached:
    """The input of the last block for each row, ``(tokens, width)``."""
    found: Cached = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    model.eval()
    with torch.no_grad():
        for begin in range(0, len(order), size):
            part = order[begin : begin + size]
            batch = collate([rows[i] for i in part], model)
            batch.pop("labels")
            states = model(**batch, output_hidden_states=True).hidden_states[-2]
            for i, state in zip(part, states, strict=True):
                found[i] = state[: len(rows[i]["input_ids"])].clone()
    return found


def above(model: Any, states: list[Tensor]) -> Tensor:
    """Logits ``(rows, classes)`` from the last block's inputs."""
    inner = model.base_model.model
    padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
    lengths = torch.tensor([len(state) for state in states])
    outside = torch.arange(padded.shape[1]) >= lengths[:, None]
    mask = torch.zeros(padded.shape[:2]).masked_fill(outside, torch.finfo(torch.float32).min)
    found = inner.bert.encoder.layer[-1](padded, attention_mask=mask[:, None, None])
    out = found if isinstance(found, Tensor) else found[0]
    return inner.classifier(inner.dropout(inner.bert.pooler(out)))


def fine_tune(
    folder: str,
    seed: int,
    states: Cached,
    labels: list[int],
    epochs: int,
    lr: float,
    batch: int,
    watch: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """The adapter trained by AdamW with a cosine schedule; the same seed starts from the same weights.

    ``watch`` is called with the model, in evaluation mode, after each epoch.
    """
    from transformers import get_cosine_schedule_with_warmup

    model, target = last_block_encoder(folder, seed), torch.tensor(labels)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    steps = epochs * -(-len(labels) // batch)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(labels), generator=random).tolist()
        for begin in range(0, len(order), batch):
            part = order[begin : begin + batch]
            loss = nn.functional.cross_entropy(above(model, [states[i] for i in part]), target[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if watch is not None:
            watch(model.eval())
    return model.eval()


def logits(model: nn.Module, states: Cached, size: int = 64) -> Tensor:
    """Of all rows: ``(rows, classes)``."""
    with torch.no_grad():
        return torch.cat([above(model, states[begin : begin + size]) for begin in range(0, len(states), size)])


def accuracy(model: nn.Module, states: Cached, labels: list[int]) -> float:
    """Share of rows whose class the model finds."""
    return float((logits(model, states).argmax(-1) == torch.tensor(labels)).double().mean())
