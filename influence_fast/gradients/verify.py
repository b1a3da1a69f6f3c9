"""Checks capture on the user's own model before anything is kept: a few real rows, the literal way.

The truth is ``autograd.grad`` of one sample's loss, alone in its batch and without padding. Captured gradients must equal it
in a batch of rows of several lengths, and in a batch of as many rows as tokens, where samples and tokens could be confused.
Where they do not, a slower way that does is found and said: one sample a batch, and for layers whose weight is used in ways
that hooks do not see, autograd itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from influence_fast import ops
from influence_fast.data.batching import ONE_ROW, PADDED, Loss, Rows, batches, checked_rows
from influence_fast.data.tasks import device_of
from influence_fast.errors import InputError
from influence_fast.gradients import losses
from influence_fast.gradients.capture import GradientCapture, UnseenUse, owned_parameters
from influence_fast.gradients.differences import TOLERANCE
from influence_fast.gradients.layers import named_layers, other_parameters, select_layers, trained_layers
from influence_fast.gradients.model_state import as_evaluated, autocast, is_out_of_memory, is_sharded
from influence_fast.gradients.row_checks import settle_batches
from influence_fast.gradients.settings import BuildSettings
from influence_fast.ops.projections import Projection

# Numbers of whole gradients that are held at once to compare with.
_HELD = 1 << 28
# A layer's gradient below this share of the longest is noise: its error is measured against that share.
_SMALL = 1e-5

_log = logging.getLogger("influence_fast")
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class CaptureReport:
    """How a model's layers can be captured, and how far from the literal gradients.

    Attributes:
        errors: ``{layer: largest relative error over the rows}`` in the way that is taken.
        exact: layers that autograd differentiates itself, because hooks do not see all uses of their weight.
        one_row: whether batches hold one sample, because rows of a batch are not samples for some layer or ``exact`` is
            not empty.
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
    modules, parameters, chosen = named_layers(model), other_parameters(model), set(layers)
    weights = {id(modules[name].weight) for name in chosen if name in modules}
    covered, total, missing = 0, 0, []
    for name in trained_layers(model):
        weight = cast(Tensor, modules[name].weight if name in modules else parameters[name])
        total += weight.numel()
        if name in chosen or id(weight) in weights:
            covered += weight.numel()
        else:
            missing.append(name)
    return covered, total, missing


