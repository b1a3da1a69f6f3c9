"""Per-sample losses, each a function ``(model, batch) -> (N,)``; their sum is what the backward starts from.

Each is the model's own loss of a batch of one row. A language model's logits are the largest thing in its forward, so they
never exist at once: hidden states of the labelled positions alone go through the head, a chunk at a time, and each
chunk's gradient is taken on the spot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.data.batching import Loss, extent, mask_of
from influence_fast.data.tasks import CLASS_LOSSES, IGNORED, SPAN, TARGETS, device_of, takes_mask
from influence_fast.errors import InputError
from influence_fast.gradients.layers import layer_shape
from influence_fast.gradients.model_state import before_fine_tuning, fingerprint, is_adapted, is_sharded

_CHUNK_ENTRIES = 1 << 25
# Context of one chunk, told the samples [begin, end) and the batch size.
Part = Callable[[int, int, int], AbstractContextManager[Any]]


def _no_part(begin: int, end: int, total: int) -> AbstractContextManager[Any]:
    return nullcontext()


def named(kind: str, part: Part = _no_part, chunked: bool = True) -> Loss:
    """The loss of one of ``LOSSES``; see :class:`TokenLoss` for the arguments."""
    if kind in CLASS_LOSSES:
        return classification
    others: dict[str, Loss] = {
        "question-answering": question_answering,
        "multi-label": multi_label,
        "regression": regression,
        "preference": PreferenceLoss(),
    }
    if kind in others:
        return others[kind]
    return TokenLoss(
        mean=kind != "causal-lm-sum",
        part=part,
        chunked=chunked,
        shifted=kind.startswith("causal-lm"),
        decoder=kind == "seq2seq",
    )


def one_per_sample(each: Tensor, count: int) -> Tensor:
    """The losses of a batch as they are; InputError unless there is one for each of ``count`` samples."""
    if each.shape != (count,):
        raise InputError(f"loss: expected one value per sample, shape ({count},), got {tuple(each.shape)}")
    return each


def widened(logits: Tensor) -> Tensor:
    """In float32 or wider."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy at each position in float32 or wider, 0 where the label is -100."""
    flat = widened(logits).flatten(0, -2)
    return nn.functional.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=IGNORED).view(
        labels.shape
    )


def outputs(model: nn.Module, batch: dict[str, Tensor], labels: bool = False, **options: Any) -> Any:
    """The model's output for the inputs of a batch; with ``labels`` it gets these too, to make decoder inputs of."""
    left_out = {*TARGETS} - ({"labels"} if labels else set())
    if not takes_mask(model):
        left_out.add("attention_mask")
    return model(**{name: tensor for name, tensor in batch.items() if name not in left_out}, **options)


def logits(model: nn.Module, batch: dict[str, Tensor], labels: bool = False) -> Tensor:
    """The logits among :func:`outputs`."""
    return logits_of(model, outputs(model, batch, labels), labels)


def logits_of(model: nn.Module, output: Any, labels: bool = False) -> Tensor:
    """The logits of an output, which ``labels`` in the call put behind the model's own loss where it is a tuple."""
    if isinstance(output, tuple):
        return output[1 if labels else 0]
    if isinstance(output, Tensor):
        return output
    if getattr(output, "logits", None) is None:
        raise InputError(f"loss: {type(model).__name__} returns no logits; give a callable loss(model, batch) -> (N,)")
    return output.logits


