"""The whole job: a model, its training set and trusted queries in; a ranked list and a report out."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.attribution.aggregation import METHODS as AGGREGATIONS
from influence_fast.attribution.aggregation import order
from influence_fast.attribution.influence_matrix import METHODS as GRADIENT_METHODS
from influence_fast.attribution.influence_matrix import InfluenceMatrix
from influence_fast.attribution.label_quality import FOLDS
from influence_fast.attribution.method_inputs import METHODS, NEED_CLASSES, Sources
from influence_fast.auditing.self_check import ROWS, plant, self_check
from influence_fast.data.batching import checked_rows
from influence_fast.data.loading import read_table
from influence_fast.data.models import load_model
from influence_fast.data.samples import TASKS, Columns, Samples, prepare, task_of
from influence_fast.errors import InputError
from influence_fast.evaluation.comparison import Evaluation, aggregated, baselines, compare
from influence_fast.gradients.build import build_store
from influence_fast.gradients.layers import block_of, layer_groups, named_layers, select_layers
from influence_fast.gradients.store import DTYPES
from influence_fast.ops.projections import Projection

_MOST_BLOCKS = 48
# Hidden states of the training set that an audit holds unless asked to: 200,000 samples of a MiniLM, 50,000 of a BERT-base.
_POOL_BYTES = 4 << 30
_LIKED = ("rank-c", "rank", "mean")


@dataclass
class AuditConfig:
    """Everything that an audit depends on; ``config.json`` holds it and replays the run."""

    model: str
    train: str
    queries: str
    text_column: str = "text"
    label_column: str = "label"
    noise_column: str | None = None
    answer_column: str | None = None
    task: str = "auto"
    layers: str | None = None
    projection: str = "identity"
    methods: list[str] | None = None
    aggregations: list[str] | None = None
    rank_by: str | None = None
    fraction: float = 0.2
    dtype: str = "float32"
    precision: str | None = None
    batch_tokens: int | str = "auto"
    truncate: bool = False
    seed: int = 0
    self_check: float | None = None
    checkpoints: list[str] | None = None

    def check(self) -> None:
        """Raise InputError for what can be wrong before anything is read."""
        if self.task not in TASKS:
            raise InputError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        for name, given, known in (
            ("methods", self.methods or [], METHODS),
            ("aggregations", self.aggregations or [], AGGREGATIONS),
        ):
            unknown = [value for value in given if value not in known]
            if unknown:
                raise InputError(f"{name}: expected some of {', '.join(known)}, got {unknown[0]!r}")
        if self.methods == []:
            raise InputError("methods: expected at least one")
        if self.checkpoints and self.self_check is None:
            raise InputError("checkpoints: the self-check compares them; give self_check too")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        Projection.parse(self.projection)


@dataclass
class AuditResult:
    """What an audit found. Scores are lowest for the most harmful sample, everywhere.

    Attributes:
        ids, texts, labels, noise: of the training samples; ``noise`` is a boolean ``(n,)`` or None.
        groups: layer group -> layers.
        scores: method -> group -> aggregation -> float64 ``(n,)``.
        baselines: ``random``, ``loss`` (highest loss first) and ``self-influence`` (largest ``|g|^2`` first).
        main: the method, group and aggregation that rank ``scores.csv``.
        facts: sizes, times and counts that the report states.
    """

    ids: Sequence[int | str]
    texts: list[str] | None
    labels: list[Any] | None
    noise: Tensor | None
    groups: dict[str, list[str]]
    scores: dict[str, dict[str, dict[str, Tensor]]]
    baselines: dict[str, Tensor]
    main: tuple[str, str, str]
    config: dict[str, Any]
    facts: dict[str, Any]

    @property
    def ranking(self) -> Tensor:
        """Row numbers, most harmful first; votes that tie are ordered by rank, then by row."""
        method, group, aggregation = self.main
        found = self.scores[method][group]
        base, _, correct = aggregation.partition("-")
        tie = found.get("rank" + (f"-{correct}" if correct else "")) if base == "vote" else None
        return order(found[aggregation], tie)

    def rankings(self) -> Iterator[tuple[str, str, str, Tensor]]:
        """``(method, group, aggregation, scores)`` of everything; baselines come first, with empty group and aggregation."""
        for name, scores in self.baselines.items():
            yield name, "", "", scores
        for method, groups in self.scores.items():
            for group, aggregations in groups.items():
                for aggregation, scores in aggregations.items():
                    yield method, group, aggregation, scores

    def compare(self, levels: Sequence[float] = (0.1, 0.2, 0.3)) -> Evaluation:
        """Every ranking measured against ``noise``, which must be known: :func:`~influence_fast.compare`."""
        if self.noise is None:
            raise InputError("noise: this audit does not know which samples are noisy")
        return compare({(m, group, a): scores for m, group, a, scores in self.rankings()}, self.noise, levels=levels)

    def evaluate(self, at: float = 0.3) -> list[dict[str, Any]]:
        """One row of metrics per ranking, as of :meth:`compare`, with ``ndr`` and ``precision`` at one level."""
        name = f"{100 * at:g}"
        return [
            {**row, "ndr": row[f"ndr@{name}"], "precision": row[f"precision@{name}"]}
            for row in self.compare(sorted({0.1, 0.2, 0.3, at})).rows
        ]


def audit(
    model: str | nn.Module,
    train: str | Sequence[Mapping[str, Any]],
    queries: str | Sequence[Mapping[str, Any]],
    *,
    out: str | Path | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    **settings: Any,
) -> AuditResult:
    """Score every training sample by its influence on the queries, layer by layer.

    Args:
        model: a folder of a model or of a PEFT adapter, a hub name, or a loaded model (then give its ``tokenizer``
            unless rows hold ``input_ids``).
        train, queries: a JSONL, CSV or Parquet file, a folder of a saved ``datasets.Dataset``, a hub name, or rows in
            memory. Rows with ``input_ids`` and ``labels`` are used as they are.
        out: folder for ``scores.csv``, ``report.html``, ``config.json`` and the gradient stores, kept so that the same
            audit goes on where it stopped; without it nothing is kept.
        settings: the other fields of :class:`AuditConfig`.

    Raises:
        InputError: anything wrong with settings or data, found before the first gradient is taken.
    """
    try:
        config = AuditConfig(_named(model), _named(train), _named(queries), **settings)
    except TypeError as error:
        raise InputError(f"audit: {error}") from None
    config.check()
    network, tokenizer = (model, tokenizer) if isinstance(model, nn.Module) else load_model(model, config.task)
    rows = {name: _rows(name, value) for name, value in (("train", train), ("queries", queries))}
    task = task_of(config.task, network, rows["train"])
    columns = Columns(config.text_column, config.label_column, config.answer_column)
    samples = prepare("train", rows["train"], replace(columns, noise=config.noise_column), task, network, tokenizer)
    trusted = prepare("queries", rows["queries"], columns, task, network, tokenizer)
    if task == "classification" and len({row["labels"] for row in samples.rows}) < 2:
        raise InputError(f"train: all {len(samples.rows)} samples have one class; influence needs at least two")
    for part in (samples, trusted):
        checked_rows(network, part.rows, task, part.ids, config.truncate)
    if config.self_check is not None:
        plant(samples.rows[:ROWS], config.self_check, config.seed)
    if config.methods is None:
        config = replace(config, methods=_default_methods(network, task, samples))
    methods = config.methods or []
    needy = [method for method in methods if method in NEED_CLASSES]
    if needy and task != "classification":
        raise InputError(f"methods: {needy[0]} compares classes, and this model has none")
    if "ekfac" in methods and config.projection != "identity":
        raise InputError(f"methods: ekfac needs whole gradients, projection identity, got {config.projection}")
    layers = select_layers(network, config.layers or default_layers(network))
    groups = groups_of(network, layers)
    main = _main(config, groups, task == "classification")
    for path in config.checkpoints or []:
        lacking = set(layers) - set(named_layers(load_model(path, config.task)[0]))
        if lacking:
            raise InputError(f"checkpoints: {path} lacks layer {min(lacking)!r} of the model")
    with _folder(out, config) as folder:
        times: dict[str, float] = {}
        stores = {}
        for name, part in (("train", samples), ("queries", trusted)):
            with _timed(times, f"gradients of {name}"):
                stores[name] = build_store(
                    folder / "stores" / name,
                    network,
                    part.rows,
                    layers,
                    config.projection,
                    loss=task,
                    batch_tokens=config.batch_tokens,
                    dtype=config.dtype,
                    precision=config.precision,
                    truncate=config.truncate,
                    ids=part.ids,
                    progress=progress,
                )
        sources = Sources(network, samples, trusted, stores["train"], stores["queries"], folder, config, task, progress)
        result = _score(sources, config, groups, main, times)
        result.texts, result.labels, result.noise = samples.texts, samples.labels, samples.noise
        result.facts["task"] = task
        if config.self_check is not None:
            with _timed(times, "self-check"):
                result.facts["self_check"] = self_check(
                    sources,
                    config,
                    methods,
                    _aggregations(config, "correct" in stores["queries"].columns),
                    groups,
                    main,
                    result.scores[main[0]][main[1]][main[2]],
                    share=config.self_check,
                    fraction=config.fraction,
                    seed=config.seed,
                    folder=folder / "stores" / "self-check",
                    checkpoints=config.checkpoints or [],
                )
        if out is not None:
            from influence_fast.auditing.report import write_report

            with _timed(times, "report"):
                _write(folder / "scores.csv", _scores_csv(result))
                write_report(folder / "report.html", result)
    return result


def _score(
    sources: Sources,
    config: AuditConfig,
    groups: dict[str, list[str]],
    main: tuple[str, str, str],
    times: dict[str, float],
) -> AuditResult:
    """Influence, aggregations and baselines."""
    train, queries = sources.train, sources.queries
    knows = "correct" in queries.columns
    aggregations = _aggregations(config, knows)
    scores: dict[str, dict[str, dict[str, Tensor]]] = {}
    zeros: dict[str, tuple[int, int]] = {}
    for method in config.methods or []:
        with _timed(times, method):
            matrix = sources.matrix(method)
            scores[method] = {}
            for group, aggregation, values in aggregated(matrix, aggregations, groups, config.fraction):
                scores[method].setdefault(group, {})[aggregation] = values
            if isinstance(matrix, InfluenceMatrix) and method in GRADIENT_METHODS:
                zeros = matrix.zero_norms
    facts: dict[str, Any] = {
        "samples": len(train),
        "queries": len(queries),
        "layers": len(train.layers),
        "numbers_per_sample": sum(train.dims.values()),
        "bytes": sum(shard["bytes"] for shard in train.meta["shards"]),
        "zero_gradients": sum(count for count, _ in zeros.values()),
        "seconds": times,
    }
    if sources.pool_weights:
        facts["pool_weights"] = sources.pool_weights
    if knows:
        facts["queries_correct"] = int(queries.column("correct").sum())
    if "correct" in train.columns:
        facts["train_accuracy"] = float(train.column("correct").double().mean())
    found = baselines(train, config.seed)
    return AuditResult(list(train.ids), None, None, None, groups, scores, found, main, config.__dict__, facts)


def groups_of(model: nn.Module, layers: list[str]) -> dict[str, list[str]]:
    """Layer groups, and each block by itself where there are not too many."""
    groups = layer_groups(model, layers)
    blocks: dict[str, list[str]] = {}
    for name in layers:
        if (block := block_of(name)) is not None:
            blocks.setdefault(f"block {block}", []).append(name)
    return groups if not 1 < len(blocks) <= _MOST_BLOCKS else {**groups, **blocks}


def _rows(argument: str, value: str | Path | Sequence[Mapping[str, Any]]) -> Any:
    rows = read_table(argument, str(value)) if isinstance(value, str | Path) else value
    if len(rows) == 0:
        raise InputError(f"{argument}: {_named(value)} has no rows")
    return rows


def default_layers(model: nn.Module) -> str | list[str]:
    """What training changed: adapters and the modules saved beside them, or all but the embeddings."""
    trained = [name for name in named_layers(model) if re.search(r"\.lora_[AB]\.|\.modules_to_save\.", name)]
    return trained or "attention,mlp,head"


def _default_methods(model: nn.Module, task: str, samples: Samples) -> list[str]:
    """The paper's, and the pool, which ranks best, of classifiers whose hidden states fit in memory, no class rare."""
    methods, config = ["dot", "cosine", "datainf"], getattr(model, "config", None)
    if task != "classification" or not hasattr(config, "output_hidden_states"):
        return methods
    width, blocks = (getattr(config, name, 1) for name in ("hidden_size", "num_hidden_layers"))
    # Held twice: by block, and side by side for the probe.
    if 2 * 4 * len(samples.rows) * width * (blocks + 1) > _POOL_BYTES:
        return methods
    rarest = min(Counter(row["labels"] for row in samples.rows).values())
    return [*methods, "pool"] if rarest >= FOLDS else methods


