"""A data set through a model into a gradient store, once capture is verified on the model.

Rows are taken shard by shard (``job``), so what a store holds depends on its settings alone, and a killed build goes
on from the last whole shard.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

from torch import Tensor, nn

from influence_fast.data.batching import Loss, checked_rows, token_budget
from influence_fast.errors import InputError
from influence_fast.gradients.job import prepare_job, write_store
from influence_fast.gradients.layers import quantised_layers, select_layers
from influence_fast.gradients.model_state import as_evaluated
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_writer import recorded
from influence_fast.gradients.verify import CaptureReport, can_be_verified, covered_share, plan_capture, say
from influence_fast.ops.projections import Projection

_log = logging.getLogger("influence_fast")


def build_store(
    path: str | PathLike[str],
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    layers: str | Iterable[str] = "all",
    projection: Projection | str = Projection(),  # noqa: B008 (frozen)
    loss: str | Loss = "auto",
    batch_tokens: int | str = "auto",
    resume: bool = True,
    progress: bool = True,
    *,
    ids: Sequence[int | str] | None = None,
    dtype: str = "float32",
    shard_rows: int | str = "auto",
    truncate: bool = False,
    bias: bool = False,
    precision: str | None = None,
    verify: bool = True,
    strict: bool = False,
    tokenizer: Any = None,
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
            model's forward names. An ``attention_mask`` is passed on, with pads at both ends cut off.
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
        dtype: float32, float16, bfloat16 or int8 on disk.
        precision: None runs the model as it is; ``bfloat16`` or ``float16`` runs forward and backward under autocast
            (projections and sums stay float32). float16 loses gradients below 6e-8: prefer bfloat16.
        truncate: cut rows that are longer than the model's context instead of refusing them.
        verify: first compare what is captured of a few rows with the literal gradients
            (:func:`~influence_fast.verify_capture`), and take a slower way where the fast one is not right.
        strict: refuse instead of taking a slower way.
        tokenizer: what made the rows of texts, if anything did. The store keeps what tells it and its chat template apart,
            as it does of the model's class, config and adapters and of a loss's code and bound arguments, beside the loss
            and gradient of two rows. A build that goes on finds all of it again and refuses what differs.

    Returns:
        The finished store, with columns ``loss`` (float32) and, for classes and choices, ``correct`` and ``prediction``.

    Raises:
        InputError: an empty set, a missing column, labels out of range, token ids beyond the vocabulary, rows that are
            empty or longer than the model's context, non-finite losses or gradients (names layer and row).
        StoreError: ``path`` holds a store of another model, projection or data set, or of another computation; names
            the first thing that differs.
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
    )
    return build_from(path, model, dataset, settings, ids=ids, resume=resume, progress=progress, tokenizer=tokenizer)


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
) -> GradientStore:
    """:func:`build_store` with its settings as one object."""
    facts: dict[str, Any] = {}
    if settings.verify:
        settings, facts = verified_settings(model, dataset, settings, ids)
    job = prepare_job(model, dataset, settings, ids, recorded(path, "batch_tokens"), facts, tokenizer)
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
