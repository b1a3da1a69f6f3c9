"""Influence over unprojected gradients without forming them: inner products of their factors, through ops.

For a few training samples and queries of any model. No gradient of ``out * in`` numbers is stored, so it serves where whole
gradients would not fit: to look at some samples closely, and to tell how close projected scores come to exact ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from influence_fast import ops
from influence_fast.data.batching import Loss
from influence_fast.errors import InputError
from influence_fast.gradients.factor_capture import FactorCapture, factors_of
from influence_fast.gradients.layers import layer_shape, named_layers
from influence_fast.gradients.model_state import as_evaluated

METHODS = ("dot", "cosine")


def exact_influence(
    model: nn.Module,
    train: Sequence[Mapping[str, Any]],
    queries: Sequence[Mapping[str, Any]],
    layers: str | Iterable[str] = "all",
    methods: Iterable[str] = ("dot",),
    *,
    loss: str | Loss = "auto",
    batch_tokens: int | str = "auto",
    truncate: bool = False,
    progress: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """``{method: {layer: (queries, samples)}}`` float32, of whole gradients, for :func:`~influence_fast.aggregate`.

    Args:
        model: as of :func:`~influence_fast.build_store`.
        train, queries: rows, as of :func:`~influence_fast.build_store`. The inputs and output gradients of all queries are
            held, ``T (in + out)`` numbers a query and layer.
        layers: as of :func:`~influence_fast.select_layers`.
        methods: of ``dot`` and ``cosine``.
        loss: as of :func:`~influence_fast.build_store`.
        batch_tokens, truncate: as of :func:`~influence_fast.build_store`.

    Raises:
        InputError: unknown method or layers, bad rows, a weight that is an embedding and a linear layer at once.
    """
    wanted = list(dict.fromkeys(methods))
    unknown = [name for name in wanted if name not in METHODS]
    if unknown or not wanted:
        raise InputError(f"methods: expected some of {', '.join(METHODS)}, got {unknown or 'none'}")
    capture = FactorCapture(model, layers)
    shape = (len(queries), len(train))
    dots = {name: torch.zeros(shape) for name in capture.layers}
    norms = {name: (torch.zeros(shape[0]), torch.zeros(shape[1])) for name in capture.layers}
    total = shape[0] + shape[1]
    with (
        as_evaluated(model),
        capture,
        tqdm(total=total, desc="exact influence", unit="sample", delay=2, disable=None if progress else True) as bar,
    ):
        held = []
        for rows, factors, _ in factors_of(capture, queries, loss, batch_tokens, truncate):
            held.append((rows, factors))
            for name, (x, dy) in factors.items():
                norms[name][0][rows] = _norm(x, dy)
            bar.update(len(rows))
        for rows, factors, _ in factors_of(capture, train, loss, batch_tokens, truncate):
            for name, (x, dy) in factors.items():
                norms[name][1][rows] = _norm(x, dy)
                for theirs, others in held:
                    if name in others:
                        dots[name][theirs[:, None], rows] = _dot(x, dy, *others[name]).T.cpu()
            bar.update(len(rows))
    out = {"dot": dots}
    if "cosine" in wanted:
        out["cosine"] = {name: _divided(values, *norms[name]) for name, values in dots.items()}
    return {name: out[name] for name in wanted}


def factor_bytes(model: nn.Module, layers: Iterable[str], tokens: int) -> int:
    """Bytes that the factors of so many tokens take: inputs and output gradients, ids alone of embeddings."""
    modules = named_layers(model)
    width = 0
    for name in layers:
        out, in_ = layer_shape(modules[name])
        width += out + (2 if isinstance(modules[name], nn.Embedding) else in_)
    return 4 * tokens * width


def _dot(xa: Tensor, dya: Tensor, xb: Tensor, dyb: Tensor) -> Tensor:
    if not xa.is_floating_point():
        xa, xb = _one_hot(xa, xb, dya.dtype)
    return ops.dot_outer(xa, dya, xb, dyb)


def _norm(x: Tensor, dy: Tensor) -> Tensor:
    if not x.is_floating_point():
        x, _ = _one_hot(x, x, dy.dtype)
    return ops.ghost_norm(x, dy).float().cpu()


def _one_hot(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ids as one-hot rows over the ids that occur: equal ids have product 1, others 0."""
    _, places = torch.cat([a.flatten(), b.flatten()]).unique(return_inverse=True)
    hot = nn.functional.one_hot(places).to(dtype)
    return hot[: a.numel()].unflatten(0, a.shape), hot[a.numel() :].unflatten(0, b.shape)


def _divided(values: Tensor, queries: Tensor, train: Tensor) -> Tensor:
    """Inner products by both lengths; 0 where one is 0."""
    length = queries[:, None] * train
    return torch.where(length > 0, values / length, 0)
