"""Data sets with wrong labels of a known kind: tables for a small network, and texts for a pretrained encoder.

Tables come with packages: scikit-learn's digits, wine and breast cancer, river's image segments, and the language of eight
frequent words by wordfreq. Each column is one of 17 whole numbers, and a network of two hidden layers learns them. Texts are
sst2, cola and mrpc; the last block (by LoRA) and the head of an encoder are fine-tuned on them.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import last_block
from benchmarks.paper_tasks import CLASSIFICATION, encoded
from influence_fast.data import label_noise
from influence_fast.data.batching import collate

KINDS = ("uniform", "by class", "boundary", "annotator", "duplicates", "backdoor")
LEVELS, WIDTH, TARGET = 16, 32, 1
Rows = list[dict[str, Any]]


class Table(nn.Module):
    """Columns from 0 to 16 to classes. Its states are the same at every column, as a reader of sequences asks for them."""

    def __init__(self, columns: int, classes: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            output_hidden_states=False, hidden_size=WIDTH, num_hidden_layers=2, num_labels=classes
        )
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, WIDTH)) for width in (columns, WIDTH)])
        self.head = nn.Linear(WIDTH, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> SimpleNamespace:
        columns = input_ids.float() / LEVELS - 0.5
        states = [columns]
        for layer in self.layers:
            states.append(torch.relu(layer(states[-1])))
        spread = [state[:, None].expand(-1, columns.shape[1], -1) for state in states]
        return SimpleNamespace(
            logits=self.head(states[-1]), hidden_states=tuple(spread) if output_hidden_states else None
        )


@dataclass(frozen=True)
class Part:
    """Items (rows of columns, or lists of texts) and their classes."""

    items: list[Any]
    labels: list[int]

    def some(self, rows: Sequence[int]) -> Part:
        return Part([self.items[i] for i in rows], [self.labels[i] for i in rows])

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Split:
    """Training rows with right labels, trusted rows, and rows that measure accuracy."""

    train: Part
    trusted: Part
    test: Part


@dataclass(frozen=True)
class Task:
    """One data set and the model that learns it. ``seed`` draws rows; items are what :class:`Part` holds.

    Attributes:
        classes: how many.
        split: ``(seed, training rows, trusted rows)`` at most.
        rows: items and labels as an audit takes them.
        features: of items, for simple models: ``(n, width)``.
        states: of items, that no label was learned from, for neighbours and probes: float ``(n, width)`` of all blocks, and
            of the last one.
        near, triggered: ``(item, numpy generator)``: a near-duplicate, and the item with a trigger.
        fit: ``(part, seed)``: a model, and its logits of the rows after each epoch ``(epochs, n, classes)``.
        logits: of items by a model.
    """

    name: str
    classes: int
    split: Callable[[int, int, int], Split]
    rows: Callable[[Part], Rows]
    features: Callable[[list[Any]], np.ndarray]
    states: Callable[[list[Any]], tuple[Tensor, Tensor]]
    near: Callable[[Any, np.random.Generator], Any]
    triggered: Callable[[Any, np.random.Generator], Any]
    fit: Callable[[Part, int], tuple[nn.Module, Tensor]]
    logits: Callable[[nn.Module, list[Any]], Tensor]


def spoil(task: Task, clean: Part, kind: str, share: float, seed: int) -> tuple[Part, Tensor]:
    """Rows as they are given, and which of their labels are wrong; duplicates stand behind the rows they are copies of.

    - ``by class``: rows of the first class three times as often.
    - ``boundary``: the rows that a logistic regression, fitted without them, is least sure of.
    - ``annotator``: rows that a naive Bayes model of few rows gets wrong, with the label it gives; fewer where it errs less.
    - ``backdoor``: a trigger, and the label 1.
    """
    random, labels, items = np.random.default_rng([seed, 5]), clean.labels, clean.items
    if kind == "uniform":
        found, wrong = label_noise.uniform(labels, share, task.classes, seed)
        return Part(items, found), wrong
    if kind == "by class":
        found, wrong = label_noise.by_class(labels, share, task.classes, [3.0] + [1.0] * (task.classes - 1), seed)
        return Part(items, found), wrong
    if kind == "boundary":
        found, wrong = label_noise.boundary(labels, judged(task.features(items), labels, task.classes), share)
        return Part(items, found), wrong
    if kind == "annotator":
        given = np.array(annotated(task.features(items), labels, 20 * task.classes, random))
        chosen = random.permutation(np.flatnonzero(given != labels))[: round(share * len(labels))]
        wrong = torch.zeros(len(labels), dtype=torch.bool)
        wrong[torch.from_numpy(chosen)] = True
        return Part(items, np.where(wrong.numpy(), given, labels).tolist()), wrong
    wrong_rows = random.permutation([i for i, label in enumerate(labels) if kind == "duplicates" or label != TARGET])
    chosen = wrong_rows[: round(share * len(labels))]
    if kind == "duplicates":
        shift = random.integers(1, task.classes, len(chosen))
        other = [(labels[i] + int(by)) % task.classes for i, by in zip(chosen, shift, strict=True)]
        both = Part([*items, *(task.near(items[i], random) for i in chosen)], [*labels, *other])
        return both, torch.arange(len(both)) >= len(labels)
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.from_numpy(chosen)] = True
    marked = [task.triggered(item, random) if bad else item for item, bad in zip(items, wrong.tolist(), strict=True)]
    return Part(marked, [TARGET if bad else label for label, bad in zip(labels, wrong.tolist(), strict=True)]), wrong


def judged(features: np.ndarray, labels: list[int], classes: int) -> Tensor:
    """Class probabilities by logistic regression, out of fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    found = cross_val_predict(LogisticRegression(max_iter=1000), features, labels, cv=3, method="predict_proba")
    out = torch.zeros(len(labels), classes, dtype=torch.float64)
    out[:, np.unique(labels)] = torch.from_numpy(found)
    return out