class _Trial:
    """Some rows of a model, their literal gradients, and what captures give for them."""

    def __init__(
        self, model: nn.Module, rows: Rows, kind: str, settings: BuildSettings, most_tokens: int, strict: bool
    ) -> None:
        self.model, self.rows, self.kind, self.settings, self.strict = model, rows, kind, settings, strict
        self.most_tokens = most_tokens
        by_length = sorted(range(len(rows)), key=lambda i: (rows.lengths[i], i))
        self.chosen = sorted({by_length[0], by_length[len(by_length) // 2], by_length[-1]})
        short = rows.lengths[by_length[0]]
        # As many rows as tokens; a batch of that shape never comes where it has too many tokens.
        self.square = [by_length[0]] * short if short > 1 and short * short <= most_tokens else []
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        low = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(settings.precision or "")
        self.tolerance = TOLERANCE.get(low or dtype, 8e-2)

    def plan(self) -> CaptureReport:
        layers = select_layers(self.model, self.settings.layers)
        unseen = self._find_unseen(layers)
        truth = self._literal(self._capture(unseen), self.chosen)
        batched = self._errors_in_batches(truth, unseen)
        if not unseen and batched is not None and self._fine(batched):
            return self._report(batched, [], False, [])
        reasons = [] if batched is None or unseen else [self._sentence(batched, "in a batch")]
        alone = self._errors(truth, unseen, [[i] for i in self.chosen])
        wrong = [name for name, error in alone.items() if not error <= self.tolerance]
        if unseen:
            reasons.append(f"the output of {_some(unseen)} is not that of a plain layer")
        if wrong:
            reasons.append(self._sentence(alone, "alone"))
            unseen = [name for name in layers if name in {*unseen, *wrong}]
            truth = self._literal(self._capture(unseen), self.chosen)
            alone = self._errors(truth, unseen, [[i] for i in self.chosen])
        if self.batch_failure:
            reasons.append(self.batch_failure)
        if not self._fine(alone):
            name, error = max(alone.items(), key=lambda pair: pair[1])
            raise InputError(
                f"layer {name!r}: its captured gradient differs from the literal one by {error:.1e} of its length "
                f"(tolerance {self.tolerance:g}), also one sample at a time; the loss of a row is likely random, or not "
                "that row's alone"
            )
        if self.strict:
            raise InputError(f"strict: a slower way is needed, for {'; '.join(reasons)}")
        return self._report(alone, self._capture(unseen).exact, True, reasons)

    batch_failure = ""

    def _report(self, errors: dict[str, float], exact: list[str], one_row: bool, reasons: list[str]) -> CaptureReport:
        ids = [self.rows.ids[i] for i in self.chosen]
        return CaptureReport(errors, exact, one_row, reasons, ids, self.tolerance)

    def _capture(self, exact: Iterable[str] = ()) -> GradientCapture:
        settings = self.settings
        return GradientCapture(self.model, settings.layers, settings.projection, bias=settings.bias, exact=exact)

    def _find_unseen(self, layers: list[str]) -> list[str]:
        """Layers whose module's output is not a plain layer's; found one capture at a time."""
        unseen: list[str] = []
        while True:
            try:
                self._captured(self._capture(unseen), [self.chosen[0]])
            except UnseenUse as error:
                unseen += error.layers
            except InputError:
                return [name for name in layers if name in set(unseen)]
            else:
                return [name for name in layers if name in set(unseen)]

    def _errors_in_batches(self, truth: dict[int, Gradients], unseen: list[str]) -> dict[str, float] | None:
        """Errors of batches of several rows; None where capture refuses them, with the sentence kept."""
        if unseen or self._capture().exact:
            return None
        try:
            # As the build may batch them: padded together, in equal lengths, or one row alone.
            padded = self.rows.together == PADDED
            together = [self.chosen] if padded else batches(self.rows, self.chosen, self.most_tokens)
            square = [self.square] if self.square and self.rows.together != ONE_ROW else []
            errors = self._errors(truth, [], together + square)
        except InputError as error:
            self.batch_failure = str(error)
            return None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Batches of the build adapt to memory; here one row at a time has to do.
            return self._errors(truth, [], [[row] for row in self.chosen])
        return errors

    def _errors(self, truth: dict[int, Gradients], exact: list[str], together: list[list[int]]) -> dict[str, float]:
        """Largest relative error of each layer; NaN counts as infinite."""
        errors: dict[str, float] = {}
        capture = self._capture(exact)
        for batch in together:
            found = self._captured(capture, batch)
            for offset, row in enumerate(batch):
                expected = truth[row]
                if not all(gradient.isfinite().all() for gradient in expected.values()):
                    # Nothing to compare with; the build names the row.
                    errors |= {name: errors.get(name, 0.0) for name in expected}
                    continue
                longest = max((float(g.norm()) for g in expected.values()), default=0.0)
                for name, gradient in expected.items():
                    length = max(float(gradient.norm()), _SMALL * longest)
                    error = float((found[name][offset].to(gradient) - gradient).norm()) / length if length else 0.0
                    errors[name] = max(errors.get(name, 0.0), math.inf if math.isnan(error) else error)
        return errors

    def _captured(self, capture: GradientCapture, batch: list[int]) -> Gradients:
        with capture, autocast(self.model, self.settings.precision):
            each = self._losses(capture.part)(self.model, self._batch(batch))
            if each.requires_grad:
                each.sum().backward()
            return capture.pop()

    def _literal(self, capture: GradientCapture, chosen: list[int]) -> dict[int, Gradients]:
        """``autograd.grad`` of each row's loss alone, projected as the capture would."""
        modules, parameters = named_layers(self.model), other_parameters(self.model)
        matrices = ops.Matrices()
        out: dict[int, Gradients] = {row: {} for row in chosen}
        for part in _parts(capture, modules):
            weights = [owned_parameters(layer, modules, parameters) for layer in part]
            flat = [weight for group in weights for weight in group]
            flags = [weight.requires_grad for weight in flat]
            for weight in flat:
                weight.requires_grad_(True)
            try:
                for row in chosen:
                    with autocast(self.model, self.settings.precision):
                        loss = self._whole_losses()(self.model, self._batch([row])).sum()
                    found_grads = iter(torch.autograd.grad(loss, flat, allow_unused=True))
                    for layer, group in zip(part, weights, strict=True):
                        grads = [next(found_grads) for _ in group]
                        out[row][layer.name] = capture.as_kept(layer, group, grads, matrices)[0]
            finally:
                for weight, flag in zip(flat, flags, strict=True):
                    weight.requires_grad_(flag)
        return out

    def _batch(self, chosen: list[int]) -> dict[str, Tensor]:
        batch = self.rows.batch(chosen, self.model)
        return {name: tensor.to(device_of(self.model)) for name, tensor in batch.items()}

    def _losses(self, part: Callable[..., Any]) -> Loss:
        if callable(self.settings.loss):
            return self.settings.loss
        return losses.named(self.kind, part)

    def _whole_losses(self) -> Loss:
        if callable(self.settings.loss):
            return self.settings.loss
        return losses.named(self.kind, chunked=False)

    def _fine(self, errors: dict[str, float]) -> bool:
        return all(error <= self.tolerance for error in errors.values())

    def _sentence(self, errors: dict[str, float], where: str) -> str:
        wrong = {name: error for name, error in errors.items() if not error <= self.tolerance}
        name = max(wrong, key=lambda layer: wrong[layer])
        more = f" and {len(wrong) - 1} more layers" if len(wrong) > 1 else ""
        return f"{where}, the gradient of {name!r}{more} is off by {wrong[name]:.1e} of its length"


def can_be_verified(model: nn.Module) -> bool:
    """Whether this process holds whole weights: a model that FSDP sharded has no literal gradient here."""
    return not any(is_sharded(parameter) for parameter in model.parameters())


def say(report: CaptureReport, names: Sequence[str]) -> None:
    """Log the slower way once, with its reasons."""
    if report.one_row:
        ways = f", {len(report.exact)} of {len(names)} layers by autograd" if report.exact else ""
        _log.warning(
            "capturing one sample a batch%s: %s", ways, "; ".join(report.reasons) or "parameters beside layers"
        )


def _parts(capture: GradientCapture, modules: dict[str, nn.Module]) -> list[list[Any]]:
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