def _aggregations(config: AuditConfig, knows: bool) -> list[str]:
    """Those asked for, or the paper's; without predictions no query counts as correct."""
    return config.aggregations or (["mean", "rank-c", "vote-c"] if knows else ["mean", "rank", "vote"])


def _main(config: AuditConfig, groups: Mapping[str, Any], knows: bool) -> tuple[str, str, str]:
    aggregations = _aggregations(config, knows)
    methods = config.methods or []
    if config.rank_by is None:
        method = next((m for m in ("pool", "cosine") if m in methods), methods[0])
        preferred = [a for a in (("mean",) if method == "pool" else ("rank-c", "rank")) if a in aggregations]
        return method, "all", (preferred or aggregations)[0]
    parts = config.rank_by.split(":")
    choices = (methods, list(groups), aggregations)
    if len(parts) != 3 or any(part not in choice for part, choice in zip(parts, choices, strict=True)):
        raise InputError(
            f"rank_by: expected METHOD:GROUP:AGGREGATION from {', '.join(choices[0])}; {', '.join(choices[1])}; "
            f"{', '.join(choices[2])}, got {config.rank_by!r}"
        )
    return parts[0], parts[1], parts[2]


@contextmanager
def _folder(out: str | Path | None, config: AuditConfig) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = Path(out)
    text = json.dumps(config.__dict__, indent=1) + "\n"
    earlier = folder / "config.json"
    if folder.exists() and any(folder.iterdir()) and not (earlier.exists() and earlier.read_text() == text):
        raise InputError(f"out: {folder} holds something else than this very audit; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write(earlier, text)
    yield folder


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    times[name] = time.perf_counter() - begin


def _scores_csv(result: AuditResult) -> str:
    method, _, aggregation = result.main
    ranking = result.ranking
    place = torch.empty_like(ranking)
    place[ranking] = torch.arange(len(ranking))
    main = result.scores[method][result.main[1]][aggregation]
    columns: dict[str, Callable[[int], Any]] = {
        "id": lambda i: result.ids[i],
        "score": lambda i: repr(float(main[i])),
        "rank": lambda i: int(place[i]),
    }
    for name, values in (("label", result.labels), ("noise", result.noise)):
        if values is not None:
            columns[name] = lambda i, values=values: int(values[i])  # type: ignore[misc]
    columns["loss"] = lambda i: repr(float(-result.baselines["loss"][i]))
    columns["self_influence"] = lambda i: repr(float(-result.baselines["self-influence"][i]))
    if not set(result.groups) & set(result.scores[method]) - {"all"}:
        # It has none of the model's layers: beside it those of influence.
        method, aggregation = next(
            (
                (m, a)
                for m in ("cosine", *result.scores)
                for a in _LIKED
                if a in result.scores.get(m, {}).get("all", {})
            ),
            (method, aggregation),
        )
    for group, found in result.scores[method].items():
        values = found[aggregation]
        columns[f"{method} {aggregation}: {group}"] = lambda i, values=values: repr(float(values[i]))  # type: ignore[misc]
    if result.texts is not None:
        texts = result.texts
        columns["text"] = lambda i: texts[i]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([column(i) for column in columns.values()] for i in range(len(result.ids)))
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.rename(path)


def _named(value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    return f"({type(value).__name__} in memory)"
