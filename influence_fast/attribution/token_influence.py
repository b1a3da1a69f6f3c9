"""Influence of each token of a row: a weight matrix's gradient is a sum over tokens, and so is an inner product with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.data.batching import Loss, extent, mask_of
from influence_fast.errors import InputError
from influence_fast.gradients.factor_capture import FactorCapture, factors_of
from influence_fast.gradients.layers import layer_shape, named_layers
from influence_fast.gradients.model_state import as_evaluated

Rows = Sequence[Mapping[str, Any]]
# Rows that a layer is chosen by; weights of the largest layer whose gradient is held as a whole.
_CHOSEN_BY, _MOST_WEIGHTS = 8, 1 << 28


def token_influence(
    model: nn.Module,
    rows: Rows,
    queries: Rows,
    layer: str,
    *,
    loss: str | Loss = "auto",
    batch_tokens: int | str = "auto",
    truncate: bool = False,
) -> list[Tensor]:
    """Of each row float64 ``(tokens,)``: ``<dy_t x_t^T, V>``, ``V`` the queries' mean gradient of a layer's weight.

    They sum to the row's ``dot`` influence on the queries by this layer, averaged over them; positive = helpful.

    Raises:
        InputError: a layer that is no weight matrix, or that does not see the row's tokens one by one; bad rows.
    """
    capture = FactorCapture(model, [layer])
    out: list[Tensor] = [torch.empty(0, dtype=torch.float64)] * len(rows)
    embedding = isinstance(named_layers(model)[layer], nn.Embedding)
    dtype = next(model.parameters()).dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean = torch.zeros(layer_shape(named_layers(model)[layer]), dtype=wide)
    with as_evaluated(model), capture:
        for _, factors, _ in factors_of(capture, queries, loss, batch_tokens, truncate):
            if layer in factors:
                x, dy = (part.cpu() for part in factors[layer])
                dy = dy.to(wide)
                if embedding:
                    mean.T.index_add_(0, x.flatten(), dy.flatten(0, 1))
                else:
                    mean += dy.flatten(0, 1).T @ x.flatten(0, 1).to(wide)
        mean /= len(queries)
        for numbers, factors, batch in factors_of(capture, rows, loss, batch_tokens, truncate):
            ids, kept = batch["input_ids"], extent(mask_of(batch)).cpu()
            if layer not in factors:
                found = torch.zeros(ids.shape, dtype=wide)
            else:
                x, dy = (part.cpu() for part in factors[layer])
                if dy.shape[:2] != ids.shape:
                    raise InputError(f"layer: {layer!r} does not see the tokens of a row one by one")
                against = mean.T[x] if embedding else x.to(wide) @ mean.T
                found = (against * dy.to(wide)).sum(-1)
            for place, number in enumerate(numbers.tolist()):
                out[number] = found[place][kept[place]].double()
    return out


def token_layer(
    model: nn.Module,
    rows: Rows,
    layers: Iterable[str],
    *,
    loss: str | Loss = "auto",
    batch_tokens: int | str = "auto",
    truncate: bool = False,
) -> str | None:
    """The layer whose gradient is longest, token by token, of those that most tokens of some rows reach; None without one.

    A head that sees one position is none of them. An embedding is one only where nothing else is: a token matters to it
    only where a query has the same.
    """
    modules = named_layers(model)
    names = [n for n in layers if n in modules and torch.Size(layer_shape(modules[n])).numel() <= _MOST_WEIGHTS]
    able = names if _has_factors(model, names) else [name for name in names if _has_factors(model, [name])]
    if not able:
        return None
    some, size = list(rows[:_CHOSEN_BY]), dict.fromkeys(able, 0.0)
    refused: set[str] = set()
    capture = FactorCapture(model, able)
    with as_evaluated(model), capture:
        for _, factors, batch in factors_of(capture, some, loss, batch_tokens, truncate):
            kept = extent(mask_of(batch)).to(next(iter(factors.values()))[1].device)
            for name in able:
                if name not in factors or factors[name][1].shape[:2] != kept.shape:
                    refused.add(name)
                    continue
                x, dy = factors[name]
                length = dy.float().norm(dim=-1) * (x.float().norm(dim=-1) if x.is_floating_point() else 1)
                if int((length[kept] > 0).sum()) < int(kept.sum()) / 2:
                    refused.add(name)
                size[name] += float(length.sum())
    left = [name for name in able if name not in refused and size[name] > 0]
    inner = [name for name in left if not isinstance(modules[name], nn.Embedding)]
    return max(inner or left, key=lambda name: size[name], default=None)


def _has_factors(model: nn.Module, names: list[str]) -> bool:
    try:
        FactorCapture(model, names)
    except InputError:
        return False
    return True
