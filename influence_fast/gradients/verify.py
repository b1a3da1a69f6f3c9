"""Checks capture on the user's own model before anything is kept: a few real rows, the literal way.

The truth is ``autograd.grad`` of one sample's loss, alone in its batch and without padding. Captured gradients must equal it
in a batch of rows of several lengths, and in a batch of as many rows as tokens, where samples and tokens could be confused.
Where they do not, another way that does is found for the layers concerned: samples in another place, the uses of their
parameter, autograd itself by ``torch.func``; where all that fails, one sample a batch. What is slower is said.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from influence_fast import ops
from influence_fast.data.batching import EQUAL_LENGTHS, ONE_ROW, PADDED, Loss, Rows, batches, checked_rows
from influence_fast.data.tasks import device_of
from influence_fast.errors import InputError
from influence_fast.gradients import losses
from influence_fast.gradients.capture import GradientCapture
from influence_fast.gradients.captured_layer import parameters_of
from influence_fast.gradients.differences import TOLERANCE
from influence_fast.gradients.exact_layers import gradients
from influence_fast.gradients.layers import (
    Expert,
    layers_by_name,
    select_layers,
    trained_layers,
    weight_of,
)
from influence_fast.gradients.model_state import as_evaluated, autocast, is_out_of_memory, is_sharded
from influence_fast.gradients.row_checks import settle_batches
from influence_fast.gradients.sample_rows import UnseenUse
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.ways import Ways
from influence_fast.ops.projections import Projection

# Numbers of whole gradients that are held at once to compare with.
_HELD = 1 << 28
# Rows of the batch by which slower ways are timed.
_TIMED = 8
# A layer's gradient below this share of the longest is noise: its error is measured against that share, or against more
# where roundings of the longest may be as large as the tolerance of that share. The biases of what a softmax takes, alike
# for all its entries, have a gradient of roundings alone.
_SMALL, _ROUNDINGS = 1e-5, {torch.float64: 4 * 2**-52, torch.float32: 4 * 2**-23}

_log = logging.getLogger("influence_fast")
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class CaptureReport:
    """How a model's layers can be captured, and how far from the literal gradients.

    Attributes:
        errors: ``{layer: largest relative error over the rows}`` in the way that is taken.
        exact: layers that autograd differentiates itself, because hooks do not see all uses of their weight; by
            ``torch.func`` over small batches, unless ``one_row``.
        one_row: whether batches hold one sample, because rows of a batch are not samples for some layer and ``torch.func``
            does not help.
        followed: layers captured at the uses of their parameter; as fast as the others.
        layouts: layers whose samples are not in the first dimension, and where (:class:`~influence_fast.GradientCapture`).
        rows_per_s: of the slower way, on the rows that were compared; 0 where there is none.
        reasons: what was wrong with the faster way, in sentences.
        rows: ids of the rows that were compared.
        tolerance: what errors were held against.
    """

    errors: dict[str, float]
    exact: list[str] = field(default_factory=list)
    one_row: bool = False
    reasons: list[str] = field(default_factory=list)
    rows: list[int | str] = field(default_factory=list)
    tolerance: float = 0.0
    followed: list[str] = field(default_factory=list)
    layouts: dict[str, str] = field(default_factory=dict)
    rows_per_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every layer is within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error, and the error."""
        name = max(self.errors, key=lambda layer: self.errors[layer])
        return name, self.errors[name]


def verify_capture(
    model: nn.Module,
    batch: Sequence[Mapping[str, Any]] | Mapping[str, Tensor],
    loss: str | Loss = "auto",
    layers: str | Iterable[str] = "all",
    projection: Projection | str = Projection("identity"),  # noqa: B008 (frozen)
    *,
    bias: bool = False,
    strict: bool = False,
) -> CaptureReport:
    """Compare captured gradients with literal ones, layer by layer, on a few rows of one's own.

    Args:
        model: as of :func:`~influence_fast.build_store`.
        batch: some rows, or a batch of tensors ``input_ids``, ``labels`` and ``attention_mask``.
        loss, layers, projection, bias: as of :func:`~influence_fast.build_store`.
        strict: refuse the slower ways instead of taking them.

    Returns:
        A report; it says which way each layer takes and what its error is there.

    Raises:
        InputError: no way gives a layer's literal gradient (names layer, error and likely cause); ``strict``, and a layer
            that needs a slower way.
    """
    given = _rows_of(batch) if isinstance(batch, Mapping) else batch
    settings = BuildSettings(select_layers(model, layers), Projection.parse(projection), loss, bias=bias)
    rows, kind = checked_rows(model, given, loss)
    return plan_capture(model, rows, kind, settings, strict=strict)


