"""A data set through a model into a gradient store, once capture is verified on the model.

Rows are taken shard by shard (``job``), so what a store holds depends on its settings alone, and a killed build goes
on from the last whole shard.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from influence_fast import _distributed as processes
from influence_fast._files import locked
from influence_fast.data.batching import Loss, checked_rows, token_budget
from influence_fast.data.tasks import LOSSES
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.differences import recorded_identity
from influence_fast.gradients.job import Job, Watch, prepare_job, write_store
from influence_fast.gradients.layers import quantised_layers, select_layers
from influence_fast.gradients.model_state import as_evaluated
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_changes import add_segment, check_version, clear, drop_other
from influence_fast.gradients.store_format import MANIFEST
from influence_fast.gradients.store_records import dtype_of, read_manifest, read_state, verifying
from influence_fast.gradients.store_writer import recorded
from influence_fast.gradients.verify import CaptureReport, can_be_verified, covered_share, plan_capture, say
from influence_fast.ops.arguments import AdamState
from influence_fast.ops.projections import Projection

_log = logging.getLogger("influence_fast")


def build_store(
    path: str | PathLike[str],
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]] | Iterable[Mapping[str, Any]],
    layers: str | Iterable[str] = "all",
    projection: Projection | str = Projection(),  # noqa: B008 (frozen)
    loss: str | Loss = "auto",
    batch_tokens: int | str = "auto",
    resume: bool = True,
    progress: bool = True,
    *,
    ids: Sequence[int | str] | Iterable[int | str] | None = None,
    dtype: str = "float32",
    shard_rows: int | str = "auto",
    truncate: bool = False,
    bias: bool = False,
    precision: str | None = None,
    verify: bool = True,
    strict: bool = False,
    tokenizer: Any = None,
    segment_rows: int = 65536,
    adam: Mapping[str, AdamState] | None = None,
    factors: int | None = None,
) -> GradientStore:
    """Per-sample gradients of ``model`` on every row of ``dataset``, kept in a folder.

    Args:
        path: the store's folder; made if missing. With ``resume`` an unfinished build of the same model, rows and
            settings goes on from its last whole shard and ends in the same bytes.
        model: a Hugging Face model or anything called like one. Runs in eval mode on the device where it is; flags and
            modes are put back afterwards. In a process group every rank calls with the same arguments and a shared
            folder, and writes its own shards; the bytes are those of one process with as many threads. A model
            sharded by FSDP2 (``fully_shard``) runs on all ranks in step.
        dataset: a ``datasets.Dataset`` or sequence of dicts with ``input_ids`` and ``labels`` (an int per row, or one
            per token with -100 where there is no target; what else a loss takes: below), and any other column that the
            model's forward names. An ``attention_mask`` is passed on, with pads at both ends cut off. A stream (a
            generator, ``datasets`` streaming), of any length, is taken ``segment_rows`` rows at a time, each of which are
            in the store when they are done. A build that was stopped counts the rows that are there off the stream it is
            given then, holds what they are against what was built, and goes on behind them.
        layers, projection, bias: see :class:`~influence_fast.GradientCapture`.
        loss: ``auto`` is the model's own, told by its head, its config and the labels, and refused where it is none of:
            ``classification`` (cross entropy), ``causal-lm`` and ``causal-lm-sum`` (mean and sum of cross entropy over
            a row's target tokens, each predicted one token before), ``masked-lm`` and ``token-classification`` (the mean,
            each at its own place), ``seq2seq`` (``labels`` of any length, from which the model makes its decoder's
            inputs), ``question-answering`` (``start_positions`` and ``end_positions``), ``multiple-choice``
            (``input_ids`` a list for each choice), ``multi-label`` (a list of 0 and 1) and ``regression`` (a number
            or a list), both the mean over outputs; or ``loss(model, batch) -> (N,)``.
        batch_tokens: largest number of tokens in a batch, padding included. ``auto`` follows from the memory that is
            free when the build begins, and is kept for its resumption. When memory runs out it is halved, for the rest
            of the run. Gradients do not depend on it beyond the rounding of their last bits; two builds are the same
            to the bit where it is the same number and no batch ran out of memory. Where padding or other rows change
            a row's loss, as a few tiny forwards find out, batches hold rows of equal lengths, or one; the log says so.
        ids: names of the rows; their numbers by default.
        dtype: float32, float16, bfloat16 or int8 on disk; ``int8_block`` and ``int4`` have a scale for every 32 numbers.
        precision: None runs the model as it is; ``bfloat16`` or ``float16`` runs forward and backward under autocast
            (projections and sums stay float32). float16 loses gradients below 6e-8: prefer bfloat16.
        truncate: cut rows that are longer than the model's context instead of refusing them.
        verify: first compare what is captured of a few rows with the literal gradients
            (:func:`~influence_fast.verify_capture`), and take a slower way where the fast one is not right.
        strict: refuse instead of taking a slower way.
        tokenizer: what made the rows of texts, if anything did. The store keeps what tells it and its chat template apart,
            as it does of the model's class, config and adapters and of a loss's code and bound arguments, beside the loss
            and gradient of two rows. A build that goes on finds all of it again and refuses what differs.
        segment_rows: rows of a stream that are in memory together, and appended together.
        adam: Adam's moments by layer (:func:`~influence_fast.read_adam`): kept are its updates of each row's whole gradient,
            ``(b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)``, projected, as LESS compares them with plain gradients
            of queries (:func:`~influence_fast.less`). Every layer needs moments, norms and biases that are selected as
            layers among them. The store keeps a hash of them. Layers that are not sketched by one side
            have whole gradients of some rows in memory.
        factors: keep of each layer's gradient, whole or projected on two sides, its nearest matrix of this rank, as that
            many pairs of vectors: ``factors * (out + in)`` numbers for ``out * in`` (LoRIF, arXiv 2601.21929). Layers for
            which that is no fewer stay whole. All that reads the store reads what they stand for.

    Returns:
        The finished store, with columns ``loss`` (float32) and, for classes and choices, ``correct`` and ``prediction``.

    Raises:
        InputError: an empty set, a missing column, labels out of range, token ids beyond the vocabulary, rows that are
            empty or longer than the model's context, non-finite losses or gradients (names layer and row).
        StoreError: ``path`` holds a store of another model, projection or data set, or of another computation; names
            the first thing that differs. A stream that gives other rows than those that were built of it.
    """
    settings = BuildSettings(
        layers,
        Projection.parse(projection),
        loss,
        batch_tokens,
        dtype,
        shard_rows,
        truncate,
        bias,
        precision,
        verify,
        strict,
        adam=adam,
        factors=factors,
    )
    if not hasattr(dataset, "__len__") and not hasattr(dataset, "iterrows"):
        if isinstance(segment_rows, bool) or not isinstance(segment_rows, int) or segment_rows < 1:
            raise InputError(f"segment_rows: expected a positive int, got {segment_rows!r}")
        stream = _Stream(dataset, ids, segment_rows)
        return _build_stream(path, model, stream, settings, resume, progress, tokenizer)
    return build_from(
        path,
        model,
        cast(Sequence[Mapping[str, Any]], dataset),
        settings,
        ids=cast(Sequence[int | str] | None, ids),
        resume=resume,
        progress=progress,
        tokenizer=tokenizer,
    )


def append_store(
    path: str | PathLike[str],
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    *,
    ids: Sequence[int | str] | None = None,
    loss: str | Loss = "auto",
    batch_tokens: int | str = "auto",
    shard_rows: int | str = "auto",
    progress: bool = True,
    verify: bool = True,
    strict: bool = False,
    tokenizer: Any = None,
    earlier: Sequence[Mapping[str, Any]] | None = None,
) -> GradientStore:
    """Add rows behind those of a store, with its layers, projection, dtype and options.

    Readers see the store without the new rows until all are written, and with them from then on. Killed at any moment, it
    goes on when it is called again with the same rows; rows that are the last that were appended are not appended twice.
    In a process group every rank calls, as of :func:`build_store`.

    Args:
        path: a finished store.
        model: the model that the store was built with.
        dataset, batch_tokens, shard_rows, progress, verify, strict, tokenizer: as of :func:`build_store`.
        ids: names of the new rows, which no row of the store has; numbers that follow by default, where the store's are.
        loss: that of the store by default; one of one's own is given again.
        earlier: the data set that the store was begun with: the rows whose loss and gradient the store keeps are computed
            again, and held against them.

    Returns:
        The store with the new rows.

    Raises:
        InputError: as of :func:`build_store`; an id that is taken, or missing where the store's rows have names.
        StoreError: there is no finished store, it is of version 1, another process is changing it, or it was built with
            another model, loss, tokenizer or computation; names the first thing that differs.
    """
    folder = Path(path)
    manifest = processes.agree(lambda: read_state(folder, verifying()).manifest)
    check_version(folder, manifest)
    taken = manifest["settings"]
    if "adam" in recorded_identity(manifest):
        raise StoreError(f"{folder}: holds Adam's updates, to which nothing can be appended; build a store of its own")
    settings = BuildSettings(
        list(manifest["layers"]),
        Projection.parse(manifest["projection"]),
        _loss_again(folder, manifest["loss"], loss),
        batch_tokens,
        dtype_of(manifest),
        shard_rows,
        taken.get("truncate", False),
        taken.get("bias", False),
        taken.get("precision"),
        verify,
        strict,
        factors=manifest.get("factors"),
    )
    if hasattr(dataset, "iterrows"):
        dataset = cast(Any, dataset).to_dict("records")
    elif not hasattr(dataset, "__len__"):
        dataset = list(dataset)
    given = ids is not None and any(name != row for row, name in enumerate(ids))
    names = ids if given else processes.agree(lambda: _following(folder, len(dataset)))
    facts: dict[str, Any] = {}
    if verify:
        settings, facts = verified_settings(model, dataset, settings, names)
    if earlier is not None:
        first = prepare_job(model, earlier, settings, None, None, None, tokenizer)
        kept = manifest.get("facts", {})
        if not kept.get("probe"):
            _log.warning("%s: keeps no loss and gradient of single rows, to compute again", folder)
        else:
            first.check_same(path, kept, first.computed_facts(kept))
    job = prepare_job(model, dataset, settings, names, _earlier_tokens(folder, manifest), facts, tokenizer)
    return _append(folder, job, progress, given)


def _append(folder: Path, job: Job, progress: bool, named: bool) -> GradientStore:
    """Write a job as the next segment; rank 0 holds the store meanwhile."""
    with ExitStack() as stack:

        def begin() -> str:
            stack.enter_context(locked(folder / ".lock"))
            state = read_state(folder, verifying())
            clear(folder, state.manifest)
            job.check_appends(folder, state.manifest)
            last = state.parts[-1]
            files = [part.ids_file(verifying()) for part in state.parts]
            data = job.store_settings()["settings"]["data"]
            same = last.folder != folder and last.manifest["settings"].get("data") == data
            if same and (not named or list(last.ids(files[-1])) == list(job.rows.ids)):
                _log.warning("%s: these rows are the last that were appended; nothing to do", folder)
                return ""
            if named:
                new = set(job.rows.ids)
                for name in state.ids(files):
                    if name in new:
                        raise InputError(f"ids: {name!r} is that of a row of {folder}; new rows need other ids")
            segment = f"segment-{state.manifest.get('next', 1):05d}"
            if drop_other(folder / segment, data):
                _log.warning("%s: other rows were about to be appended; that is given up", folder)
            return segment

        segment = processes.agree(begin)
        if segment:
            write_store(folder / segment, job, progress=progress)
            processes.agree(lambda: add_segment(folder, segment))
    processes.wait()
    return GradientStore.open(folder)


def _loss_again(folder: Path, kept: str, loss: str | Loss) -> str | Loss:
    """The loss of a store, which is known by name, or given again."""
    if callable(loss) or (loss != "auto" and loss in LOSSES):
        return loss
    if loss == "auto" and kept in LOSSES:
        return kept
    raise InputError(f"loss: {folder} was built with a loss of its own, {kept}; pass it again")


def _following(folder: Path, count: int) -> Any:
    """Numbers for new rows, behind those that rows of the store have or had."""
    state = read_state(folder, verifying())
    after = 0
    for part in state.parts:
        for name in part.ids(part.ids_file(verifying())):
            if not isinstance(name, int):
                raise InputError(f"ids: rows of {folder} have names, such as {name!r}; name the new ones too")
            after = max(after, name + 1)
    return list(range(after, after + count))


def _earlier_tokens(folder: Path, manifest: Mapping[str, Any]) -> int | None:
    return processes.agree(lambda: recorded(folder / f"segment-{manifest.get('next', 1):05d}", "batch_tokens"))


@dataclass
class _Stream:
    """Rows that come once, with a name for each or none, of which ``taken`` were taken."""

    dataset: Iterable[Mapping[str, Any]]
    ids: Iterable[int | str] | None
    segment_rows: int
    taken: int = 0

    def __post_init__(self) -> None:
        self._rows = iter(self.dataset)
        self._names = None if self.ids is None else iter(self.ids)

    def take(self, count: int) -> tuple[list[Mapping[str, Any]], Sequence[int | str]]:
        """As many of the next rows as there are, and their names."""
        rows = list(islice(self._rows, count))
        names: Sequence[int | str] = range(self.taken, self.taken + len(rows))
        if self._names is not None:
            names = list(islice(self._names, len(rows)))
        self.taken += len(rows)
        return rows, names


def _build_stream(
    path: str | PathLike[str],
    model: nn.Module,
    stream: _Stream,
    settings: BuildSettings,
    resume: bool,
    progress: bool,
    tokenizer: Any,
) -> GradientStore:
    """Build rows of a stream segment by segment, once those that are there were counted off it."""
    folder = Path(path)
    known = processes.agree(lambda: _known(folder)) if resume else []
    for count, data in known:
        rows, names = stream.take(count)
        if len(rows) < count:
            raise StoreError(
                f"{folder}: {stream.taken - len(rows) + count} rows were built, the stream has {stream.taken}"
            )
        if data is None:
            _log.warning(
                "%s: was compacted: that the stream has the same first %d rows cannot be checked", folder, count
            )
        elif data != checked_rows(model, rows, settings.loss, names, settings.truncate)[0].digest():
            raise StoreError(
                f"{folder}: rows {stream.taken - count} to {stream.taken - 1} of the stream are others than those that were "
                "built; it does not keep its order. Choose a new folder, or give it in the order of then"
            )
    if known:
        _log.warning("%s: goes on behind the first %d rows of the stream", folder, stream.taken)
    else:
        rows, names = stream.take(processes.agree(lambda: _begun(folder)) or stream.segment_rows)
        if not rows:
            raise InputError("dataset: expected at least one row, got none")
        build_from(folder, model, rows, settings, ids=names, resume=resume, progress=progress, tokenizer=tokenizer)
    facts: dict[str, Any] = {}
    while True:
        manifest = processes.agree(lambda: read_manifest(folder))
        pending = folder / f"segment-{manifest.get('next', 1):05d}"
        rows, names = stream.take(processes.agree(partial(_begun, pending)) or stream.segment_rows)
        if not rows:
            return GradientStore.open(folder)
        if settings.verify:
            # The ways of the layers are those of the model, and hold for all that follows.
            settings, facts = verified_settings(model, rows, settings, names)
            settings = replace(settings, verify=False)
        job = prepare_job(model, rows, settings, names, _earlier_tokens(folder, manifest), facts, tokenizer)
        _append(folder, job, progress, stream.ids is not None)


def _known(folder: Path) -> list[tuple[int, str | None]]:
    """Rows of each segment of a store that is there, and the hash of what was fed to the model."""
    if not (folder / MANIFEST).exists():
        return []
    state = read_state(folder, verifying(), unfinished=True)
    if state.parts[0].done < state.parts[0].rows:
        return []
    taken = [part.manifest.get("settings", {}) for part in state.parts]
    return [
        (about.get("built", part.rows), None if "built" in about else about.get("data"))
        for part, about in zip(state.parts, taken, strict=True)
    ]


def _begun(folder: Path) -> int | None:
    """Rows of a build that was begun, None where there is none."""
    return read_manifest(folder)["rows"] if (folder / MANIFEST).exists() else None


def build_from(
    path: str | PathLike[str],
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    settings: BuildSettings,
    *,
    ids: Sequence[int | str] | None = None,
    resume: bool = True,
    progress: bool = True,
    tokenizer: Any = None,
    watch: Watch | None = None,
) -> GradientStore:
    """:func:`build_store` with its settings as one object; ``watch`` sees the logits of each forward pass."""
    facts: dict[str, Any] = {}
    if settings.verify:
        settings, facts = verified_settings(model, dataset, settings, ids)
    job = prepare_job(model, dataset, settings, ids, recorded(path, "batch_tokens"), facts, tokenizer, watch)
    return write_store(path, job, resume, progress)


def gradients_of(
    model: nn.Module, dataset: Sequence[Mapping[str, Any]], layers: Iterable[str], projection: Projection | str
) -> dict[str, Tensor]:
    """Gradients of a few rows, such as one query, in memory: ``{layer: (rows, dim)}`` as :func:`build_store` keeps them."""
    settings, _ = verified_settings(model, dataset, BuildSettings(layers, Projection.parse(projection)))
    job = prepare_job(model, dataset, settings)
    with as_evaluated(model), job.capture:
        return job.compute(range(len(job.rows))).gradients


def verified_settings(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    settings: BuildSettings,
    ids: Sequence[int | str] | None = None,
) -> tuple[BuildSettings, dict[str, Any]]:
    """The settings with the way that verification found, and what is worth knowing of it."""
    # Layers that were named one by one are meant, whatever training changed.
    named = not isinstance(settings.layers, str)
    if not named and (quantised := quantised_layers(model)):
        _log.warning("quantised and frozen, so without a gradient: %s", _some(quantised))
    settings = replace(settings, layers=select_layers(model, settings.layers))
    report = None
    if can_be_verified(model):
        rows, kind = checked_rows(model, dataset, settings.loss, ids, settings.truncate)
        tokens = token_budget(settings.batch_tokens, model)
        report = plan_capture(model, rows, kind, settings, most_tokens=tokens, strict=settings.strict)
        say(report, list(settings.layers))
        settings = replace(
            settings,
            exact=report.exact,
            one_row=report.one_row,
            followed=report.followed,
            layouts=report.layouts,
        )
    return settings, _facts(model, settings, report, named)


def _facts(model: nn.Module, settings: BuildSettings, report: CaptureReport | None, named: bool) -> dict[str, Any]:
    """What is worth knowing of a store that another build of it need not share: what was verified, what is covered."""
    covered, trained, missing = covered_share(model, settings.layers)
    if trained and not covered and not named:
        raise InputError(
            f"layers: none of the {trained:,} trained numbers is in the selected layers (trained are {_some(missing)}); "
            "layers='trained' selects them"
        )
    if missing:
        _log.warning(
            "trained parameters that no selected layer covers: %s, %.2g %% of the trained numbers",
            _some(missing),
            100 * (1 - covered / trained),
        )
    facts: dict[str, Any] = {"trained": trained, "covered": covered}
    if report is not None:
        facts["verified"] = {"rows": report.rows, "tolerance": report.tolerance, "reasons": report.reasons}
    return facts


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
