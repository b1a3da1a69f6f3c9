"""The whole job: a model, its training set and trusted queries in; a ranked list and a report out."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from influence_fast._files import atomic_write, locked, remove_leftovers
from influence_fast.attribution.influence_matrix import METHODS as INNER_PRODUCTS
from influence_fast.attribution.influence_matrix import InfluenceMatrix
from influence_fast.attribution.method_inputs import AuditInputs, MethodInputs
from influence_fast.attribution.model_passes import ModelPasses
from influence_fast.attribution.registry import NEEDS, PROBE_FOLDS, get_method
from influence_fast.auditing.config import AuditConfig, RankingPlan
from influence_fast.auditing.report.page import write_report
from influence_fast.auditing.report.table import scores_csv
from influence_fast.auditing.result import AuditResult
from influence_fast.auditing.self_check import ROWS, plant, self_check
from influence_fast.data.batching import checked_rows
from influence_fast.data.loading import read_table
from influence_fast.data.models import load_model
from influence_fast.data.samples import Samples, prepare, task_of
from influence_fast.errors import InputError
from influence_fast.evaluation.comparison import RankingKey
from influence_fast.evaluation.rankings import aggregated, baselines
from influence_fast.gradients.build import build_from
from influence_fast.gradients.layers import block_of, layer_groups, named_layers, select_layers, trained_layers
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.store import GradientStore

_MOST_BLOCKS = 48
# Hidden states of the training set that an audit holds unless asked to: 200,000 samples of a MiniLM, 50,000 of a BERT-base.
_POOL_BYTES = 4 << 30


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
        settings: as of the command line, with underscores: ``text_column``, ``label_column``, ``answer_column``,
            ``noise_column``, ``task``, ``layers``, ``projection``, ``methods``, ``aggregations``, ``rank_by``, ``fraction``,
            ``dtype``, ``precision``, ``batch_tokens``, ``truncate``, ``allow_new_weights``, ``seed``, ``self_check``,
            ``checkpoints``.

    Raises:
        InputError: anything wrong with settings or data, found before the first gradient is taken.
    """
    config = AuditConfig.from_options(_named(model), _named(train), _named(queries), settings)
    if out is not None:
        _check_out(out)
    if isinstance(model, nn.Module):
        network = model
    else:
        network, tokenizer = load_model(model, config.task, config.allow_new_weights)
    rows = {name: _rows(name, value) for name, value in (("train", train), ("queries", queries))}
    task = task_of(config.task, network, rows["train"])
    samples = prepare("train", rows["train"], config.columns, task, network, tokenizer)
    trusted = prepare("queries", rows["queries"], replace(config.columns, noise=None), task, network, tokenizer)
    _check(config, network, task, samples, trusted)
    methods = config.methods or _default_methods(network, task, samples)
    config = replace(config, methods=methods)
    layers = select_layers(network, config.layers or default_layers(network))
    plan = _plan(config, methods, groups_of(network, layers), classification=task == "classification")
    for path in config.checkpoints or []:
        lacking = set(layers) - set(named_layers(load_model(path, config.task, config.allow_new_weights)[0]))
        if lacking:
            raise InputError(f"checkpoints: {path} lacks layer {min(lacking)!r} of the model")
    build = replace(config.build, layers=layers, loss=task)
    with _folder(out, config) as folder:
        times: dict[str, float] = {}
        stores = {}
        for name, part in (("train", samples), ("queries", trusted)):
            with _timed(times, f"gradients of {name}"):
                at = folder / "stores" / name
                stores[name] = build_from(
                    at, network, part.rows, build, ids=part.ids, progress=progress, tokenizer=tokenizer
                )
                # Verified on the training rows; every other store of this audit is captured in the same way.
                taken = stores[name].meta["settings"]
                build = replace(build, verify=False, exact=taken.get("exact", ()), one_row=taken.get("one_row", False))
        inputs = method_inputs(
            network, samples, trusted, stores["train"], stores["queries"], folder, build, methods, progress
        )
        # Without predictions no query counts as correct.
        if "correct" not in stores["queries"].columns:
            plan = replace(plan, aggregations=config.aggregations or ["mean", "rank", "vote"])
        result = _score(inputs, stores["train"], config, plan, times)
        result.texts, result.labels, result.noise = samples.texts, samples.labels, samples.noise
        result.facts["task"] = task
        if config.self_check is not None:
            with _timed(times, "self-check"):
                result.facts["self_check"] = self_check(
                    inputs,
                    plan,
                    result.rankings[plan.main],
                    share=config.self_check,
                    seed=config.seed,
                    folder=folder / "stores" / "self-check",
                    checkpoints=config.checkpoints or [],
                )
        if out is not None:
            with _timed(times, "report"):
                atomic_write(folder / "scores.csv", scores_csv(result))
                write_report(folder / "report.html", result)
    return result


