"""What every method is computed from, and the one place that turns a method's name into influence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from influence_fast.aggregate import InMemory, Matrix
from influence_fast.build import build_store
from influence_fast.data import Samples
from influence_fast.influence import METHODS as GRADIENT_METHODS
from influence_fast.influence import influence
from influence_fast.methods import label_contrast, outlier, word_influence
from influence_fast.observe import hidden_states, kronecker_factors, word_gradients
from influence_fast.rows import checked_rows
from influence_fast.store import GradientStore

_CONTRAST = tuple(f"contrast-{method}" for method in ("dot", "cosine", "datainf", "trak", "trackstar"))
METHODS = (*GRADIENT_METHODS, *_CONTRAST, "outlier", "repsim", "we", "we_topk")
NEED_CLASSES = (*_CONTRAST, "outlier")
_TOP_WORDS = 10


class Settings(Protocol):
    """How gradients are taken; an audit's configuration is one."""

    projection: str
    dtype: str
    precision: str | None
    batch_tokens: int | str
    truncate: bool


@dataclass
class Sources:
    """What influence is computed from: two stores, and the model and rows for what they do not hold.

    ``folder`` takes the store of label contrasts.
    """

    model: nn.Module
    samples: Samples
    trusted: Samples
    train: GradientStore
    queries: GradientStore
    folder: Path
    settings: Settings
    task: str
    progress: bool

    @property
    def correct(self) -> Tensor | None:
        return self.queries.column("correct") if "correct" in self.queries.columns else None

    def matrix(self, method: str) -> Matrix:
        """Influence by any of :data:`METHODS`."""
        if method == "ekfac":
            layers = self.train.layers
            factors = kronecker_factors(
                self.model,
                self._rows(self.samples),
                layers,
                batch_tokens=self.settings.batch_tokens,
                progress=self.progress,
            )
            return influence(self.train, self.queries, method, factors=factors)
        if method.startswith("contrast-"):
            return influence(self._contrast(), self.queries, method.removeprefix("contrast-"))
        if method == "outlier":
            labels = [[row["labels"] for row in part.rows] for part in (self.samples, self.trusted)]
            return InMemory(outlier(self.train, self.queries, *labels), torch.ones(1, dtype=torch.bool))
        if method == "repsim":
            pooling = "mean" if self.task == "classification" else "last"
            states = self._passed(hidden_states, pooling)
            matrix = influence(states[0], states[1], "cosine")
            matrix.query_correct = self.correct
            return matrix
        if method in ("we", "we_topk"):
            words = self._passed(word_gradients)
            top = _TOP_WORDS if method == "we_topk" else None
            return InMemory(word_influence(words[0], words[1], top), self.correct)
        return influence(self.train, self.queries, method)

    def _passed(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        settings = {"batch_tokens": self.settings.batch_tokens, "progress": self.progress}
        return [function(self.model, self._rows(part), *arguments, **settings) for part in (self.samples, self.trusted)]

    def _rows(self, part: Samples) -> Any:
        return checked_rows(self.model, part.rows, self.task, part.ids, self.settings.truncate)[0]

    def _contrast(self) -> GradientStore:
        return build_store(
            self.folder / "stores" / "contrast",
            self.model,
            self.samples.rows,
            self.train.layers,
            self.settings.projection,
            loss=label_contrast,
            batch_tokens=self.settings.batch_tokens,
            dtype=self.settings.dtype,
            precision=self.settings.precision,
            truncate=self.settings.truncate,
            ids=self.samples.ids,
            progress=self.progress,
        )