def plan_capture(
    model: nn.Module, rows: Rows, kind: str, settings: BuildSettings, *, most_tokens: int = 2048, strict: bool = False
) -> CaptureReport:
    """The fastest way that gives the literal gradients of these rows; arguments of :func:`verify_capture` made definite."""
    loss = settings.loss if callable(settings.loss) else losses.named(kind, chunked=False)
    settle_batches(model, rows, loss, most_tokens, settings.precision)
    with as_evaluated(model):
        return _Trial(model, rows, kind, settings, most_tokens, strict).plan()


def covered_share(model: nn.Module, layers: Iterable[str]) -> tuple[int, int, list[str]]:
    """Numbers of trained parameters that ``layers`` cover, of how many, and the names of trained ones that they do not."""
    known, chosen = layers_by_name(model), set(layers)
    weights = {id(weight_of(known[name])) for name in chosen if not isinstance(known[name], Expert)}
    covered, total, missing = 0, 0, []
    for name in trained_layers(model):
        layer = known[name]
        size = math.prod(layer.shape) if isinstance(layer, Expert) else weight_of(layer).numel()
        total += size
        if name in chosen or id(weight_of(layer)) in weights:
            covered += size
        else:
            missing.append(name)
    return covered, total, missing


class _Trial:
    """Some rows of a model, their literal gradients, and what captures give for them."""

    def __init__(
        self, model: nn.Module, rows: Rows, kind: str, settings: BuildSettings, most_tokens: int, strict: bool
    ) -> None:
        self.model, self.rows, self.kind, self.strict = model, rows, kind, strict
        self.settings = replace(settings, layers=select_layers(model, settings.layers))
        self.most_tokens = most_tokens
        by_length = sorted(range(len(rows)), key=lambda i: (rows.lengths[i], i))
        self.chosen = sorted({by_length[0], by_length[len(by_length) // 2], by_length[-1]})
        self.middle = by_length[len(by_length) // 2]
        if rows.together == EQUAL_LENGTHS:
            # Two different rows in one batch, if there are any of one length.
            shapes = rows.shapes
            alike = {shapes[row]: row for row in range(len(rows))}
            pair = next(((row, alike[shapes[row]]) for row in range(len(rows)) if alike[shapes[row]] != row), ())
            self.chosen = sorted({*self.chosen, *pair})
        short = rows.lengths[by_length[0]]
        # As many rows as tokens; a batch of that shape never comes where it has too many tokens.
        fits = short > 1 and short * short <= most_tokens and rows.together != ONE_ROW
        self.square = [by_length[0]] * short if fits else []
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        low = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(settings.precision or "")
        self.tolerance = TOLERANCE.get(low or dtype, 8e-2)
        self.small = max(_SMALL, _ROUNDINGS.get(low or dtype, 0) / self.tolerance)
        self.whole_loss = settings.loss if callable(settings.loss) else losses.named(kind, chunked=False)
        # Why there is no way in batches, or none at all.
        self.failure = ""

    def plan(self) -> CaptureReport:
        alone = Ways.first(self.model, self.settings.layers)
        singles = [[row] for row in self.chosen]
        if self._settle(alone, singles[:1], None) is None:
            raise InputError(self.failure)
        truth = self._literal()
        batched = alone.in_batches()
        # As the build may batch them: padded together, in equal lengths, or one row alone.
        padded = self.rows.together == PADDED
        together = [self.chosen] if padded else batches(self.rows, self.chosen, self.most_tokens)
        errors = self._settle(batched, together + ([self.square] if self.square else []), truth)
        if errors is not None and not batched.exact:
            return self._report(batched, errors, [])
        failure, single = self.failure, None
        if errors is None or self._numbers(batched) * _TIMED > _HELD:
            single = self._settle(alone, singles, truth)
            if single is None and errors is None:
                raise InputError(self.failure)
        ways, found = (batched, errors) if single is None else (alone, single)
        reasons = _reasons(ways) + ([failure] if errors is None and failure else [])
        if self.strict:
            raise InputError(f"strict: a slower way is needed, for {'; '.join(reasons)}")
        return self._report(ways, cast("dict[str, float]", found), reasons, self._rate(ways))

    def _numbers(self, ways: Ways) -> int:
        """Numbers of one row's whole gradients in the layers that autograd takes."""
        return sum(math.prod(layer.shape) for layer in self._capture(ways).captured_layers if layer.name in ways.exact)

    def _report(self, ways: Ways, errors: dict[str, float], reasons: list[str], rate: float = 0.0) -> CaptureReport:
        return CaptureReport(
            errors,
            self._capture(ways).exact,
            ways.one_row,
            reasons,
            [self.rows.ids[i] for i in self.chosen],
            self.tolerance,
            list(ways.followed),
            dict(ways.layouts),
            rate,
        )

    def _capture(self, ways: Ways) -> GradientCapture:
        capture = GradientCapture(self.model, **ways.of(self.settings).of_capture)
        capture.says_unused = False
        return capture

    def _settle(
        self, ways: Ways, together: list[list[int]], truth: dict[int, Gradients] | None
    ) -> dict[str, float] | None:
        """Move layers that are wrong to other ways until none is; the errors then, None where some layer has no way.

        Without a truth, only what capture itself notices.
        """
        while True:
            capture = self._capture(ways)
            try:
                errors = self._errors(capture, together, truth)
            except UnseenUse as error:
                self.failure = str(error)
                if not ways.take(error.remedies, self.failure):
                    return None
                continue
            except InputError as error:
                self.failure = str(error)
                return None
            except RuntimeError as error:
                if is_out_of_memory(error) and max(map(len, together)) > 1:
                    # Batches of the build adapt to memory; here one row at a time has to do.
                    together = [[row] for row in self.chosen]
                    continue
                # Of tables that come once for a batch, some models make copies themselves; and some operations stand
                # within functions that take no hook.
                self.failure = str(error).splitlines()[0]
                suspects = capture.expanded or ways.followed
                if not ways.take(dict.fromkeys(suspects, "exact"), self.failure):
                    raise
                continue
            if not ways.one_row and capture.one_by_one:
                self.failure = f"torch.func cannot run this model ({capture.one_by_one})"
                return None
            wrong = {name: error for name, error in errors.items() if not error <= self.tolerance}
            if not wrong:
                # Batches come in which their ids are as many as the samples.
                ways.layouts |= dict.fromkeys(sorted(capture.shared), "shared")
                return errors
            self.failure = _sentence(wrong, "alone" if ways.one_row else "in a batch", self.tolerance)
            if not ways.advance({name: _sentence({name: error}, "by hooks", 0) for name, error in wrong.items()}):
                return None

    def _errors(
        self, capture: GradientCapture, together: list[list[int]], truth: dict[int, Gradients] | None
    ) -> dict[str, float]:
        """Largest relative error of each layer; NaN counts as infinite."""
        errors: dict[str, float] = {}
        for batch in together:
            found = self._captured(capture, batch)
            if truth is None:
                continue
            for offset, row in enumerate(batch):
                expected = truth[row]
                if not all(gradient.isfinite().all() for gradient in expected.values()):
                    # Nothing to compare with; the build names the row.
                    errors |= {name: errors.get(name, 0.0) for name in expected}
                    continue
                longest = max((float(g.norm()) for g in expected.values()), default=0.0)
                for name, gradient in expected.items():
                    length = max(float(gradient.norm()), self.small * longest)
                    error = float((found[name][offset].to(gradient) - gradient).norm()) / length if length else 0.0
                    errors[name] = max(errors.get(name, 0.0), math.inf if math.isnan(error) else error)
        return errors

    def _captured(self, capture: GradientCapture, rows: list[int]) -> Gradients:
        batch = self._batch(rows)
        with capture, autocast(self.model, self.settings.precision):
            each = self._losses(capture.part)(self.model, batch)
            if each.requires_grad:
                each.sum().backward()
            capture.differentiate(self.whole_loss, batch)
            return capture.pop()

    def _rate(self, ways: Ways) -> float:
        """Rows a second, of a small batch of the middle row."""
        most = max(1, min(_TIMED, self.most_tokens // max(1, self.rows.lengths[self.middle])))
        batch = [self.middle] * (1 if ways.one_row else most)
        capture = self._capture(ways)
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            self._captured(capture, batch)
            seconds.append(time.perf_counter() - begin)
        return len(batch) / min(seconds)

    def _literal(self) -> dict[int, Gradients]:
        """The gradient of each row's loss alone, by autograd, projected as the capture would."""
        capture = GradientCapture(self.model, self.settings.layers, self.settings.projection, bias=self.settings.bias)
        known = layers_by_name(self.model)
        matrices = ops.Matrices()
        out: dict[int, Gradients] = {row: {} for row in self.chosen}
        for part in _parts(capture):
            owned = {layer.name: parameters_of(layer, known[layer.name]) for layer in part}
            weights = list({id(weight): weight for found in owned.values() for weight in found}.values())
            flags = [weight.requires_grad for weight in weights]
            for weight in weights:
                weight.requires_grad_(True)
            try:
                for row in self.chosen:
                    found = gradients(partial(self._loss_of, row), weights)
                    grads = dict(zip(map(id, weights), found, strict=True))
                    for layer in part:
                        whole = [grads[id(weight)][None] for weight in owned[layer.name]]
                        out[row][layer.name] = layer.as_kept(whole, matrices)[0]
            finally:
                for weight, flag in zip(weights, flags, strict=True):
                    weight.requires_grad_(flag)
        return out

    def _loss_of(self, row: int) -> Tensor:
        with autocast(self.model, self.settings.precision):
            return self.whole_loss(self.model, self._batch([row])).sum()

    def _batch(self, chosen: list[int]) -> dict[str, Tensor]:
        batch = self.rows.batch(chosen, self.model)
        return {name: tensor.to(device_of(self.model)) for name, tensor in batch.items()}

    def _losses(self, part: Callable[..., Any]) -> Loss:
        return self.settings.loss if callable(self.settings.loss) else losses.named(self.kind, part)


def _sentence(wrong: Mapping[str, float], where: str, tolerance: float) -> str:
    name = max(wrong, key=lambda layer: wrong[layer])
    more = f" and {len(wrong) - 1} more layers" if len(wrong) > 1 else ""
    limit = f" (tolerance {tolerance:g})" if tolerance else ""
    return f"{where}, the gradient of {name!r}{more} is off by {wrong[name]:.1e} of its length{limit}"


def _reasons(ways: Ways) -> list[str]:
    """Why some layers go to autograd: one sentence for all that have the same."""
    if not ways.exact:
        return []
    names = list(ways.exact)
    causes = list(dict.fromkeys(ways.why[name] for name in names if name in ways.why))
    more = f"; and {len(causes) - 1} more" if len(causes) > 1 else ""
    return [f"{causes[0]}{more}" if causes else f"{_some(names)}: no hook gives them"]


def can_be_verified(model: nn.Module) -> bool:
    """Whether this process holds whole weights: a model that FSDP sharded has no literal gradient here."""
    return not any(is_sharded(parameter) for parameter in model.parameters())


def say(report: CaptureReport, names: Sequence[str]) -> None:
    """Log the slower way once, with its reasons and its rate."""
    if not report.one_row and not report.exact:
        return
    ways = f"{len(report.exact)} of {len(names)} layers by autograd" if report.exact else ""
    _log.warning(
        "capturing %s, about %.3g rows a second: %s",
        ", ".join(filter(None, ["one sample a batch" if report.one_row else "", ways])),
        report.rows_per_s,
        "; ".join(report.reasons) or "parameters beside layers",
    )


def _parts(capture: GradientCapture) -> list[list[Any]]:
    """Layers in groups whose whole gradients can be held at once."""
    parts: list[list[Any]] = [[]]
    held = 0
    for layer in capture.captured_layers:
        size = layer.shape[0] * layer.shape[1]
        if parts[-1] and held + size > _HELD:
            parts.append([])
            held = 0
        parts[-1].append(layer)
        held += size
    return parts


def _rows_of(batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A batch of tensors as rows."""
    if "input_ids" not in batch or "labels" not in batch:
        raise InputError(f"batch: expected input_ids and labels among its tensors, got {', '.join(map(str, batch))}")
    return [{name: tensor[i].tolist() for name, tensor in batch.items()} for i in range(len(batch["input_ids"]))]


def _some(names: list[str]) -> str:
    return f"{names[0]!r}" + (f" and {len(names) - 1} more layers" if len(names) > 1 else "")
