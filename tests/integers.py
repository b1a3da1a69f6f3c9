"""A model of small integers: what it computes is exact in float32, whatever the order of sums, the batches and the threads,
so that its stores have the same bytes on every machine. Imports no transformers: processes that tests start are quick."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCAB = 37


class IntegerModel(nn.Module):
    """The sum over tokens of a linear map of their embeddings. Goes with ``integer_loss``."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.classifier = nn.Linear(width, 3, bias=False)
        for layer, highest in ((self.embedding, 5), (self.classifier, 3)):
            shape = layer.weight.shape
            values = torch.arange(shape.numel()).mul(7).remainder(2 * highest + 1) - highest
            layer.weight = nn.Parameter(values.float().view(shape))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.classifier(self.embedding(input_ids)) * attention_mask[..., None]).sum(1)


def integer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Per-sample loss of an ``IntegerModel``: the label's logit, less that of the next label."""
    logits, labels = model(batch["input_ids"], batch["attention_mask"]), batch["labels"][:, None]
    return (logits.gather(1, labels) - logits.gather(1, (labels + 1) % 3))[:, 0]


def integer_rows(count: int) -> list[dict]:
    """Samples of 4 to 9 tokens with labels 0, 1, 2, in turn."""
    return [
        {"input_ids": [3 + (7 * i + 5 * t) % 34 for t in range(4 + i * i % 6)], "labels": i % 3} for i in range(count)
    ]
