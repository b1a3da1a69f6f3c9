"""What every method is computed from, and the one place that turns a method's name into influence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from influence_fast.attribution.aggregation import InMemory, Matrix
from influence_fast.attribution.influence_matrix import METHODS as GRADIENT_METHODS
from influence_fast.attribution.influence_matrix import InfluenceMatrix, influence
from influence_fast.attribution.label_quality import neighbour_opinion, neighbours, pooled, probe_opinion
from influence_fast.attribution.methods import FITTED, fitted_influence, label_contrast, outlier, word_influence
from influence_fast.attribution.model_passes import (
    class_opinion,
    hidden_states,
    kronecker_factors,
    word_gradients,
)
from influence_fast.data import label_noise as noise
from influence_fast.data.batching import checked_rows
from influence_fast.data.samples import Samples
from influence_fast.gradients.build import build_store
from influence_fast.gradients.model_state import before_fine_tuning
from influence_fast.gradients.store import GradientStore

_CONTRAST = tuple(f"contrast-{method}" for method in ("dot", "cosine", "datainf", "trak", "trackstar"))
_FITTED = tuple(f"fitted-{method}" for method in FITTED)
METHODS = (*GRADIENT_METHODS, *_CONTRAST, *_FITTED, "outlier", "repsim", "we", "we_topk", "neighbours", "pool")
NEED_CLASSES = (*_CONTRAST, *_FITTED, "outlier", "neighbours", "pool")
FITTED_TO_QUERIES = (*_FITTED, "pool")
_TOP_WORDS = 10
_NEIGHBOURS = 50
# Weights are fitted no better to more.
_FITTED_QUERIES = 2000
# Multiplications that whitening all layers may take within a pool: about a minute on two cores.
_WHITENING = 2e12


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
            store = self._store("contrast", self.samples, loss=label_contrast)
            return influence(store, self.queries, method.removeprefix("contrast-"))
        if method in FITTED_TO_QUERIES:
            return self.fitted(method, [None])[0]
        if method == "outlier":
            labels, trusted = self._labels()
            return self._of_no_query(outlier(self.train, self.queries, labels, trusted))
        if method == "neighbours":
            labels, _ = self._labels()
            return self._of_no_query(neighbours(self._states_before()[0], labels, self._near(labels)))
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

    def fitted(self, method: str, subsets: Sequence[Tensor | None]) -> list[Matrix]:
        """Influence by one of :data:`FITTED_TO_QUERIES`, fitted to some queries (their numbers) at a time."""
        if method == "pool":
            return [self._of_no_query({"pool": scores[None].float()}) for scores in self._pools(subsets)]
        shown, right = self._shown()
        matrix = self._between(shown, method.removeprefix("fitted-"))
        return [self._of_no_query(fitted_influence(matrix, right, some)[0]) for some in subsets]

    def halves(self, random: torch.Generator) -> list[Tensor]:
        """Two disjoint halves of the queries to fit to; none where a half would lack right labels or wrong ones."""
        _, right = self._shown()
        kinds = [kind.nonzero()[:, 0] for kind in (right, ~right)]
        if min(len(kind) for kind in kinds) < 2:
            return []
        parts = [kind[torch.randperm(len(kind), generator=random)].chunk(2) for kind in kinds]
        return [torch.cat(half) for half in zip(*parts, strict=True)]

    @staticmethod
    def _of_no_query(scores: dict[str, Tensor]) -> Matrix:
        """One row for all queries, which counts as predicted correctly."""
        return InMemory(scores, torch.ones(1, dtype=torch.bool))

    def _labels(self) -> list[list[int]]:
        return [[row["labels"] for row in part.rows] for part in (self.samples, self.trusted)]

    @staticmethod
    def _near(labels: Sequence[int] | Tensor) -> int:
        return min(_NEIGHBOURS, max(1, len(labels) // 4))

    def _states_before(self) -> list[dict[str, Tensor]]:
        with before_fine_tuning(self.model):
            return self._passed(hidden_states, "mean")

    def _pools(self, subsets: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """The model, neighbours in its last block before fine-tuning, a probe of all its blocks then, and influence."""
        asked = replace(self, trusted=self._some_queries())
        labels, trusted = (torch.tensor(side) for side in asked._labels())
        states = asked._states_before()
        last = [next(reversed(side.values())) for side in states]
        every = [torch.cat(list(side.values()), 1) for side in states]
        own = asked._passed(class_opinion)
        classes = own[0].shape[1]
        opinions = {
            "model": (own[0], own[1]),
            "neighbours": neighbour_opinion(last[0], labels, last[1], self._near(labels), classes),
            "probe": probe_opinion(every[0], labels, every[1], classes),
        }
        shown, right = self._shown()
        work = sum(len(self.train) * dim * min(len(self.train), dim) for dim in self.train.dims.values())
        matrix = self._between(shown, "trackstar" if work <= _WHITENING else "cosine")
        given = labels, torch.tensor([row["labels"] for row in shown.rows])
        for some in subsets:
            rows, heard = torch.arange(len(trusted)) if some is None else some, dict(opinions)
            if len(right[rows].unique()) > 1:
                by_layer, asked_too = fitted_influence(matrix, right, rows)
                # Of the one label that a sample or query is given, the only one whose gradient there is.
                said = torch.cat(list(by_layer.values())).double().sum(0), asked_too
                train, queries = (
                    nn.functional.one_hot(label, classes) * odds[:, None]
                    for label, odds in zip(given, said, strict=True)
                )
                heard["influence"] = train, queries
            parts = [(train, queries[rows]) for train, queries in heard.values()]
            scores, weights = pooled(parts, labels, trusted[rows])
            self.pool_weights = dict(zip(heard, weights.tolist(), strict=True))
            yield scores

    def _between(self, shown: Samples, method: str) -> InfluenceMatrix:
        return influence(self.train, self._store("shown", shown), method)

    def _shown(self) -> tuple[Samples, Tensor]:
        """Trusted queries, half of them with a wrong label on purpose, and which have their own."""
        part = self._some_queries()
        classes = 1 + max(max(labels) for labels in self._labels())
        labels, wrong = noise.uniform([row["labels"] for row in part.rows], 0.5, classes)
        rows = [{**row, "labels": label} for row, label in zip(part.rows, labels, strict=True)]
        return replace(part, rows=rows), ~wrong

    def _some_queries(self) -> Samples:
        part = self.trusted
        some = torch.randperm(len(part.rows), generator=torch.Generator().manual_seed(0))[:_FITTED_QUERIES].tolist()
        ids = None if part.ids is None else [part.ids[i] for i in some]
        return replace(part, rows=[part.rows[i] for i in some], ids=ids)

    def _passed(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        settings = {"batch_tokens": self.settings.batch_tokens, "progress": self.progress}
        return [function(self.model, self._rows(part), *arguments, **settings) for part in (self.samples, self.trusted)]

    def _rows(self, part: Samples) -> Any:
        return checked_rows(self.model, part.rows, self.task, part.ids, self.settings.truncate)[0]

    def _store(self, name: str, part: Samples, loss: Any = "classification") -> GradientStore:
        """Gradients of other labels or another loss, in the layers and projection of ``train``."""
        return build_store(
            self.folder / "stores" / name,
            self.model,
            part.rows,
            self.train.layers,
            self.settings.projection,
            loss=loss,
            batch_tokens=self.settings.batch_tokens,
            dtype=self.settings.dtype,
            precision=self.settings.precision,
            truncate=self.settings.truncate,
            ids=part.ids,
            progress=self.progress,
        )
