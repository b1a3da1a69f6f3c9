"""An audit from nothing: makes a data set, flips labels, trains a small transformer, finds the flips. Offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import influence_fast as inf
from influence_fast.errors import InputError

if TYPE_CHECKING:
    from influence_fast.auditing.result import AuditResult

FLIPPED = 0.2
_QUERIES = 240

_LIKED = ["lovely", "superb", "moving", "witty", "bright", "tender", "clever", "honest", "fresh", "charming"]
_DISLIKED = ["dull", "clumsy", "stale", "shallow", "noisy", "tedious", "hollow", "lazy", "grating", "bland"]
_PARTS = ["film", "plot", "cast", "script", "score", "scene", "ending", "story", "pace", "camera", "hero", "music"]
_JOINS = ["and", "but", "while", "though", "because"]
_FILLERS = ["the", "a", "its", "this", "really", "rather", "quite", "somehow", "often", "mostly", "perhaps", "again"]
_WORDS = ["[PAD]", "[CLS]", *_LIKED, *_DISLIKED, *_PARTS, *_JOINS, *_FILLERS, "not"]


def sentences(count: int, generator: torch.Generator) -> tuple[list[str], list[int]]:
    """Reviews of two or three clauses; the label is the majority's, and "not" turns a word's sentiment round."""

    def draw(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    def chance(probability: float) -> bool:
        return bool(torch.rand((), generator=generator) < probability)

    texts, labels = [], []
    for _ in range(count):
        label = int(chance(0.5))
        clauses = []
        sentiments = [label, label, 1 - label] if chance(0.4) else [label, label]
        for place in torch.randperm(len(sentiments), generator=generator).tolist():
            negated = chance(0.2)
            word = draw(_LIKED if sentiments[place] != negated else _DISLIKED)
            clauses.append(" ".join([draw(_FILLERS), draw(_PARTS), *(["not"] if negated else []), word]))
        texts.append(f" {draw(_JOINS)} ".join(clauses))
        labels.append(label)
    return texts, labels


def run_demo(out: str | Path, *, samples: int = 1200, seed: int = 0, progress: bool = True) -> AuditResult:
    """Train on ``samples`` sentences of which a fifth have a flipped label, and audit them.

    Everything is real and follows from ``seed``: data, flips, training, gradients. Writes the report to ``out``.
    """
    if samples < 50:
        raise InputError(f"samples: expected at least 50, got {samples}")
    generator = torch.Generator().manual_seed(seed)
    texts, labels = sentences(samples + _QUERIES, generator)
    noise = torch.zeros(samples, dtype=torch.bool)
    noise[torch.randperm(samples, generator=generator)[: round(FLIPPED * samples)]] = True
    rows = [_row(text, label) for text, label in zip(texts, labels, strict=True)]
    train = [
        {**row, "labels": row["labels"] ^ int(bad), "noise": bool(bad), "text": text}
        for row, text, bad in zip(rows, texts, noise, strict=False)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model()
        _fit(model, train, progress)
    return inf.audit(
        model,
        train,
        rows[samples:],
        out=out,
        noise_column="noise",
        layers="embedding,attention,mlp,head",
        projection="rademacher:16x16",
        seed=seed,
        progress=progress,
    )


def _row(text: str, label: int) -> dict[str, Any]:
    return {"input_ids": [1, *(_WORDS.index(word) for word in text.split())], "labels": label}


def _model() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=len(_WORDS),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config)


def _fit(model: nn.Module, rows: list[dict[str, Any]], progress: bool, epochs: int = 8, batch: int = 32) -> None:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    steps = epochs * -(-len(rows) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=steps, pct_start=0.1)
    model.train()
    with tqdm(total=steps, desc="training", delay=2, disable=None if progress else True) as bar:
        for _ in range(epochs):
            for part in torch.randperm(len(rows)).split(batch):
                loss = nn.functional.cross_entropy(_logits(model, ids[part]), labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=(ids != 0).long()).logits
