"""Everything that an audit depends on, as one object, and as the flat document that replays it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from influence_fast._json import check_types
from influence_fast.attribution.aggregation import METHODS as AGGREGATIONS
from influence_fast.attribution.registry import method_names
from influence_fast.data.samples import TASKS, Columns
from influence_fast.errors import InputError
from influence_fast.evaluation.comparison import RankingKey
from influence_fast.gradients.settings import BuildSettings
from influence_fast.ops.projections import Projection

_BUILD = ("projection", "dtype", "precision", "batch_tokens", "truncate")
_COLUMNS = {"text_column": "text", "label_column": "label", "noise_column": "noise", "answer_column": "answer"}


@dataclass(frozen=True)
class AuditConfig:
    """Settings of an audit; ``config.json`` holds them and replays it.

    Attributes:
        model, train, queries: where they come from.
        columns: which columns of the data hold what.
        task: ``auto``, ``classification`` or ``causal-lm``.
        layers: as of ``select_layers``; None for what training changed.
        build: how gradients are taken; its layers and loss follow from ``layers`` and the task.
        methods, aggregations: what to compute; None for the defaults of the task.
        rank_by: ``METHOD:GROUP:AGGREGATION`` that orders ``scores.csv``; None for the default.
        fraction: share of the samples that a vote goes against.
        seed: of the random baseline and of planted flips.
        self_check: share of a copy of the training set that gets planted flips; None for no self-check.
        checkpoints: folders of the model at other times of its training, for the self-check.
        allow_new_weights: load models whose files lack weights, which are drawn at random.

    Raises:
        InputError: a setting that can be known to be wrong before anything is read; names it.
    """

    model: str
    train: str
    queries: str
    columns: Columns = field(default_factory=Columns)
    task: str = "auto"
    layers: str | Sequence[str] | None = None
    build: BuildSettings = field(default_factory=lambda: BuildSettings(projection=Projection("identity")))
    methods: Sequence[str] | None = None
    aggregations: Sequence[str] | None = None
    rank_by: str | None = None
    fraction: float = 0.2
    seed: int = 0
    self_check: float | None = None
    checkpoints: Sequence[str] | None = None
    allow_new_weights: bool = False

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

    @classmethod
    def from_options(cls, model: str, train: str, queries: str, options: Mapping[str, Any]) -> AuditConfig:
        """From the flat names of ``inf.audit``, of the command line and of ``config.json``."""
        own = {one.name for one in dataclasses.fields(cls)} - {"model", "train", "queries", "columns", "build"}
        known = [*own, *_COLUMNS, *_BUILD]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(f"audit: no setting is called {unknown[0]!r}; there are {', '.join(sorted(known))}")
        # Before anything reads them: a text is true where a flag is asked for, and a list of letters where names are.
        columns, building, mine = (get_type_hints(kind) for kind in (Columns, BuildSettings, cls))
        check_types(
            {"model": model, "train": train, "queries": queries, **options},
            {
                **{name: columns[part] for name, part in _COLUMNS.items()},
                **{name: building[name] for name in _BUILD if name != "projection"},
                **{name: mine[name] for name in (*own, "model", "train", "queries")},
                "projection": str | Projection,
            },
        )
        build = {name: options[name] for name in _BUILD if name in options}
        build["projection"] = Projection.parse(build.get("projection", "identity"))
        return cls(
            model,
            train,
            queries,
            columns=Columns(**{_COLUMNS[name]: options[name] for name in _COLUMNS if name in options}),
            build=BuildSettings(**build),
            **{name: options[name] for name in own if name in options},
        )

    def document(self) -> dict[str, Any]:
        """The flat form of :meth:`from_options`, with model and data."""
        out: dict[str, Any] = {"model": self.model, "train": self.train, "queries": self.queries}
        out |= {name: getattr(self.columns, part) for name, part in _COLUMNS.items()}
        out |= {"task": self.task, "layers": self.layers, "projection": str(self.build.projection)}
        out |= {name: _listed(getattr(self, name)) for name in ("methods", "aggregations", "rank_by", "fraction")}
        out |= {name: getattr(self.build, name) for name in _BUILD if name != "projection"}
        out |= {name: _listed(getattr(self, name)) for name in ("seed", "self_check", "checkpoints")}
        # As documents were before there was this setting.
        return out | ({"allow_new_weights": True} if self.allow_new_weights else {})


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


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