def classification(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of ``logits (N, classes)``, or ``(N, choices)``."""
    answers = logits(model, batch)
    return cross_entropy(answers, batch["labels"].to(answers.device))


def multi_label(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Binary cross entropy of ``logits (N, labels)``, the mean over a row's labels."""
    found, wanted = _beside(model, batch)
    return nn.functional.binary_cross_entropy_with_logits(found, wanted, reduction="none").mean(1)


def regression(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Squared error of ``logits (N, outputs)``, the mean over a row's outputs."""
    found, wanted = _beside(model, batch)
    return (found - wanted).square().mean(1)


def _beside(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    found = widened(logits(model, batch))
    wanted = batch["labels"].to(found)
    found, wanted = found.reshape(len(wanted), -1), wanted.reshape(len(wanted), -1)
    if found.shape != wanted.shape:
        raise InputError(f"loss: the model gives {found.shape[1]} numbers a row, its labels are {wanted.shape[1]}")
    return found, wanted


def question_answering(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of the start's and of the end's position among a row's tokens, the mean of both."""
    output = outputs(model, batch)
    pair = (
        output[:2]
        if isinstance(output, tuple)
        else [getattr(output, f"{end}_logits", None) for end in ("start", "end")]
    )
    if any(found is None for found in pair):
        raise InputError(f"loss: {type(model).__name__} returns no start_logits and end_logits for question-answering")
    inside = extent(mask_of(batch))
    first = inside.to(torch.uint8).argmax(1)
    each = []
    for found, name in zip(pair, SPAN, strict=True):
        # A row alone has no pads that could be the answer.
        found = widened(found).masked_fill(~inside.to(found.device), float("-inf"))
        each.append(cross_entropy(found, (batch[name] + first).to(found.device)))
    return (each[0] + each[1]) / 2


class PreferenceLoss:
    """DPO's loss of a pair of answers (Rafailov et al. 2023, eq. 7): one value, so one gradient, a pair.

    ``-log sigmoid(beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))))``, where ``p`` is the model,
    ``q`` the reference, and each is summed over an answer's target tokens.

    Args:
        beta: how much a difference to the reference counts.
        reference: the model before preference training; by default this one with its adapter switched off.

    Raises:
        InputError: a beta that is not positive; when called, a model without an adapter and no reference.
    """

    kind = "preference"

    def __init__(self, beta: float = 0.1, reference: nn.Module | None = None) -> None:
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 < beta < math.inf:
            raise InputError(f"beta: expected a positive number, got {beta!r}")
        self.beta, self.reference = float(beta), reference
        # What tells this loss from another in a store's manifest.
        self.__qualname__ = "preference" + ("" if beta == 0.1 else f" beta={beta:g}")
        if reference is not None:
            self.__qualname__ += f" reference={fingerprint(reference)[:16]}"

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        # First, because switching an adapter off and on touches flags that a graph depends on.
        expected = self._of_reference(model, batch)
        margin = self._margin(model, batch)
        return -nn.functional.logsigmoid(self.beta * (margin - expected.to(margin)))

    def _of_reference(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if self.reference is None and not is_adapted(model):
            raise InputError(
                f"loss: preferences compare with a reference, and {type(model).__name__} has no adapter to switch off; give "
                "the model before preference training (--reference DIR)"
            )
        with torch.no_grad():
            if self.reference is not None:
                return self._margin(self.reference.to(device_of(model)).eval(), batch)
            flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
            try:
                with before_fine_tuning(model):
                    return self._margin(model, batch)
            finally:
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    def _margin(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """``log p(chosen) - log p(rejected)``, a forward for each: a gradient's two uses of a weight add up by sample."""
        chosen, rejected = (self._log_probability(model, batch, which) for which in (0, 1))
        return chosen - rejected

    @staticmethod
    def _log_probability(model: nn.Module, batch: dict[str, Tensor], which: int) -> Tensor:
        answer = {name: tensor[:, which] for name, tensor in batch.items()}
        labels = answer["labels"]
        found = logits(model, answer)
        return -cross_entropy(found[:, :-1], labels[:, 1:].to(found.device)).sum(1)


class TokenLoss:
    """Cross entropy over each sample's target tokens: their mean, or their sum.

    Args:
        mean: divide by the number of targets.
        part: context of one chunk, told the samples ``[begin, end)`` and the batch size; a capture needs it to tell
            whose tokens the head sees.
        chunked: whether the head may run in chunks, each with its backward; False runs the model once over the whole
            batch, by operations that ``torch.func`` can follow.
        shifted: position t predicts the label at t + 1, as in a causal language model; False: that at t.
        decoder: labels are an encoder-decoder's, which makes its decoder's inputs of them.
    """

    def __init__(
        self,
        mean: bool = True,
        part: Part = _no_part,
        chunked: bool = True,
        shifted: bool = True,
        decoder: bool = False,
    ) -> None:
        self.mean, self.shifted, self.decoder = mean, shifted, decoder
        self.part, self._whole = part, not chunked
        self._chunked: bool | None = None

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if self._whole:
            whole = logits(model, batch, self.decoder)
            return self._at_once(whole, _beside_virtual(model, whole, batch["labels"]))
        head = _head(model)
        if self._chunked is None:
            self._chunked = head is not None and self._agree(model, head, batch)
        if head is None or not self._chunked:
            whole = logits(model, batch, self.decoder)
            return self._in_chunks(
                nn.Identity(), whole.shape[-1], whole, _beside_virtual(model, whole, batch["labels"])
            )
        hidden = _hidden(model, head, batch, self.decoder)
        if hidden is None:
            raise InputError(f"model: {type(model).__name__} calls its output layer for some batches only")
        labels = _beside_virtual(model, hidden, batch["labels"])
        return self._in_chunks(head, layer_shape(head)[0], hidden, labels)

    def _agree(self, model: nn.Module, head: nn.Module, batch: dict[str, Tensor]) -> bool:
        """Whether head and hidden states make the model's own logits: some models scale or cap them afterwards."""
        row = {name: tensor[:1] for name, tensor in batch.items()}
        with torch.no_grad():
            hidden = _hidden(model, head, row, self.decoder)
            whole = logits(model, row, self.decoder)
            if hidden is None or hidden.shape[:-1] != whole.shape[:-1]:
                return False
            # Of the same numbers, some models give the logits in a wider type.
            return torch.allclose(head(hidden).float(), whole.float(), rtol=1e-3, atol=1e-3)

    def _at_once(self, whole: Tensor, labels: Tensor) -> Tensor:
        labels = labels.to(whole.device)
        _check_positions(whole, labels)
        if self.shifted:
            whole, labels = whole[:, :-1], labels[:, 1:]
        summed = cross_entropy(whole, labels).sum(1)
        return summed / (labels != IGNORED).sum(1) if self.mean else summed

    def _in_chunks(self, head: nn.Module, vocabulary: int, hidden: Tensor, labels: Tensor) -> Tensor:
        """Losses of ``head(hidden)``, in float32 for a chunk at a time."""
        labels = labels.to(hidden.device)
        _check_positions(hidden, labels)
        # Labelled positions move to the front of each row.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.shifted else labels
        count = (targets != IGNORED).sum(1)
        width = max(1, int(count.max()))
        order = (targets == IGNORED).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        targets = targets.gather(1, order)
        kept = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))

        n = len(kept)
        tokens = max(1, _CHUNK_ENTRIES // vocabulary)
        rows, columns = max(1, tokens // width), min(tokens, width)
        losses = kept.new_zeros(n, dtype=torch.float64 if kept.dtype == torch.float64 else torch.float32)
        gradient = torch.zeros_like(kept) if kept.requires_grad else None
        for begin in range(0, n, rows):
            for first in range(0, width, columns):
                chunk = (slice(begin, begin + rows), slice(first, first + columns))
                states = kept[chunk].detach().requires_grad_(gradient is not None)
                with self.part(begin, min(begin + rows, n), n):
                    each = cross_entropy(head(states), targets[chunk]).sum(1)
                    if self.mean:
                        each = each / count[chunk[0]]
                    losses[chunk[0]] += each.detach()
                    if each.requires_grad:
                        each.sum().backward()
                if gradient is not None and states.grad is not None:
                    gradient[chunk] = states.grad
        return losses if gradient is None else _Chunked.apply(kept, losses, gradient)


def _beside_virtual(model: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Labels with no target at the tokens that a prompt adapter puts in front of a row."""
    extra = hidden.shape[1] - labels.shape[1]
    added = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None)
    return nn.functional.pad(labels, (extra, 0), value=IGNORED) if extra > 0 and extra == added else labels


def _check_positions(hidden: Tensor, labels: Tensor) -> None:
    if hidden.shape[:2] != labels.shape:
        raise InputError(f"loss: logits are for {tuple(hidden.shape[:2])} positions, labels for {tuple(labels.shape)}")


class _Chunked(torch.autograd.Function):
    """Losses whose gradient with respect to the hidden states is known already."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None, None].to(gradient.dtype), None, None


class _Seen(Exception):
    """Ends a forward at the head."""


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    # Sharded over processes (FSDP), its weight is whole within the model's forward alone.
    return head if isinstance(head, nn.Linear) and not is_sharded(head.weight) else None


def _hidden(model: nn.Module, head: nn.Module, batch: dict[str, Tensor], labels: bool) -> Tensor | None:
    """What the head would be given, without running it; None where the model does not call it."""
    found: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Seen

    handle = head.register_forward_pre_hook(see)
    try:
        outputs(model, batch, labels)
    except _Seen:
        pass
    finally:
        handle.remove()
    return found[0] if found else None
