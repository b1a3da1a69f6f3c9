"""What some methods need beside gradients, each in one pass over a data set: hidden states, the gradients of words,
Kronecker factors of the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from influence_fast.data.batching import IGNORED, batches, checked_rows, collate, device_of, token_budget
from influence_fast.errors import InputError
from influence_fast.gradients import losses
from influence_fast.gradients.layers import layer_shape, named_layers, select_layers
from influence_fast.gradients.model_state import as_evaluated

POOLING = ("last", "mean", "first")
_LARGEST_FACTOR = 8192
Rows = Sequence[Mapping[str, Any]]


def hidden_states(
    model: nn.Module,
    dataset: Rows,
    pooling: str = "mean",
    *,
    batch_tokens: int | str = "auto",
    progress: bool = True,
) -> dict[str, Tensor]:
    """A vector of each sample behind the embedding and behind every block: float32 ``(n, width)`` by name.

    Names are ``embedding``, ``block 0``, ``block 1``, ...; ``pooling`` takes the last real token, the first, or the mean
    over all. The cosine of two samples' vectors is representation similarity (``repsim``)::

        inf.influence(inf.hidden_states(model, train), inf.hidden_states(model, queries), "cosine")

    Raises:
        InputError: unknown pooling, bad rows, a model that returns no hidden states.
    """
    if pooling not in POOLING:
        raise InputError(f"pooling: expected one of {', '.join(POOLING)}, got {pooling!r}")
    found: list[tuple[list[int], list[Tensor]]] = []
    for chosen, batch in _batches(model, dataset, batch_tokens, progress, "hidden states"):
        with torch.no_grad():
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
        if states is None:
            raise InputError(f"model: {type(model).__name__} returns no hidden states")
        found.append((chosen, [_pooled(state, batch["attention_mask"], pooling).float().cpu() for state in states]))
    order = torch.tensor([row for chosen, _ in found for row in chosen])
    out = {}
    for place, parts in enumerate(zip(*(states for _, states in found), strict=True)):
        out["embedding" if place == 0 else f"block {place - 1}"] = torch.empty_like(torch.cat(parts))
        out[next(reversed(out))][order] = torch.cat(parts)
    return out


def class_opinion(
    model: nn.Module, dataset: Rows, *, batch_tokens: int | str = "auto", progress: bool = True
) -> Tensor:
    """Log-probabilities of the classes by a classifier: float32 ``(n, classes)``."""
    found: list[Tensor] = []
    order: list[int] = []
    for chosen, batch in _batches(model, dataset, batch_tokens, progress, "predictions"):
        with torch.no_grad():
            found.append(losses.logits(model, batch).float().log_softmax(1).cpu())
        order += chosen
    return torch.cat(found)[torch.tensor(order).argsort()]


@dataclass(frozen=True)
class WordGradients:
    """Gradients of the word embedding's rows, kept for the tokens that occur.

    Entry e is the gradient ``values[e] (width,)`` of sample ``rows[e]`` with respect to the embedding of ``tokens[e]``,
    summed over the token's places; every (row, token) occurs once. ``count`` samples in all.
    """

    count: int
    rows: Tensor
    tokens: Tensor
    values: Tensor

    def top(self, k: int) -> WordGradients:
        """Only the ``k`` tokens of each sample whose gradient is longest."""
        order = self.values.double().norm(dim=1).argsort(descending=True, stable=True)
        order = order[self.rows[order].argsort(stable=True)]
        rows = self.rows[order]
        first = torch.searchsorted(rows, rows)
        kept = order[torch.arange(len(rows)) - first < k]
        return WordGradients(self.count, self.rows[kept], self.tokens[kept], self.values[kept])


def word_gradients(
    model: nn.Module, dataset: Rows, *, batch_tokens: int | str = "auto", progress: bool = True
) -> WordGradients:
    """Gradients of the word embedding for :func:`~influence_fast.word_influence`.

    A fine-tuning that left the embedding frozen did not follow these gradients: the scores then tell of shared words only.

    Raises:
        InputError: bad rows; a model without an input embedding.
    """
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    if not isinstance(embedding, nn.Embedding):
        raise InputError(f"model: {type(model).__name__} has no input embedding")
    rows: list[Tensor] = []
    tokens: list[Tensor] = []
    values: list[Tensor] = []
    with _watched({"embedding": embedding}) as seen:
        for chosen, batch in _batches(model, dataset, batch_tokens, progress, "word gradients"):
            _backward(model, batch, seen, chunked=True)
            (_, dy), ids = seen.pop("embedding"), batch["input_ids"]
            real = batch["attention_mask"].bool()
            if embedding.padding_idx is not None:
                real &= ids != embedding.padding_idx
            sample = torch.tensor(chosen, device=ids.device)[:, None].expand_as(ids)[real]
            pairs, place = torch.stack([sample, ids[real]]).unique(dim=1, return_inverse=True)
            summed = dy.new_zeros(pairs.shape[1], dy.shape[-1]).index_add_(0, place, dy[real])
            rows.append(pairs[0].cpu())
            tokens.append(pairs[1].cpu())
            values.append(summed.cpu())
    return WordGradients(len(dataset), torch.cat(rows), torch.cat(tokens), torch.cat(values))


def kronecker_factors(
    model: nn.Module,
    dataset: Rows,
    layers: str | Iterable[str] = "all",
    *,
    batch_tokens: int | str = "auto",
    progress: bool = True,
) -> dict[str, tuple[Tensor, Tensor]]:
    """``{layer: (A, S)}``: ``A = E[x x^T] (in, in)`` and ``S = E[dy dy^T] (out, out)`` over all real tokens, float64.

    ``x`` are a layer's inputs and ``dy`` the gradients of each sample's loss with the given label (the empirical Fisher)
    with respect to its outputs (Martens & Grosse 2015). For ``influence(..., method="ekfac", factors=...)``.

    Raises:
        InputError: unknown layers, embeddings, layers wider than 8192, bad rows.
    """
    names = select_layers(model, layers)
    modules = {name: module for name, module in named_layers(model).items() if name in set(names)}
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) or max(layer_shape(module)) > _LARGEST_FACTOR:
            raise InputError(
                f"layers: {name!r} {layer_shape(module)} is an embedding or wider than {_LARGEST_FACTOR}; "
                "leave it out for ekfac"
            )
    shapes = {name: layer_shape(module) for name, module in modules.items()}
    factors = {
        name: (torch.zeros(in_, in_, dtype=torch.float64), torch.zeros(out, out, dtype=torch.float64))
        for name, (out, in_) in shapes.items()
    }
    counts = dict.fromkeys(names, 0)
    with _watched(modules) as seen:
        for _, batch in _batches(model, dataset, batch_tokens, progress, "Kronecker factors"):
            mask = batch["attention_mask"].bool().flatten()
            _backward(model, batch, seen, chunked=False)
            for name, operands in seen.items():
                flat = [operand.flatten(0, -2) for operand in operands]
                if len(flat[0]) == len(mask):
                    flat = [operand[mask] for operand in flat]
                for total, operand in zip(factors[name], flat, strict=True):
                    total += (operand.T @ operand).cpu()
                counts[name] += len(flat[0])
            seen.clear()
    return {name: (a / max(counts[name], 1), s / max(counts[name], 1)) for name, (a, s) in factors.items()}


def _batches(
    model: nn.Module, dataset: Rows, batch_tokens: int | str, progress: bool, what: str
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    rows, _ = checked_rows(model, dataset)
    tokens = token_budget(batch_tokens, model)
    with (
        as_evaluated(model),
        tqdm(total=len(rows), desc=what, unit="sample", delay=2, disable=None if progress else True) as bar,
    ):
        for chosen in batches(rows, range(len(rows)), tokens):
            batch = collate([rows[index] for index in chosen], model)
            yield chosen, {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
            bar.update(len(chosen))


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within, a backward leaves ``{name: (input, output gradient)}`` of each module that it reaches."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            # Weights need no gradient here, so the sum with an anchor is what joins the output to the graph.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            x = args[0].detach()
            output.register_hook(lambda dy: seen.__setitem__(name, (x, dy.detach())))
            return output

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _backward(model: nn.Module, batch: dict[str, Tensor], seen: dict[str, Any], chunked: bool) -> None:
    """Backward of the sum of per-sample losses; in chunks of the vocabulary's logits where no layer is watched there."""
    seen.clear()
    if batch["labels"].dim() == 1:
        each = losses.classification(model, batch)
    elif chunked:
        each = losses.CausalLM()(model, batch)
    else:
        targets = batch["labels"][:, 1:]
        each = losses.cross_entropy(losses.logits(model, batch)[:, :-1], targets).sum(1)
        each = each / (targets != IGNORED).sum(1)
    each.sum().backward()


def _pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """``(N, T, width) -> (N, width)`` over real tokens, which lie on the left."""
    if pooling == "first":
        return states[:, 0]
    count = mask.sum(1)
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), count - 1]
    return (states * mask[..., None]).sum(1) / count[:, None]