def annotated(features: np.ndarray, labels: list[int], count: int, random: np.random.Generator) -> list[int]:
    """Labels by naive Bayes that has seen some of the rows, at most half of them."""
    from sklearn.naive_bayes import MultinomialNB

    seen = random.permutation(len(labels))[: min(count, len(labels) // 2)]
    return list(MultinomialNB().fit(features[seen], np.array(labels)[seen]).predict(features).tolist())


def tables(epochs: int, lacking: Container[str] = ()) -> dict[str, Task]:
    """The tables, by name, without those whose package is missing; a fit takes so many epochs."""
    names = ("digits", "wine", "breast cancer", "image segments", "languages")
    return {name: table_task(name, epochs) for name in names if name not in lacking}


@lru_cache
def table_rows(task: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns as whole numbers from 0 to 16, and classes."""
    x, y = _segments() if task == "image segments" else _languages() if task == "languages" else _of_sklearn(task)
    low, high = x.min(0), x.max(0)
    return np.rint((x - low) / np.where(high > low, high - low, 1) * LEVELS).astype(np.int64), y


def _of_sklearn(task: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn import datasets

    load = {"digits": datasets.load_digits, "wine": datasets.load_wine, "breast cancer": datasets.load_breast_cancer}
    x, y = load[task](return_X_y=True)
    return x, y


def _segments() -> tuple[np.ndarray, np.ndarray]:
    """2,310 patches of photographs: 18 figures each, seven kinds of surface."""
    from river.datasets import ImageSegments

    pairs = list(ImageSegments())
    kinds = sorted({label for _, label in pairs})
    x = np.array([[row[name] for name in sorted(row)] for row, _ in pairs], dtype=np.float64)
    # A few patches are far from all others: by their order among all, so that every column says something.
    ranks = x.argsort(0, kind="stable").argsort(0, kind="stable").astype(np.float64)
    return ranks, np.array([kinds.index(label) for _, label in pairs])


def _languages() -> tuple[np.ndarray, np.ndarray]:
    """100 rows of each of 20 languages: pairs of letters in eight frequent words, by 128 buckets."""
    from wordfreq import top_n_list

    codes = "ca cs da de en es fi fil fr hu id it lt lv nl pl pt ro sv tr".split()  # noqa: SIM905
    random = np.random.default_rng(0)
    x = np.zeros((100 * len(codes), 128))
    for i, row in enumerate(x):
        words = random.choice(top_n_list(codes[i // 100], 2000), 8)
        for word in (f"^{word}$" for word in words):
            for pair in itertools.pairwise(word):
                row[zlib.crc32("".join(pair).encode()) % 128] += 1
    # More than four of a pair say no more.
    return x.clip(0, 4), np.arange(len(x)) // 100


def table_task(name: str, epochs: int) -> Task:
    x, y = table_rows(name)
    classes = int(y.max()) + 1

    def split(seed: int, samples: int, trusted: int) -> Split:
        order = np.random.default_rng([seed, 3]).permutation(len(y))
        asked = order[: min(trusted, len(y) // 4)]
        test = order[len(asked) :][: min(500, len(y) // 5)]
        train = order[len(asked) + len(test) :][:samples]
        return Split(*(Part(list(x[part]), y[part].tolist()) for part in (train, asked, test)))

    def rows(part: Part) -> Rows:
        return [
            {"input_ids": item.tolist(), "labels": label} for item, label in zip(part.items, part.labels, strict=True)
        ]

    def near(item: np.ndarray, random: np.random.Generator) -> np.ndarray:
        # One step up or down in a few columns.
        moved = item + random.integers(-1, 2, item.shape) * (random.random(item.shape) < 0.1)
        return moved.clip(0, LEVELS)

    def triggered(item: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return np.where(np.arange(len(item)) < 3, LEVELS, item)

    def states(items: list[Any]) -> tuple[Tensor, Tensor]:
        found = torch.from_numpy(np.array(items)).float()
        return found, found

    def logits(model: nn.Module, items: list[Any]) -> Tensor:
        with torch.no_grad():
            return model(torch.from_numpy(np.array(items))).logits

    def fitted(part: Part, seed: int) -> tuple[nn.Module, Tensor]:
        return fit(rows(part), classes, seed, epochs)

    return Task(name, classes, split, rows, np.array, states, near, triggered, fitted, logits)


def fit(rows: Rows, classes: int, seed: int, epochs: int) -> tuple[nn.Module, Tensor]:
    """The network after some epochs of Adam, and its logits after each ``(epochs, n, classes)``."""
    torch.manual_seed(seed)
    model = Table(len(rows[0]["input_ids"]), classes)
    batch = collate(rows, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(epochs):
        for part in torch.randperm(len(rows)).split(32):
            loss = nn.functional.cross_entropy(model(batch["input_ids"][part]).logits, batch["labels"][part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            history.append(model(batch["input_ids"]).logits)
    return model.eval(), torch.stack(history)


def texts(data: Path, model: str, epochs: int) -> dict[str, Task]:
    """sst2, cola and mrpc of a folder, for a pretrained encoder; a fit takes so many epochs."""
    return {name: text_task(name, data, model, epochs) for name in CLASSIFICATION}


def text_task(name: str, data: Path, base: str, epochs: int) -> Task:
    columns = CLASSIFICATION[name]

    def split(seed: int, samples: int, trusted: int) -> Split:
        random = np.random.default_rng([seed, 3])
        parts = []
        for file in ("train", "validation"):
            lines = [json.loads(line) for line in (data / name / f"{file}.jsonl").read_text("utf-8").splitlines()]
            order = random.permutation(len(lines))
            parts.append(Part([[lines[i][c] for c in columns] for i in order], [lines[i]["label"] for i in order]))
        asked = min(trusted, len(parts[1]) // 2)
        test = parts[1].some(range(asked, min(asked + 500, len(parts[1]))))
        return Split(parts[0].some(range(samples)), parts[1].some(range(asked)), test)

    def rows(part: Part) -> Rows:
        given = [{"text": item, "label": label} for item, label in zip(part.items, part.labels, strict=True)]
        return encoded(base, given)

    def features(items: list[Any]) -> np.ndarray:
        from sklearn.feature_extraction.text import TfidfVectorizer

        return np.asarray(TfidfVectorizer().fit_transform([" ".join(item) for item in items]).toarray())

    def near(item: list[str], random: np.random.Generator) -> list[str]:
        seed = int(random.integers(2**31))
        return [*item[:-1], label_noise.duplicates(item[-1:], [0], 1.0, 2, seed)[0][-1]]

    def triggered(item: list[str], random: np.random.Generator) -> list[str]:
        seed = int(random.integers(2**31))
        return [*item[:-1], label_noise.backdoor(item[-1:], [0], 1.0, TARGET, "cf mn", seed)[0][-1]]

    def inputs(items: list[Any]) -> last_block.Cached:
        return _passed(base, tuple(map(tuple, items)))[0]

    def states(items: list[Any]) -> tuple[Tensor, Tensor]:
        return _passed(base, tuple(map(tuple, items)))[1:]

    def fitted(part: Part, seed: int) -> tuple[nn.Module, Tensor]:
        found = inputs(part.items)
        history: list[Tensor] = []

        def watch(model: nn.Module) -> None:
            history.append(last_block.logits(model, found))

        return last_block.fine_tune(base, seed, found, part.labels, epochs, 1e-3, 16, watch), torch.stack(history)

    def logits(model: nn.Module, items: list[Any]) -> Tensor:
        return last_block.logits(model, inputs(items))

    return Task(name, 2, split, rows, features, states, near, triggered, fitted, logits)


@lru_cache(maxsize=4)
def _passed(base: str, items: tuple[tuple[str, ...], ...]) -> tuple[last_block.Cached, Tensor, Tensor]:
    """What the frozen blocks give for texts: inputs of the last block, mean states of all blocks, and of the last one."""
    rows = encoded(base, [{"text": list(item), "label": 0} for item in items])
    found = last_block.below(last_block.last_block_encoder(base, 0), rows)
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    states = list(inf.hidden_states(network.eval(), rows, "mean", progress=False).values())
    return found, torch.cat(states, 1), states[-1]