def method_inputs(
    model: nn.Module,
    samples: Samples,
    trusted: Samples,
    train: GradientStore,
    queries: GradientStore,
    folder: Path,
    build: BuildSettings,
    methods: Sequence[str],
    progress: bool = True,
) -> MethodInputs:
    """What the methods are computed from; the passes are told beforehand what all of them need."""
    task = str(build.loss)

    def rows(part: Samples) -> Any:
        return checked_rows(model, part.rows, task, part.ids, build.truncate)[0]

    needs = set().union(*(get_method(name).needs for name in methods))
    passes = ModelPasses(model, rows, needs, build.batch_tokens, progress)
    audit = AuditInputs(model, samples, trusted, folder, build, task, passes, progress)
    return MethodInputs(train, queries, audit=audit)


def _check(config: AuditConfig, model: nn.Module, task: str, samples: Samples, trusted: Samples) -> None:
    """Raise InputError for what can be wrong before the first gradient."""
    if task == "classification" and len({row["labels"] for row in samples.rows}) < 2:
        raise InputError(f"train: all {len(samples.rows)} samples have one class; influence needs at least two")
    for part in (samples, trusted):
        checked_rows(model, part.rows, task, part.ids, config.build.truncate)
    if config.self_check is not None:
        plant(samples.rows[:ROWS], config.self_check, config.seed)
    for method in map(get_method, config.methods or ()):
        if "classes" in method.needs and task != "classification":
            raise InputError(f"methods: {method.name} needs {NEEDS['classes']}, and this model has none")
        if "whole gradients" in method.needs and config.build.projection.kind != "identity":
            raise InputError(f"methods: {method.name} needs {NEEDS['whole gradients']}, got {config.build.projection}")


def _plan(
    config: AuditConfig, methods: Sequence[str], groups: dict[str, list[str]], classification: bool
) -> RankingPlan:
    aggregations = config.aggregations or (["mean", "rank-c", "vote-c"] if classification else ["mean", "rank", "vote"])
    if config.rank_by is None:
        method = next((name for name in ("pool", "cosine") if name in methods), methods[0])
        preferred = [a for a in (("mean",) if method == "pool" else ("rank-c", "rank")) if a in aggregations]
        main = RankingKey(method, "all", (preferred or list(aggregations))[0])
        return RankingPlan(methods, aggregations, groups, main, config.fraction)
    parts = config.rank_by.split(":")
    choices = (methods, list(groups), aggregations)
    if len(parts) != 3 or any(part not in choice for part, choice in zip(parts, choices, strict=True)):
        raise InputError(
            f"rank_by: expected METHOD:GROUP:AGGREGATION from {', '.join(choices[0])}; {', '.join(choices[1])}; "
            f"{', '.join(choices[2])}, got {config.rank_by!r}"
        )
    return RankingPlan(methods, aggregations, groups, RankingKey(*parts), config.fraction)


