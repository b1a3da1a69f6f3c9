"""The whole job: a model, its training set and trusted queries in; a ranked list and a report out."""

from __future__ import annotations

import json
import logging
import os
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
from influence_fast._memory import give_back
from influence_fast.attribution.aggregation import aggregated
from influence_fast.attribution.influence_matrix import METHODS as INNER_PRODUCTS
from influence_fast.attribution.influence_matrix import InfluenceMatrix
from influence_fast.attribution.method_inputs import VOTES, AuditInputs, MethodInputs
from influence_fast.attribution.model_passes import ModelPasses, layers_with_factors
from influence_fast.attribution.probe import probe_estimate
from influence_fast.attribution.registry import NEEDS, PROBE_FOLDS, get_method
from influence_fast.attribution.representations import neighbour_count, neighbours
from influence_fast.attribution.seen_passes import Blocks, SeenPasses, rerunnable
from influence_fast.auditing.config import DIGESTS, FINDINGS, SELF_CHECK_ROWS, AuditConfig, AuditPlan, RankingPlan
from influence_fast.auditing.disk import check_disk
from influence_fast.auditing.findings.duplicates import compared, copies_among
from influence_fast.auditing.findings.evidence import gather
from influence_fast.auditing.findings.judge import find, judge_labels
from influence_fast.auditing.held_out import hold_out
from influence_fast.auditing.recorded_checkpoints import checkpoints_of
from influence_fast.auditing.report.page import write_report
from influence_fast.auditing.report.table import findings_lines, scores_csv
from influence_fast.auditing.result import AuditResult
from influence_fast.auditing.self_check import plant, self_check
from influence_fast.data.batching import Loss, checked_rows
from influence_fast.data.loading import SHOWN, describe, digests, read_table
from influence_fast.data.models import load_model
from influence_fast.data.remembered import remember
from influence_fast.data.samples import Samples, prepare, task_of
from influence_fast.errors import InputError
from influence_fast.evaluation.comparison import RankingKey
from influence_fast.evaluation.rankings import baselines
from influence_fast.evaluation.rivals import label_rivals
from influence_fast.gradients.build import build_from
from influence_fast.gradients.default_projection import default_projection
from influence_fast.gradients.layers import block_of, freeze_others, layer_groups, named_layers, select_layers
from influence_fast.gradients.layers import default_layers as default_layers
from influence_fast.gradients.own_loss import find_loss
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.store import GradientStore
from influence_fast.ops.projections import Projection
from influence_fast.training.recorded import RecordedTraining, read_training

_log = logging.getLogger("influence_fast")
_MOST_BLOCKS = 48


