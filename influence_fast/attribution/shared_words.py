"""TracIn restricted to the words that query and sample share."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.attribution.influence_matrix import InMemory
from influence_fast.attribution.method_inputs import MethodInputs
from influence_fast.attribution.model_passes import WordGradients
from influence_fast.errors import InputError


def make_words(inputs: MethodInputs, top: int | None = None) -> InMemory:
    """``we`` over all shared words, ``we_topk`` over those with the longest gradients."""
    train, queries = (inputs.passes.word_gradients(part) for part in (inputs.samples, inputs.trusted))
    return InMemory(word_influence(train, queries, top), inputs.correct)


def word_influence(train: WordGradients, queries: WordGradients, top: int | None = None) -> dict[str, Tensor]:
    """TracIn on the word embedding over shared tokens (TracIn-WE, Yeh et al. 2022, eq. 8): ``{"embedding": (m, n)}``.

    ``sum_w <v_w, g_w>`` over the tokens w that query and sample share, each with its own row. With ``top`` only the ``top``
    tokens of each whose gradient is longest count (``we_topk``).

    Raises:
        InputError: ``top`` below 1.
    """
    if top is not None:
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            raise InputError(f"top: expected a positive int, got {top!r}")
        train, queries = train.top(top), queries.top(top)
    out = torch.zeros(queries.count, train.count)
    train_entries = _by_token(train)
    for token, of_queries in _by_token(queries).items():
        if (of_train := train_entries.get(token)) is not None:
            product = queries.values[of_queries].float() @ train.values[of_train].float().T
            out[queries.rows[of_queries][:, None], train.rows[of_train][None]] += product
    return {"embedding": out}


def _by_token(words: WordGradients) -> dict[int, Tensor]:
    order = words.tokens.argsort(stable=True)
    tokens, counts = words.tokens[order].unique_consecutive(return_counts=True)
    return dict(zip(tokens.tolist(), order.split(counts.tolist()), strict=True))
