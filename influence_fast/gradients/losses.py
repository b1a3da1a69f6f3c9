"""Per-sample losses, each a function ``(model, batch) -> (N,)``; their sum is what the backward starts from.

A causal language model's logits are the largest thing in its forward, so they never exist at once: hidden states of
the labelled positions alone go through the head, a chunk at a time, and each chunk's gradient is taken on the spot.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.data.batching import IGNORED, Loss
from influence_fast.gradients.layers import layer_shape
from influence_fast.gradients.model_state import is_sharded

_CHUNK_ENTRIES = 1 << 25


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy at each position in float32 or wider, 0 where the label is -100."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    flat = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return flat.view(labels.shape)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    return output if isinstance(output, Tensor) else output.logits


def classification(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of ``logits (N, classes)``."""
    answers = logits(model, batch)
    return cross_entropy(answers, batch["labels"].to(answers.device))


def of_kind(kind: str, part: Callable[[int, int, int], AbstractContextManager[Any]] | None) -> Loss:
    """The loss of a kind that is no callable of the user's; without ``part`` heads run whole, not in chunks."""
    if kind == "classification":
        return classification
    mean = kind == "causal-lm"
    return CausalLM(mean, chunked=False) if part is None else CausalLM(mean, part)


class CausalLM:
    """Cross entropy over each sample's target tokens: their mean, or their sum.

    Args:
        mean: divide by the number of targets.
        part: context of one chunk, told the samples ``[begin, end)`` and the batch size; a capture needs it to tell
            whose tokens the head sees.
        chunked: whether the head may run in chunks; False runs it once over the whole batch.
    """

    def __init__(
        self,
        mean: bool = True,
        part: Callable[[int, int, int], AbstractContextManager[Any]] = lambda begin, end, total: nullcontext(),
        chunked: bool = True,
    ) -> None:
        self.mean = mean
        self.part = part
        self._chunked: bool | None = None if chunked else False

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        head = _head(model)
        if self._chunked is None:
            self._chunked = head is not None and self._agree(model, head, batch)
        if head is None or not self._chunked:
            whole = logits(model, batch)
            return self._in_chunks(nn.Identity(), whole.shape[-1], whole, batch["labels"])
        return self._in_chunks(head, layer_shape(head)[0], _hidden(model, head, batch), batch["labels"])

    def _agree(self, model: nn.Module, head: nn.Module, batch: dict[str, Tensor]) -> bool:
        """Whether head and hidden states make the model's own logits: some models scale or cap them afterwards."""
        row = {name: tensor[:1] for name, tensor in batch.items()}
        with torch.no_grad():
            hidden = _hidden(model, head, row)
            return torch.allclose(head(hidden), logits(model, row), rtol=1e-3, atol=1e-3)

    def _in_chunks(self, head: nn.Module, vocabulary: int, hidden: Tensor, labels: Tensor) -> Tensor:
        """Losses of ``head(hidden)``, in float32 for a chunk at a time."""
        labels = labels.to(hidden.device)
        # Labelled positions move to the front of each row; position t predicts the token at t + 1.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
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


def _hidden(model: nn.Module, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the head would be given, without running it."""
    found: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Seen

    handle = head.register_forward_pre_hook(see)
    try:
        logits(model, batch)
    except _Seen:
        pass
    finally:
        handle.remove()
    return found[0]
