"""What every method is computed from, and the one place that turns a method's name into influence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
from influence_fast.observe import before_fine_tuning, class_opinion, hidden_states, kronecker_factors, word_gradients
from influence_fast.opinions import neighbour_opinion, neighbours, pooled, probe_opinion
from influence_fast.rows import checked_rows
from influence_fast.store import GradientStore

_CONTRAST = tuple(f"contrast-{method}" for method in ("dot", "cosine", "datainf", "trak", "trackstar"))
METHODS = (*GRADIENT_METHODS, *_CONTRAST, "outlier", "repsim", "we", "we_topk", "neighbours", "pool")
NEED_CLASSES = (*_CONTRAST, "outlier", "neighbours", "pool")
_TOP_WORDS = 10
_NEIGHBOURS = 50


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

    ``folder`` takes the store of label contrasts; ``pool_weights`` are those of the last ``pool``.
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
    pool_weights: dict[str, float] = field(default_factory=dict)

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
            labels, trusted = self._labels()
            return self._of_no_query(outlier(self.train, self.queries, labels, trusted))
        if method == "neighbours":
            labels, _ = self._labels()
            return self._of_no_query(neighbours(self._states_before()[0], labels, self._near(labels)))
        if method == "pool":
            return self._of_no_query({"pool": self._pool()[None].float()})
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

    @staticmethod
    def _of_no_query(scores: dict[str, Tensor]) -> Matrix:
        """One row for all queries, which counts as predicted correctly."""
        return InMemory(scores, torch.ones(1, dtype=torch.bool))

    def _labels(self) -> list[list[int]]:
        return [[row["labels"] for row in part.rows] for part in (self.samples, self.trusted)]

    @staticmethod
    def _near(labels: list[int]) -> int:
        return min(_NEIGHBOURS, max(1, len(labels) // 4))

    def _states_before(self) -> list[dict[str, Tensor]]:
        with before_fine_tuning(self.model):
            return self._passed(hidden_states, "mean")

    def _pool(self) -> Tensor:
        """The model, neighbours in its last block before fine-tuning and a probe of all its blocks then."""
        labels, trusted = self._labels()
        states = self._states_before()
        last = [next(reversed(side.values())) for side in states]
        every = [torch.cat(list(side.values()), 1) for side in states]
        own = self._passed(class_opinion)
        classes = own[0].shape[1]
        opinions = [
            (own[0], own[1]),
            neighbour_opinion(last[0], labels, last[1], self._near(labels), classes),
            probe_opinion(every[0], labels, every[1], classes),
        ]
        scores, weights = pooled(opinions, labels, trusted)
        self.pool_weights = dict(zip(("model", "neighbours", "probe"), weights.tolist(), strict=True))
        return scores

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