def audit(
    model: str | nn.Module,
    train: Any,
    queries: Any = None,
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
        train, queries: a file (JSON lines, JSON, CSV, TSV, Parquet, also compressed), a glob, a folder, several of these, a
            hub name; or in memory dicts, a ``datasets`` data set, a pandas frame. Rows with ``input_ids`` and ``labels`` are
            used as they are. Without queries, rows of the training set are held out in their place and not ranked.
        out: folder for ``scores.csv``, ``findings.jsonl``, ``report.html``, ``config.json`` and the gradient stores,
            kept so that the same audit goes on where it stopped; without it nothing is kept.
        settings: as of the command line, with underscores: ``text_column``, ``label_column``, ``answer_column``,
            ``noise_column``, ``label_names``, ``chat_template``, ``as_chat``, ``block_size``, ``split``, ``limit``,
            ``skip_bad``, ``task``, ``loss`` (also a callable), ``beta``, ``reference``, ``layers``, ``projection``,
            ``methods``, ``aggregations``, ``rank_by``, ``fraction``, ``dtype``, ``precision``, ``batch_tokens``,
            ``truncate``, ``allow_new_weights``, ``seed``, ``self_check``, ``checkpoints``, ``max_disk``, ``evidence``,
            ``query_group``, ``training`` (a folder that :class:`~influence_fast.InfluenceCallback` recorded in).

    Raises:
        InputError: anything wrong with settings or data, found before the first gradient is taken; stores that would not fit
            on the disk, or take more than ``max_disk``.
    """
    if out is not None:
        check_out(out, model, train, queries)
    plan = plan_audit(model, train, queries, tokenizer, settings)
    check_disk(plan, out)
    return run_plan(plan, out, progress)


def plan_audit(
    model: str | nn.Module, train: Any, queries: Any, tokenizer: Any, settings: Mapping[str, Any]
) -> AuditPlan:
    """Read model and data, decide what was left open and check all of it."""
    config = AuditConfig.from_options(
        _named(model), describe(train), None if queries is None else describe(queries), settings
    )
    if isinstance(model, nn.Module):
        network = model
    else:
        network, tokenizer = load_model(model, config.task, config.allow_new_weights)
    data = config.data
    found = digests("train", train, data.split)
    rows = read_table("train", train, data.split, data.limit, data.skip_bad)
    task = task_of(config.task, network, rows, data.label)
    samples = prepare("train", rows, data, task, network, tokenizer)
    samples.refuse_unused("train")
    training = None if config.training is None else _training(config.training, samples, task)
    if training is not None and not isinstance(model, nn.Module):
        # Files do not say what was frozen.
        freeze_others(network, training.trained)
    names, held_out, copies = samples.ids, "", ""
    if queries is None:
        samples, trusted, held_out = hold_out(network, samples, task, config.seed, config.build.batch_tokens)
        if training is not None and samples.ids is not None:
            places = samples.ids if names is None else map({n: i for i, n in enumerate(names)}.__getitem__, samples.ids)
            training = training.some(list(map(int, places)))
    else:
        # The name of a split is that of the training set alone.
        given = read_table("queries", queries, skip_bad=data.skip_bad)
        trusted = prepare("queries", given, replace(data, noise=None, limit=None), task, network, tokenizer)
        if task == "classification":
            trusted, copies = _without_copies(samples, trusted)
    for argument, part in (("train", samples), ("queries", trusted)):
        if part.skipped:
            shown = "; ".join(map(str, part.skipped[:SHOWN]))
            more = f"; and {len(part.skipped) - SHOWN} more" if len(part.skipped) > SHOWN else ""
            _log.warning("%s: left out %d rows: %s%s", argument, len(part.skipped), shown, more)
    groups = _query_groups(config, queries, trusted)
    reference = None if config.reference is None else load_model(config.reference, task, config.allow_new_weights)[0]
    loss = find_loss(config.loss, task, config.beta, reference)
    layers = select_layers(network, config.layers or default_layers(network))
    methods = config.methods or _default_methods(network, task, samples)
    if config.layers is None and "ekfac" in methods:
        # What was not asked for by name does not stop it: of biases and norms, which training changed too, it says nothing.
        layers = layers_with_factors(network, layers) or layers
    build = replace(config.build, layers=layers, loss=loss)
    if config.auto_projection:
        whole = any("whole gradients" in get_method(name).needs for name in methods)
        chosen = Projection("identity") if whole else default_projection(network, layers)
        build = replace(build, projection=chosen)
    config = replace(
        config, methods=methods, auto_projection=False, build=replace(config.build, projection=build.projection)
    )
    _check(config, network, task, loss, samples, trusted)
    over = checkpoints_of(config, training, network, layers, methods)
    ranking = _plan(config, methods, groups_of(network, layers), classification=task == "classification")
    for path in config.checkpoints or []:
        lacking = set(layers) - set(named_layers(load_model(path, config.task, config.allow_new_weights)[0]))
        if lacking:
            raise InputError(f"checkpoints: {path} lacks layer {min(lacking)!r} of the model")
    if config.checkpoints and "checkpoints" in get_method(ranking.main.method).needs:
        raise InputError(
            f"checkpoints: the self-check ranks by {ranking.main.method} at each, which goes over checkpoints itself; "
            "rank by another method, or leave them out"
        )
    return AuditPlan(
        config,
        network,
        samples,
        trusted,
        task,
        layers,
        ranking,
        build,
        tokenizer,
        found,
        held_out,
        groups,
        training,
        over,
        copies,
    )


def run_plan(audit: AuditPlan, out: str | Path | None, progress: bool = True) -> AuditResult:
    """Take the gradients of a plan, score, and write what there is to read."""
    config, network, samples, trusted, task = audit.config, audit.model, audit.samples, audit.trusted, audit.task
    plan, build, methods = audit.ranking, audit.build, list(audit.config.methods or [])
    with _folder(out, config) as folder:
        times: dict[str, float] = {}
        stores, seen, blocks = {}, {}, _watched_blocks(audit)
        for name, part in (("train", samples), ("queries", trusted)):
            seen[name] = SeenPasses(len(part), blocks, folder)
            with _timed(times, f"gradients of {name}"), seen[name].watched():
                stores[name] = build_from(
                    folder / "stores" / name, network, part.rows, build, ids=part.ids, progress=progress,
                    tokenizer=audit.tokenizer, watch=seen[name],
                )  # fmt: skip
                # Verified on the training rows; every other store of this audit is captured in the same way.
                taken = stores[name].meta["settings"]
                build = replace(build, verify=False, exact=taken.get("exact", ()), one_row=taken.get("one_row", False))
        if out is not None and audit.digests:
            remember(folder / "stores" / "train", config.train, config.data, task)
        inputs = method_inputs(
            network, samples, trusted, stores["train"], stores["queries"], folder, build, methods, progress
        )
        for name, part in (("train", samples), ("queries", trusted)):
            # In another precision they are not what the model itself says.
            if build.precision is None and (predictions := seen[name].log_probabilities()) is not None:
                inputs.passes.know_predictions(part, predictions)
            if (states := seen[name].base_states()) is not None:
                inputs.passes.know_base_states(part, states)
        given = replace(inputs.given, checkpoints=audit.checkpoints, held_out=bool(audit.held_out))
        inputs = replace(inputs, audit=given)
        # Without predictions no query counts as correct.
        if "correct" not in stores["queries"].columns:
            plan = _without_predictions(plan, config)
        result = _score(inputs, stores["train"], config, plan, times, audit.training)
        result.texts, result.labels, result.noise = samples.texts, samples.labels, samples.noise
        result.facts["task"] = task
        with _timed(times, "findings"):
            _add_findings(result, inputs, stores["train"], audit)
        result.facts["form"] = samples.form
        result.facts |= {name: text for name, text in (("held_out", audit.held_out), ("copies", audit.copies)) if text}
        skipped = [*samples.skipped, *(trusted.skipped if not audit.held_out else [])]
        if skipped:
            result.facts["skipped"] = [str(problem) for problem in skipped]
            atomic_write(folder / "skipped.txt", "".join(f"{problem}\n" for problem in skipped))
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
                    wrong=result.facts.get("wrong_labels"),
                )
        if out is not None:
            with _timed(times, "report"):
                atomic_write(folder / DIGESTS, json.dumps(audit.digests, indent=1) + "\n")
                atomic_write(folder / "scores.csv", scores_csv(result))
                atomic_write(folder / FINDINGS, findings_lines(result))
                write_report(folder / "report.html", result)
    return result


def _watched_blocks(audit: AuditPlan) -> Blocks | None:
    """What hidden states are seen by while gradients are taken, where a method needs those before fine-tuning."""
    build = audit.build
    needed = any("base states" in get_method(name).needs for name in audit.config.methods or ())
    if not needed or audit.task != "classification" or build.precision is not None:
        return None
    rows = checked_rows(audit.model, audit.samples.rows, build.loss, audit.samples.ids, build.truncate)[0]
    return rerunnable(audit.model, rows, build.batch_tokens)


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
    task = samples.task or str(build.loss)

    def rows(part: Samples) -> Any:
        return checked_rows(model, part.rows, build.loss, part.ids, build.truncate)[0]

    needs = set().union(*(get_method(name).needs for name in methods))
    passes = ModelPasses(model, rows, needs, build.batch_tokens, progress, folder)
    audit = AuditInputs(model, samples, trusted, folder, build, task, passes, progress)
    return MethodInputs(train, queries, audit=audit)


def _check(
    config: AuditConfig, model: nn.Module, task: str, loss: str | Loss, samples: Samples, trusted: Samples
) -> None:
    """Raise InputError for what can be wrong before the first gradient."""
    if task == "classification" and len({row["labels"] for row in samples.rows}) < 2:
        raise InputError(f"train: all {len(samples.rows)} samples have one class; influence needs at least two")
    for part in (samples, trusted):
        checked_rows(model, part.rows, loss, part.ids, config.build.truncate)
    if config.self_check is not None:
        plant(samples.rows[:SELF_CHECK_ROWS], config.self_check, config.seed, task)
    for method in map(get_method, config.methods or ()):
        if "classes" in method.needs and task != "classification":
            raise InputError(f"methods: {method.name} needs {NEEDS['classes']}, and this model has none")
        if "model" in method.needs and task == "preference":
            raise InputError(f"methods: {method.name} sees one text a sample, and preferences have two")
        if "whole gradients" in method.needs and config.build.projection.kind != "identity":
            raise InputError(f"methods: {method.name} needs {NEEDS['whole gradients']}, got {config.build.projection}")


def _without_predictions(plan: RankingPlan, config: AuditConfig) -> RankingPlan:
    """The plan without aggregations over correct queries alone, unless they were asked for."""
    main = plan.main._replace(aggregation=plan.main.aggregation.removesuffix("-c"))
    if config.rank_by is not None and main != plan.main:
        raise InputError(
            f"rank_by: the loss gives no predictions, so no query is known to be correct; got {config.rank_by}"
        )
    if config.aggregations is not None:
        return plan
    return replace(plan, aggregations=["mean", "rank", "vote"], main=main)


def _training(folder: str, samples: Samples, task: str) -> RecordedTraining:
    """What was recorded of these very samples, in their order."""
    found = read_training(folder)
    if found.losses.shape[1] != len(samples):
        raise InputError(
            f"training: {folder} recorded {found.losses.shape[1]:,} rows, and the training set has {len(samples):,}; both "
            "have to be the same rows in the same order"
        )
    if found.labels is not None and task == "classification":
        for i, (row, there) in enumerate(zip(samples.rows, found.labels.tolist(), strict=True)):
            if there >= 0 and there != row["labels"]:
                raise InputError(
                    f"training: {folder} recorded row {i} with class {there}, and it has {row['labels']}; both have to be "
                    "the same rows in the same order"
                )
    return found


def _query_groups(config: AuditConfig, queries: Any, trusted: Samples) -> list[str] | None:
    """The group of each query, by a column of theirs."""
    column = config.query_group
    if column is None:
        return None
    if queries is None:
        raise InputError(f"query_group: no queries are given, so none has a column {column!r}")
    table = read_table("queries", queries, skip_bad=config.data.skip_bad)
    if column not in table.columns:
        raise InputError(f"query_group: queries have no column {column!r}; there are {', '.join(table.columns)}")
    # Rows that were left out are no queries; those that stayed are known by name or number.
    by_id = {str(row.get("id", number)): str(row.get(column)) for number, row in enumerate(table.rows)}
    ids = range(len(trusted)) if trusted.ids is None else trusted.ids
    return [by_id[str(name)] for name in ids]


def _without_copies(samples: Samples, trusted: Samples) -> tuple[Samples, str]:
    """The queries that are not training rows too, and which were left out, in a sentence; all stay where half would go.

    Weights are fitted to the queries: of a copy, model, neighbours and influence know the label from the training row.
    """
    copies = set(copies_among(compared(trusted), compared(samples)))
    if not copies:
        return trusted, ""
    said = f"{len(copies)} of {len(trusted)} queries stand among the training rows too, equal or nearly so"
    if len(copies) > len(trusted) / 2:
        said += "; they are kept, for few others are there, but the model has learned them: trust this ranking less"
        _log.warning("queries: %s", said)
        return trusted, said
    return trusted.some([i for i in range(len(trusted)) if i not in copies]), f"{said}; they are left out"


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


def _add_findings(result: AuditResult, inputs: MethodInputs, train: GradientStore, audit: AuditPlan) -> None:
    """What is known of each label, and of each row."""
    classes = inputs.task == "classification" and "prediction" in train.columns
    predicted = train.column("prediction").long() if classes else None
    judged = judge_labels(inputs, trusted=not audit.held_out)
    if predicted is not None:
        result.predicted = [audit.samples.shown(number) for number in predicted.tolist()]
    if judged.suggested is not None:
        result.suggested = [audit.samples.shown(number) for number in judged.suggested.tolist()]
    result.label_probability, result.wrong_probability = judged.right, judged.wrong
    evidence = gather(inputs, result.ranking[: audit.config.evidence], audit.query_groups, audit.tokenizer)
    result.findings = find(inputs, judged, predicted, evidence)
    result.facts |= judged.facts | evidence.facts


def groups_of(model: nn.Module, layers: list[str]) -> dict[str, list[str]]:
    """Layer groups, and each block by itself where there are not too many."""
    groups = layer_groups(model, layers)
    blocks: dict[str, list[str]] = {}
    for name in layers:
        if (block := block_of(name)) is not None:
            blocks.setdefault(f"block {block}", []).append(name)
    return groups if not 1 < len(blocks) <= _MOST_BLOCKS else {**groups, **blocks}


def _default_methods(model: nn.Module, task: str, samples: Samples) -> list[str]:
    """The paper's, and the pool, which ranks best, of classifiers that have hidden states, no class rare."""
    methods = ["dot", "cosine", "datainf"]
    if task != "classification" or not hasattr(getattr(model, "config", None), "output_hidden_states"):
        return methods
    rarest = min(Counter(row["labels"] for row in samples.rows).values())
    return [*methods, "pool"] if rarest >= PROBE_FOLDS else methods


def _score(
    inputs: MethodInputs,
    train: GradientStore,
    config: AuditConfig,
    plan: RankingPlan,
    times: dict[str, float],
    training: RecordedTraining | None = None,
) -> AuditResult:
    """Influence, aggregations and baselines."""
    dynamics = {} if training is None else training.scores()
    rankings = {RankingKey(name): scores for name, scores in (baselines(train, config.seed) | dynamics).items()}
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
    if training is not None:
        never = int(training.losses.isnan().all(0).sum())
        facts["training"] = {"epochs": len(training.losses), "never_seen": never}
    about = train.meta.get("facts", {})
    facts |= {name: about[name] for name in ("trained", "covered") if name in about}
    if train.meta["settings"].get("one_row"):
        facts["captured"] = f"one sample a batch, {len(train.meta['settings']['exact'])} layers by autograd"
    if inputs.correct is not None:
        facts["queries_correct"] = int(inputs.correct.sum())
    if "correct" in train.columns:
        facts["train_accuracy"] = float(train.column("correct").double().mean())
    groups = {name: list(layers) for name, layers in plan.groups.items()}
    if inputs.samples.noise is not None and inputs.kept(VOTES) is not None:
        # Without the trusted rows, which the pool learns from too.
        with _timed(times, "rivals"):
            labels, states = inputs.labels()[0], inputs.passes.all_states(inputs.samples, base=True)
            agreement = neighbours({"last": states[:, -1]}, labels, neighbour_count(len(labels)))["last"][0]
            found = label_rivals(labels, agreement, probe_estimate(states.flatten(1), labels, states[:1].flatten(1))[0])
        rivals = {RankingKey(name): scores for name, scores in found.items()}
        # Baselines first.
        rankings = {key: s for key, s in rankings.items() if key.is_baseline} | rivals | rankings
    return AuditResult(list(train.ids), None, None, None, groups, rankings, plan.main, config.document(), facts)


@contextmanager
def _folder(out: str | Path | None, config: AuditConfig) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = Path(out)
    text = json.dumps(config.document(), indent=1) + "\n"
    earlier = folder / "config.json"
    there = _contents(folder, config.model, config.train, config.queries)
    if there and not (earlier.exists() and earlier.read_bytes() == text.encode()):
        raise InputError(f"out: {folder} holds something else than this very audit; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        remove_leftovers(folder)
        atomic_write(earlier, text)
        yield folder


def check_out(out: str | Path, *inputs: Any) -> None:
    """Raise InputError where no audit of these inputs can write: before a model is loaded."""
    folder = Path(out)
    if _contents(folder, *inputs) and not (folder / "config.json").exists():
        raise InputError(f"out: {folder} holds something else than an audit; choose a new folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"out: {folder} cannot be written ({there} is no folder that this user may write to)")


def _contents(folder: Path, *inputs: Any) -> list[Path]:
    """What is in a folder, but for the audit's own model and data, a lock, and half-written files of an audit that was
    killed as it began."""
    parts = [part for given in inputs for part in (given if isinstance(given, list | tuple) else [given])]
    own = {Path(part).absolute() for part in parts if isinstance(part, str | Path)}
    try:
        if not folder.exists():
            return []
        found = [file for file in folder.iterdir() if file.name != ".lock" and file.suffix != ".part"]
    except OSError as error:
        raise InputError(f"out: {folder} cannot be used ({os.strerror(error.errno or 0)})") from None
    return [file for file in found if file.absolute() not in own]


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    times[name] = time.perf_counter() - begin
    # What one step freed is not there for the next one alone.
    give_back()


def _named(value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    return f"({type(value).__name__} in memory)"
