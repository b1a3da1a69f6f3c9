"""What a method's maker is given: two stores, and the model and rows for what the stores do not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from influence_fast.attribution.gradient_source import Gradients
from influence_fast.attribution.influence_matrix import InMemory, InnerProductOptions, Matrix
from influence_fast.attribution.model_passes import ModelPasses
from influence_fast.attribution.recorded_checkpoint import RecordedCheckpoint
from influence_fast.attribution.registry import get_method
from influence_fast.data import label_noise
from influence_fast.data.samples import Samples
from influence_fast.errors import InputError
from influence_fast.gradients.job import prepare_job, write_store
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_writer import recorded

# Weights are fitted no better to more.
_FITTED_QUERIES = 2000
# How the folder of a store of the queries at a checkpoint begins.
_ASKED_AT = "queries-"
T = TypeVar("T")


CLASSES, PROBE, VOTES = "class log-probabilities", "probe", "votes of neighbours"
"""What a pool keeps for whoever asks for more than its ranking: :meth:`MethodInputs.kept`."""


@dataclass(frozen=True)
class MislabelledQueries:
    """Some trusted queries, half of them with a wrong label on purpose.

    Attributes:
        rows: their numbers among the queries, int64 ``(q,)``.
        labels: the label that each is given.
        right: boolean ``(q,)``, which have their own.
        store: their gradients with the labels they are given.
    """

    rows: Tensor
    labels: list[int]
    right: Tensor
    store: GradientStore


@dataclass(frozen=True)
class AuditInputs:
    """What an audit has beside the two stores.

    Attributes:
        model: the audited model.
        samples, trusted: the rows of training set and queries, with texts and labels.
        folder: where stores of other labels go.
        settings: how gradients are taken, in the layers and projection of the stores.
        task: ``classification`` or ``causal-lm``.
        passes: the model's passes, each made once.
        progress: whether to show it.
        checkpoints: of the recorded training, in the order of their steps.
        held_out: whether the queries are held-out training rows, which the model has learned.
    """

    model: nn.Module
    samples: Samples
    trusted: Samples
    folder: Path
    settings: BuildSettings
    task: str
    passes: ModelPasses
    progress: bool = True
    checkpoints: Sequence[RecordedCheckpoint] = ()
    held_out: bool = False


@dataclass(frozen=True)
class MethodInputs:
    """Everything that influence can be computed from; makers of methods get one.

    Attributes:
        train, queries: gradients, as stores or ``{layer: (rows, dim)}``.
        options: layers, damping, memory and factors of inner products.
        audit: model and rows; None where there are stores alone.
        fit_on: for methods that are fitted to the queries, numbers of those to fit to among
            :meth:`mislabelled_queries`; None for all.
        facts: what makers found worth reporting, such as the weights of a pool.
    """

    train: Gradients
    queries: Gradients
    options: InnerProductOptions = field(default_factory=InnerProductOptions)
    audit: AuditInputs | None = None
    fit_on: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def influence(self, method: str) -> Matrix:
        """Influence by any registered method.

        Where it came as ``{layer: (queries, samples)}``, the store of the queries says which are predicted correctly; one
        row stands for all of them and counts as correct.
        """
        made = get_method(method).make(self)
        if not isinstance(made, Mapping):
            return made
        matrix = InMemory(made)
        matrix.query_correct = torch.ones(1, dtype=torch.bool) if matrix.shape[0] == 1 else self.correct
        return matrix

    @property
    def given(self) -> AuditInputs:
        """Model and rows; InputError where there are stores alone."""
        if self.audit is None:
            raise InputError("method: this one needs the model and its rows; an audit has them")
        return self.audit

    @property
    def model(self) -> nn.Module:
        """The audited model."""
        return self.given.model

    @property
    def samples(self) -> Samples:
        """The training samples."""
        return self.given.samples

    @property
    def trusted(self) -> Samples:
        """The queries."""
        return self.given.trusted

    @property
    def task(self) -> str:
        """``classification`` or ``causal-lm``."""
        return self.given.task

    @property
    def passes(self) -> ModelPasses:
        """Hidden states, predictions and more of the model, each computed once."""
        return self.given.passes

    @property
    def correct(self) -> Tensor | None:
        """Which queries the model predicts correctly, boolean ``(m,)``, where the store knows."""
        if isinstance(self.queries, Mapping) or "correct" not in self.queries.columns:
            return None
        return self.queries.column("correct").bool()

    def labels(self) -> tuple[list[int], list[int]]:
        """Class labels of the training samples and of the queries."""
        train, queries = ([row["labels"] for row in part.rows] for part in (self.samples, self.trusted))
        return train, queries

    def once(self, what: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, kept for the next who asks for it by this name, whatever queries it is fitted to."""
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]

    def kept(self, what: str) -> Any:
        """What :meth:`once` has made under this name, None if nothing yet."""
        return self._kept.get(what)

    def for_samples(self, samples: Samples, train: GradientStore, folder: Path) -> MethodInputs:
        """The same queries for other training samples. What follows from the queries alone is kept."""
        of_queries = ("mislabelled queries", f"store {_ASKED_AT}")
        kept = {name: value for name, value in self._kept.items() if name.startswith(of_queries)}
        audit = replace(self.given, samples=samples, folder=folder)
        return replace(self, train=train, audit=audit, facts={}, _kept=kept)

    def fitted_to(self, queries: Tensor) -> MethodInputs:
        """The same for a method that is to be fitted to some queries alone."""
        return replace(self, fit_on=queries)

    def build(self, name: str, part: Samples, loss: Any = None) -> GradientStore:
        """A store beside those of the audit: other rows or another loss, in the same layers and projection."""
        given = self.given
        settings = replace(given.settings, loss=loss or given.settings.loss)
        path = given.folder / "stores" / name

        def make() -> GradientStore:
            job = prepare_job(given.model, part.rows, settings, part.ids, recorded(path, "batch_tokens"))
            return write_store(path, job, progress=given.progress)

        return self.once(f"store {name}", make)

    def at_checkpoint(self, one: RecordedCheckpoint, adam: bool) -> tuple[GradientStore, GradientStore]:
        """Stores of the training samples and of the queries by the model of a checkpoint.

        Args:
            adam: whether the training samples' are Adam's updates.
        """
        given = self.given
        model: list[nn.Module] = []

        def store(name: str, part: Samples, adam: bool) -> GradientStore:
            path = given.folder / "stores" / name

            def make() -> GradientStore:
                # Loaded once for both, and not at all where both are there.
                network = model[0] if model else one.load()
                model[:] = [network]
                settings = replace(given.settings, adam=one.moments(network) if adam else None)
                job = prepare_job(network, part.rows, settings, part.ids, recorded(path, "batch_tokens"))
                return write_store(path, job, progress=given.progress)

            return self.once(f"store {name}", make)

        train = store(f"{'adam' if adam else 'train'}-{one.step}", given.samples, adam)
        return train, store(f"{_ASKED_AT}{one.step}", given.trusted, False)

    def mislabelled_queries(self) -> MislabelledQueries:
        """Queries to tell right labels from wrong ones by: at most 2,000, half of them given a wrong label by a seed."""

        def make() -> MislabelledQueries:
            labels, own = self.labels()
            part = self.trusted
            random = torch.Generator().manual_seed(0)
            rows = torch.randperm(len(part.rows), generator=random)[:_FITTED_QUERIES]
            numbers = rows.tolist()
            classes = 1 + max(max(labels), max(own))
            given, wrong = label_noise.uniform([own[i] for i in numbers], 0.5, classes)
            chosen = [{**part.rows[i], "labels": label} for i, label in zip(numbers, given, strict=True)]
            ids = None if part.ids is None else [part.ids[i] for i in numbers]
            store = self.build("mislabelled", replace(part, rows=chosen, ids=ids))
            return MislabelledQueries(rows, given, ~wrong, store)

        return self.once("mislabelled queries", make)

    def halves(self, random: torch.Generator) -> list[Tensor]:
        """Two disjoint halves of the queries to fit to; none where a half would lack right labels or wrong ones."""
        right = self.mislabelled_queries().right
        kinds = [kind.nonzero()[:, 0] for kind in (right, ~right)]
        if min(len(kind) for kind in kinds) < 2:
            return []
        parts = [kind[torch.randperm(len(kind), generator=random)].chunk(2) for kind in kinds]
        return [torch.cat(half) for half in zip(*parts, strict=True)]


def of_no_query(scores: dict[str, Tensor]) -> InMemory:
    """One row that stands for all queries and counts as predicted correctly."""
    return InMemory(scores, torch.ones(1, dtype=torch.bool))
