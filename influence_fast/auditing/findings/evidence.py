"""Evidence on the most suspicious rows: rows that contradict them, queries they hurt and help, tokens that carry it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.attribution.method_inputs import VOTES, MethodInputs
from influence_fast.attribution.token_influence import token_influence, token_layer
from influence_fast.auditing.findings.finding import Evidence
from influence_fast.auditing.findings.kinds import hurt_groups
from influence_fast.auditing.findings.words import flat_ids, word_features
from influence_fast.errors import InputError

#: Neighbours, and queries hurt and helped, of each row.
SHOWN = 5
_BLOCK, _READ_BYTES = 256, 256 << 20
# One text a row whose tokens the model sees in its order.
_ONE_TEXT = ("classification", "causal-lm", "regression", "multi-label", "token-classification")


def gather(inputs: MethodInputs, rows: Tensor, groups: Sequence[str] | None, tokenizer: Any) -> Evidence:
    """Evidence on these rows: neighbours of classifiers, by hidden states where a pool has them, else by words."""
    count = len(rows)
    if not count:
        return Evidence([], [], [], [], [], [], {"evidence": 0})
    influence = influence_on_queries(inputs, rows)
    neighbours: list[list[tuple[int, float]]] = [[]] * count
    if inputs.task == "classification":
        states: Any
        if inputs.kept(VOTES) is not None:
            states = inputs.passes.last_states(inputs.samples, base=True)
        else:
            words = word_features(inputs.samples.rows)
            states = None if words is None else words[0]
        if states is not None:
            neighbours = contradicting(states, torch.tensor(inputs.labels()[0]), rows)
    tokens, layer = token_evidence(inputs, rows, tokenizer)
    return Evidence(
        rows.tolist(),
        neighbours,
        [most(row, -1) for row in influence],
        [most(row, 1) for row in influence],
        [None] * count if groups is None else hurt_groups(influence, list(groups)),
        tokens or [[]] * count,
        {"evidence": count, "tokens" if tokens else "no_tokens": layer},
    )


def contradicting(states: Any, labels: Tensor, rows: Tensor) -> list[list[tuple[int, float]]]:
    """Of each of these rows the nearest training rows with another label, as ``(row, cosine)``, nearest first.

    Args:
        states: of all training rows, a tensor ``(n, width)``, centred here, or a sparse matrix of rows of unit length.
        labels: int ``(n,)``.
        rows: numbers of rows, int64.
    """
    dense = isinstance(states, Tensor)
    unit = nn.functional.normalize(states.float() - states.float().mean(0), dim=1) if dense else states
    found = []
    for part in rows.split(_BLOCK):
        chosen: Any = unit[part if dense else part.numpy()]
        product = chosen @ unit.T
        alike: Tensor = product if dense else torch.from_numpy(product.toarray()).float()
        alike[labels[part][:, None] == labels] = -torch.inf
        near = alike.topk(min(SHOWN, alike.shape[1]), dim=1)
        for values, numbers in zip(near.values.tolist(), near.indices.tolist(), strict=True):
            found.append([(i, value) for i, value in zip(numbers, values, strict=True) if value > 0])
    return found


def influence_on_queries(inputs: MethodInputs, rows: Tensor) -> Tensor:
    """Mean over the layers of the cosine of gradients: float32 ``(rows, queries)``; only these rows are read."""
    train, queries = inputs.train, inputs.queries
    total: Tensor | None = None
    for name in train.layers:  # type: ignore[union-attr]
        asked = nn.functional.normalize(queries.read(name).float(), dim=1)  # type: ignore[union-attr]
        step = max(1, _READ_BYTES // (4 * asked.shape[1]))
        parts = [nn.functional.normalize(train.read(name, part).float(), dim=1) @ asked.T for part in rows.split(step)]  # type: ignore[union-attr]
        found = torch.cat(parts)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total / len(train.layers)  # type: ignore[union-attr]


def most(influence: Tensor, sign: int) -> list[tuple[int, float]]:
    """Queries that a row hurts (-1) or helps (1) most, as ``(query, influence)``."""
    top = (sign * influence).topk(min(SHOWN, len(influence)))
    found = zip(top.indices.tolist(), (sign * top.values).tolist(), strict=True)
    return [(query, value) for query, value in found if sign * value > 0]


def token_evidence(inputs: MethodInputs, rows: Tensor, tokenizer: Any) -> tuple[list[list[dict[str, Any]]], str]:
    """Tokens of each row with their influence on the queries, and the layer, or why there are none."""
    given, settings = inputs.given, inputs.given.settings
    if inputs.task not in _ONE_TEXT:
        return [], f"rows of {inputs.task} are no single text"
    chosen = [given.samples.rows[i] for i in rows.tolist()]
    how: dict[str, Any] = {"loss": settings.loss, "batch_tokens": settings.batch_tokens, "truncate": settings.truncate}
    try:
        layer = token_layer(given.model, chosen, settings.layers, **how)
        if layer is None:
            return [], "no chosen layer sees the tokens one by one"
        found = token_influence(given.model, chosen, given.trusted.rows, layer, **how)
    except InputError as error:
        return [], str(error)
    out = []
    for row, values in zip(chosen, found, strict=True):
        texts = _texts(flat_ids(row)[: len(values)], tokenizer)
        out.append([{"text": t, "influence": float(v)} for t, v in zip(texts, values.tolist(), strict=False)])
    return out, layer


def _texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    if not hasattr(tokenizer, "decode"):
        return [str(token) for token in ids]
    return [tokenizer.decode([token]) for token in ids]
