"""A few tiny forwards before the first batch: whether rows may be padded or share a batch, and whose loss is taken."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.data.batching import EQUAL_LENGTHS, ONE_ROW, Loss, Rows, collate
from influence_fast.data.tasks import LOSSES, TARGETS, TOKEN_LOSSES, device_of, takes_mask, unwrapped
from influence_fast.errors import InfluenceError, InputError
from influence_fast.gradients import losses
from influence_fast.gradients.model_state import as_evaluated, autocast, is_out_of_memory

_log = logging.getLogger("influence_fast")
# How far apart two computations of one loss may be, relative to it plus 1, by the narrowest type of its arithmetic.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_TF32_TOLERANCE = 2e-3
# Enough for a convolution or a pooling of positions to reach from them into the row, and few to compute.
_PADS = 16
# Models that cut a row into pieces depend on pads where its length is no multiple of theirs.
_PIECES = 8
# Tokens of one forward, pads counted, that no model is short of memory for.
_AT_ONCE = 512


def settle_batches(model: nn.Module, rows: Rows, loss: Loss, tokens: int, precision: str | None = None) -> None:
    """Set ``rows.side`` and ``rows.together`` so that no row's loss depends on its batch.

    The loss of the shortest row is taken alone, beside another of its length, and padded beside a longer one, if a batch
    of ``tokens`` has place for it; and so are rows whose lengths leave other remainders.

    Raises:
        InputError: a loss that differs from one forward to the next.
    """
    probe = _Probe(model, rows, loss, precision)
    if rows.fill is None and rows.kind not in TOKEN_LOSSES:
        rows.together = ONE_ROW
        _log.warning("every token id is in use, so none can mark pads: %s takes one row a batch", probe.name)
    if rows.together == ONE_ROW or len(rows) == 1 or tokens < 2 * rows.lengths[probe.shortest]:
        return
    with as_evaluated(model):
        alone = probe.loss()
        if not alone.isfinite():
            return
        if not probe.equal(probe.loss(probe.mate()), alone):
            if not probe.equal(probe.loss(), alone):
                raise InputError(
                    f"loss: that of row {rows.ids[probe.shortest]!r} differs from one forward of {probe.name} to the "
                    "next; a random part must be off in eval mode"
                )
            if rows.kind == "custom" and probe.model_is_separate():
                raise InputError(
                    f"loss: that of row {rows.ids[probe.shortest]!r} changes with the other rows of its batch, though what "
                    f"{probe.name} gives for it does not; a loss (model, batch) -> (N,) should make its value i of row i "
                    "alone (no mean over the batch, no division by its size, no comparison of rows)"
                )
            rows.together = ONE_ROW
            _log.warning("the loss of a row of %s depends on the other rows: one row a batch", probe.name)
            return
        longer = probe.longer(tokens)
        if longer is None:
            return
        if probe.padding_tells_nothing(longer, "right", tokens):
            return
        if rows.kind != "seq2seq" and probe.padding_tells_nothing(longer, "left", tokens):
            rows.side = "left"
            return
        rows.together = EQUAL_LENGTHS
        _log.warning("the loss of a row of %s depends on the padding beside it: batches of equal lengths", probe.name)


def check_own_loss(model: nn.Module, rows: Rows, loss: Loss, precision: str | None = None) -> None:
    """InputError where the loss that was chosen is not the model's own, for a model that computes one."""
    probe = _Probe(model, rows, loss, precision)
    # Of float64 logits, many models take the loss in float32.
    with as_evaluated(model):
        chosen, own = probe.loss(), probe.own_loss()
    if (
        own is not None
        and chosen.isfinite()
        and own.isfinite()
        and not probe.equal(own, chosen, _TOLERANCE[torch.float32])
    ):
        raise InputError(
            f"loss: 'auto' takes {rows.kind} for a {probe.name}, whose own loss of row {rows.ids[probe.shortest]!r} is "
            f"{float(own):.6g}, not {float(chosen):.6g}; name one of {', '.join(LOSSES[1:])}, or give a callable"
        )


