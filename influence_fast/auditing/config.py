"""Everything that an audit depends on, as one object, and as the flat document that replays it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from torch import nn

from influence_fast._json import check_types
from influence_fast._memory import parse_memory
from influence_fast.attribution.aggregation_names import METHODS as AGGREGATIONS
from influence_fast.attribution.recorded_checkpoint import RecordedCheckpoint
from influence_fast.attribution.registry import method_names
from influence_fast.data.batching import Loss
from influence_fast.data.samples import Samples
from influence_fast.data.settings import OPTIONS, TASKS, DataSettings
from influence_fast.errors import InputError
from influence_fast.evaluation.comparison import RankingKey
from influence_fast.gradients.own_loss import described
from influence_fast.gradients.settings import BuildSettings
from influence_fast.ops.projections import Projection
from influence_fast.training.recorded import RecordedTraining

_BUILD = ("projection", "dtype", "precision", "batch_tokens", "truncate")
AUTO = "auto"
# Samples that the self-check makes a copy of, to plant noise in.
SELF_CHECK_ROWS = 4096
# Bytes that an audit writes without being told that it may.
MOST_DISK = "20GB"
DIGESTS, FINDINGS = "data.json", "findings.jsonl"
"""Files of an audit's folder: SHA-256 of each file whose rows it ranked, and what it says of each row."""


@dataclass(frozen=True)
class AuditConfig:
    """Settings of an audit; ``config.json`` holds them and replays it.

    Attributes:
        model, train, queries: where they come from; without queries, rows of the training set that are held out stand for
            them.
        data: which columns of the data hold what, and how rows are read.
        task: ``auto``, or what the model does.
        loss: ``auto``, the name of a loss, ``package.module:function``, or a callable.
        beta, reference: of the loss of preferences: its strength, and the folder of the model before that training.
        layers: as of ``select_layers``; None for what training changed.
        build: how gradients are taken; its layers and loss follow from ``layers``, ``loss`` and the task.
        auto_projection: whether the projection is still to be chosen for the model.
        methods, aggregations: what to compute; None for the defaults of the task.
        rank_by: ``METHOD:GROUP:AGGREGATION`` that orders ``scores.csv``; None for the default.
        fraction: share of the samples that a vote goes against.
        seed: of the random baseline and of planted flips.
        self_check: share of a copy of the training set that gets planted flips; None for no self-check.
        checkpoints: folders of the model at other times of its training, for the self-check.
        allow_new_weights: load models whose files lack weights, which are drawn at random.
        max_disk: bytes, or text such as ``20GB``, that the audit may write.
        evidence: how many of the most harmful rows get evidence: neighbours, queries, tokens.
        query_group: column of the queries that says which group each belongs to.
        training: folder in which a Trainer's callback recorded the training on these rows.

    Raises:
        InputError: a setting that can be known to be wrong before anything is read; names it.
    """

    model: str
    train: str | list[str]
    queries: str | list[str] | None
    data: DataSettings = field(default_factory=DataSettings)
    task: str = AUTO
    loss: str | Loss = AUTO
    beta: float | None = None
    reference: str | None = None
    layers: str | Sequence[str] | None = None
    build: BuildSettings = field(default_factory=lambda: BuildSettings(projection=Projection("identity")))
    auto_projection: bool = False
    methods: Sequence[str] | None = None
    aggregations: Sequence[str] | None = None
    rank_by: str | None = None
    fraction: float = 0.2
    seed: int = 0
    self_check: float | None = None
    checkpoints: Sequence[str] | None = None
    allow_new_weights: bool = False
    max_disk: int | str = MOST_DISK
    evidence: int = 2000
    query_group: str | None = None
    training: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        unknown = [name for name in self.methods or () if name not in method_names()]
        if unknown:
            raise InputError(f"methods: expected some of {', '.join(method_names())}, got {unknown[0]!r}")
        unknown = [name for name in self.aggregations or () if name not in AGGREGATIONS]
        if unknown:
            raise InputError(f"aggregations: expected some of {', '.join(AGGREGATIONS)}, got {unknown[0]!r}")
        if self.methods is not None and not self.methods:
            raise InputError("methods: expected at least one")
        if self.checkpoints and self.self_check is None:
            raise InputError("checkpoints: the self-check compares them; give self_check too")
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction: expected a share above 0 and up to 1, got {self.fraction!r}")
        if self.evidence < 0:
            raise InputError(f"evidence: expected a number of rows, 0 or more, got {self.evidence}")
        parse_memory(self.max_disk)

    @classmethod
    def from_options(
        cls, model: str, train: str | list[str], queries: str | list[str] | None, options: Mapping[str, Any]
    ) -> AuditConfig:
        """From the flat names of ``inf.audit``, of the command line and of ``config.json``."""
        inner = {"model", "train", "queries", "data", "build", "auto_projection"}
        own = {one.name for one in dataclasses.fields(cls)} - inner
        known = {*own, *OPTIONS, *_BUILD}
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(f"audit: no setting is called {unknown[0]!r}; there are {', '.join(sorted(known))}")
        if isinstance(options.get("training"), os.PathLike):
            options = {**options, "training": os.fspath(options["training"])}
        # Before anything reads them: a text is true where a flag is asked for, and a list of letters where names are.
        reading, building, mine = (get_type_hints(kind) for kind in (DataSettings, BuildSettings, cls))
        check_types(
            {"model": model, "train": train, "queries": queries, **options},
            {
                **{option: reading[name] for option, name in OPTIONS.items()},
                **{name: building[name] for name in _BUILD if name != "projection"},
                **{name: mine[name] for name in (*own, "model", "train", "queries")},
                "projection": str | Projection,
            },
        )
        build = {name: options[name] for name in _BUILD if name in options}
        projection = build.get("projection", AUTO)
        build["projection"] = Projection.parse("identity" if projection == AUTO else projection)
        return cls(
            model,
            train,
            queries,
            data=DataSettings.from_options(options),
            build=BuildSettings(**build),
            auto_projection=projection == AUTO,
            **{name: options[name] for name in own if name in options},
        )

    def document(self) -> dict[str, Any]:
        """The flat form of :meth:`from_options`, with model and data."""
        out: dict[str, Any] = {"model": self.model, "train": self.train, "queries": self.queries}
        out |= {name: value for name, value in self.data.options().items() if name != "truncate"}
        projection = AUTO if self.auto_projection else str(self.build.projection)
        out |= {"task": self.task, "layers": self.layers, "projection": projection}
        out |= {name: _listed(getattr(self, name)) for name in ("methods", "aggregations", "rank_by", "fraction")}
        out |= {name: getattr(self.build, name) for name in _BUILD if name != "projection"}
        out |= {name: _listed(getattr(self, name)) for name in ("seed", "self_check", "checkpoints")}
        # As documents were before there were these settings.
        later = {"loss": described(self.loss), "beta": self.beta, "reference": self.reference}
        later |= {"allow_new_weights": self.allow_new_weights, "max_disk": self.max_disk}
        later |= {name: getattr(self, name) for name in ("evidence", "query_group", "training")}
        defaults = {one.name: one.default for one in dataclasses.fields(self)}
        return out | {name: value for name, value in later.items() if value != defaults[name]}


