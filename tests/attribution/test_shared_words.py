"""Influence through shared words against the embedding's gradient."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor

import influence_fast as inf

NAMES = ["bert", "gpt2", "llama"]


def rows(task: str = "classification", count: int = 7, seed: int = 1) -> list[dict]:
    return models.rows(task, count, seed)


@pytest.mark.parametrize(
    ("name", "task"), [("bert", "classification"), ("gpt2", "classification"), ("llama", "causal")]
)
def test_word_influence_is_the_embedding_gradient_row_by_row(name: str, task: str) -> None:
    model = models.make(name, task)
    samples = [rows(task, 7, 1), rows(task, 4, 2)]
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    train, queries = (models.oracle(model, part, [embedding])[embedding].mT for part in samples)
    words = [inf.word_gradients(model, part, batch_tokens=20, progress=False) for part in samples]
    expected = torch.einsum("qwd,nwd->qn", queries, train)
    found = inf.word_influence(words[0], words[1])["embedding"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)

    def longest(gradients: Tensor, k: int) -> Tensor:
        kept = gradients.norm(dim=2).topk(k, dim=1).indices
        return torch.zeros_like(gradients).scatter(1, kept[..., None].expand(-1, -1, gradients.shape[2]), 1) * gradients

    top = torch.einsum("qwd,nwd->qn", longest(queries, 2), longest(train, 2))
    found = inf.word_influence(words[0], words[1], top=2)["embedding"]
    torch.testing.assert_close(found.double(), top, rtol=1e-3, atol=1e-6)