class _Probe:
    """The shortest row, and its loss in one batch or another."""

    def __init__(self, model: nn.Module, rows: Rows, loss: Loss, precision: str | None) -> None:
        self.model, self.rows, self._loss, self._precision = model, rows, loss, precision
        self.name = type(unwrapped(model)).__name__
        self.shortest = min(range(len(rows)), key=rows.lengths.__getitem__)
        self.row = rows[self.shortest]
        narrow = torch.float32 if precision is None else getattr(torch, precision)
        device = device_of(model)
        tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        kinds = {p.dtype for p in model.parameters() if p.dtype in _TOLERANCE} or {narrow}
        kinds |= {narrow} if precision else set()
        self._tolerance = max(_TOLERANCE[kind] for kind in kinds)
        if tf32:
            self._tolerance = max(self._tolerance, _TF32_TOLERANCE)

    def equal(self, found: Tensor, wanted: Tensor, least: float = 0.0) -> bool:
        return bool((found - wanted).abs() <= max(self._tolerance, least) * (1 + wanted.abs()))

    def padding_tells_nothing(self, longer: int, side: str, tokens: int) -> bool:
        """Whether the losses of rows padded at ``side``, beside row ``longer``, are those of each alone."""
        lengths = self.rows.lengths
        shortest: dict[int, int] = {}
        for row, length in enumerate(lengths):
            known = shortest.get(length % _PIECES)
            if length < lengths[longer] and (known is None or length < lengths[known]):
                shortest[length % _PIECES] = row
        # The shortest first, where pads are most.
        chosen = sorted(shortest.values(), key=lengths.__getitem__)
        # Nobody knows yet how many fit in memory: few, and far fewer than a batch will have.
        at_once = max(1, min(tokens // 8, _AT_ONCE) // lengths[longer] - 1)
        for begin in range(0, len(chosen), at_once):
            samples = [self.rows[row] for row in chosen[begin : begin + at_once]]
            padded = self.losses([*samples, self.rows[longer]], side)
            if not all(
                self.equal(found, self.losses([sample])[0]) for found, sample in zip(padded, samples, strict=False)
            ):
                return False
        return True

    def loss(self, mate: dict[str, Any] | None = None) -> Tensor:
        """The shortest row's loss, alone or beside another row."""
        return self.losses([self.row] if mate is None else [self.row, mate])[0]

    def losses(self, samples: list[dict[str, Any]], side: str = "right") -> Tensor:
        """Losses of some rows in one batch; float64 on the host."""
        batch = self._batch(samples, side)
        try:
            # A callable's own use of autograd is its own affair.
            with self._eagerly(), autocast(self.model, self._precision), self._without_gradients():
                each = losses.one_per_sample(self._loss(self.model, batch), len(samples))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InfluenceError(
                f"row {self.rows.ids[self.shortest]!r} ({self.rows.lengths[self.shortest]} tokens) does not fit in "
                f"memory {'alone' if len(samples) == 1 else 'beside others'}"
            ) from error
        return each.detach().double().cpu()

    def model_is_separate(self) -> bool:
        """Whether the model's output for the row is the same beside another row."""
        found = []
        for samples in ([self.row], [self.row, self.mate()]):
            with self._eagerly(), autocast(self.model, self._precision), torch.no_grad():
                output = losses.outputs(self.model, self._batch(samples, "right"))
            first = next(iter(output.values())) if isinstance(output, Mapping) else output
            first = first[0] if isinstance(first, tuple) else first
            found.append(first[:1].double().cpu() if isinstance(first, Tensor) else None)
        alone, beside = found
        if alone is None or beside is None or alone.shape != beside.shape:
            return False
        return bool(((alone - beside).abs() <= self._tolerance * (1 + alone.abs().max())).all())

    def own_loss(self) -> Tensor | None:
        """What the model itself returns as its loss of the row alone, if it returns any."""
        inner = unwrapped(self.model)
        batch = self._batch([self.row], "right")
        parameters = inspect.signature(inner.forward).parameters
        if inner is not self.model and any(name not in parameters for name in {*batch} - {"attention_mask"}):
            # A column that what is around the model takes, such as an adapter's task.
            inner, parameters = self.model, inspect.signature(self.model.forward).parameters
        if not all(name in parameters for name in TARGETS if name in batch) or not hasattr(inner, "config"):
            return None
        if not takes_mask(inner):
            batch.pop("attention_mask", None)
        config: Any = inner.config
        problem = getattr(config, "problem_type", None)
        try:
            with self._eagerly(), autocast(self.model, self._precision), torch.no_grad():
                output = inner(**batch)
        finally:
            if hasattr(config, "problem_type"):
                config.problem_type = problem
        found = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        return found.double().cpu() if isinstance(found, Tensor) and found.dim() == 0 else None

    def mate(self) -> dict[str, Any]:
        """Another row of the same lengths, or this one in reverse with tokens of another."""
        shapes = self.rows.shapes
        for other in range(len(self.rows)):
            if other != self.shortest and shapes[other] == shapes[self.shortest]:
                return self.rows[other]
        other = max(range(len(self.rows)), key=lambda row: (row != self.shortest, self.rows.lengths[row]))
        theirs = [part["input_ids"] for part in self.rows[other].get("choices", [self.rows[other]])]
        tokens = [token for ids in theirs for token in ids]
        if "choices" in self.row:
            return {**self.row, "choices": [_changed(choice, tokens) for choice in self.row["choices"]]}
        return _changed(self.row, tokens)

    def longer(self, tokens: int) -> int | None:
        """A row that this one is padded beside, much longer if there is one, in a batch of ``tokens``."""
        lengths = self.rows.lengths
        least = lengths[self.shortest]
        fitting = [row for row in range(len(self.rows)) if least < lengths[row] <= tokens // 2]
        return min(fitting, key=lambda row: abs(lengths[row] - least - _PADS)) if fitting else None

    def _batch(self, samples: list[dict[str, Any]], side: str) -> dict[str, Tensor]:
        batch = collate(samples, self.model, self.rows.fill, side)
        return {name: tensor.to(device_of(self.model)) for name, tensor in batch.items()}

    def _eagerly(self) -> Any:
        """These few shapes are not worth a compilation."""
        compiled = any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in self.model.modules())
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    def _without_gradients(self) -> Any:
        return nullcontext() if self.rows.kind == "custom" else torch.no_grad()


def _changed(row: dict[str, Any], theirs: list[int]) -> dict[str, Any]:
    """The row in reverse, with tokens of another in place of those that the other lacks: of a mean over the batch, the same
    tokens would tell nothing. What both have stays, as separators and the like do."""
    own = row["input_ids"]
    others = iter([token for token in theirs if token not in own])
    return {**row, "input_ids": [token if token in theirs else next(others, token) for token in own[::-1]]}