@dataclass(frozen=True)
class RankingPlan:
    """Which rankings an audit makes: each method over each group of layers by each aggregation.

    Attributes:
        methods, aggregations: by name.
        groups: layer group -> layers.
        main: the ranking that orders the results.
        fraction: share of the samples that a vote goes against.
    """

    methods: Sequence[str]
    aggregations: Sequence[str]
    groups: Mapping[str, Sequence[str]]
    main: RankingKey
    fraction: float


@dataclass(frozen=True)
class AuditPlan:
    """What an audit works on, all of it decided.

    Attributes:
        config: the settings, with what was left open decided.
        model: the network.
        samples, trusted: the training samples and the queries.
        task: what the model does.
        layers: names of the layers whose gradients are taken.
        ranking: which rankings are made.
        build: how gradients are taken.
        tokenizer: what made texts tokens, if anything did.
        digests: SHA-256 of the files that the training rows came from.
        held_out: what stands for queries where none were given, in a sentence; empty otherwise.
        query_groups: the group of each query, where a column says it.
        training: what training told of the training samples, where it was recorded.
        checkpoints: those of that training, where a method goes over them.
        copies: queries that stand among the training rows too, in a sentence; empty where there are none.
    """

    config: AuditConfig
    model: nn.Module
    samples: Samples
    trusted: Samples
    task: str
    layers: list[str]
    ranking: RankingPlan
    build: BuildSettings
    tokenizer: Any = None
    digests: Mapping[str, str] = field(default_factory=dict)
    held_out: str = ""
    query_groups: list[str] | None = None
    training: RecordedTraining | None = None
    checkpoints: Sequence[RecordedCheckpoint] = ()
    copies: str = ""


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