def _score(
    inputs: MethodInputs, train: GradientStore, config: AuditConfig, plan: RankingPlan, times: dict[str, float]
) -> AuditResult:
    """Influence, aggregations and baselines."""
    rankings = {RankingKey(name): scores for name, scores in baselines(train, config.seed).items()}
    zeros: dict[str, tuple[int, int]] = {}
    for method in plan.methods:
        with _timed(times, method):
            matrix = inputs.influence(method)
            for group, aggregation, scores in aggregated(matrix, plan.aggregations, plan.groups, plan.fraction):
                rankings[RankingKey(method, group, aggregation)] = scores
            if isinstance(matrix, InfluenceMatrix) and method in INNER_PRODUCTS:
                zeros = matrix.zero_norms
    facts: dict[str, Any] = {
        "samples": len(train),
        "queries": len(inputs.trusted.rows),
        "layers": len(train.layers),
        "numbers_per_sample": sum(train.dims.values()),
        "bytes": sum(shard["bytes"] for shard in train.meta["shards"]),
        "zero_gradients": sum(count for count, _ in zeros.values()),
        "seconds": times,
        **inputs.facts,
    }
    about = train.meta.get("facts", {})
    facts |= {name: about[name] for name in ("trained", "covered") if name in about}
    if train.meta["settings"].get("one_row"):
        facts["captured"] = f"one sample a batch, {len(train.meta['settings']['exact'])} layers by autograd"
    if inputs.correct is not None:
        facts["queries_correct"] = int(inputs.correct.sum())
    if "correct" in train.columns:
        facts["train_accuracy"] = float(train.column("correct").double().mean())
    groups = {name: list(layers) for name, layers in plan.groups.items()}
    return AuditResult(list(train.ids), None, None, None, groups, rankings, plan.main, config.document(), facts)


def groups_of(model: nn.Module, layers: list[str]) -> dict[str, list[str]]:
    """Layer groups, and each block by itself where there are not too many."""
    groups = layer_groups(model, layers)
    blocks: dict[str, list[str]] = {}
    for name in layers:
        if (block := block_of(name)) is not None:
            blocks.setdefault(f"block {block}", []).append(name)
    return groups if not 1 < len(blocks) <= _MOST_BLOCKS else {**groups, **blocks}


def default_layers(model: nn.Module) -> str | list[str]:
    """What training changed: everything with ``requires_grad`` where some parameters are frozen, else all but embeddings."""
    trained = trained_layers(model)
    if trained and not all(parameter.requires_grad for parameter in model.parameters()):
        return trained
    adapters = [name for name in named_layers(model) if re.search(r"\.lora_[AB]\.|\.modules_to_save\.", name)]
    return adapters or "attention,mlp,head"


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
    return [*methods, "pool"] if rarest >= PROBE_FOLDS else methods


def _rows(argument: str, value: str | Path | Sequence[Mapping[str, Any]]) -> Any:
    rows = read_table(argument, str(value)) if isinstance(value, str | Path) else value
    if len(rows) == 0:
        raise InputError(f"{argument}: {_named(value)} has no rows")
    return rows


@contextmanager
def _folder(out: str | Path | None, config: AuditConfig) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = Path(out)
    text = json.dumps(config.document(), indent=1) + "\n"
    earlier = folder / "config.json"
    if _contents(folder) and not (earlier.exists() and earlier.read_bytes() == text.encode()):
        raise InputError(f"out: {folder} holds something else than this very audit; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        remove_leftovers(folder)
        atomic_write(earlier, text)
        yield folder


def _check_out(out: str | Path) -> None:
    """Raise InputError where no audit can write: before a model is loaded."""
    folder = Path(out)
    if _contents(folder) and not (folder / "config.json").exists():
        raise InputError(f"out: {folder} holds something else than an audit; choose a new folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"out: {folder} cannot be written ({there} is no folder that this user may write to)")


def _contents(folder: Path) -> list[Path]:
    """What is in a folder, but for a lock and half-written files: what is left of an audit that was killed as it began."""
    try:
        if not folder.exists():
            return []
        return [file for file in folder.iterdir() if file.name != ".lock" and file.suffix != ".part"]
    except OSError as error:
        raise InputError(f"out: {folder} cannot be used ({os.strerror(error.errno or 0)})") from None


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    times[name] = time.perf_counter() - begin


def _named(value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    return f"({type(value).__name__} in memory)"
