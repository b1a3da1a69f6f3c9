"""Hidden states: representation similarity, and whether a sample's nearest neighbours share its label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from influence_fast.attribution.gradient_source import chosen_layers
from influence_fast.attribution.influence_matrix import InfluenceMatrix, InMemory, inner_products
from influence_fast.attribution.method_inputs import MethodInputs, of_no_query
from influence_fast.errors import InputError

_ROWS = 1024
_NEIGHBOURS = 50
# Votes of all samples would take time with the square of their number.
_VOTERS = 100_000


def make_similarity(inputs: MethodInputs) -> InfluenceMatrix:
    """``repsim``: cosine of mean states of a classifier, of the last token's states of a causal model."""
    pooling = "mean" if inputs.task == "classification" else "last"
    train, queries = (inputs.passes.hidden_states(part, pooling) for part in (inputs.samples, inputs.trusted))
    matrix = inner_products(train, queries, "cosine")
    matrix.query_correct = inputs.correct
    return matrix


def make_neighbours(inputs: MethodInputs) -> InMemory:
    """``neighbours``, by states of the model before fine-tuning."""
    labels, _ = inputs.labels()
    states = inputs.passes.hidden_states(inputs.samples, "mean", base=True)
    return of_no_query(neighbours(states, labels, neighbour_count(len(labels))))


def neighbour_count(samples: int) -> int:
    """How many neighbours count: 50, or a quarter of few samples."""
    return min(_NEIGHBOURS, max(1, samples // 4))


def neighbours(
    states: Mapping[str, Tensor], labels: Sequence[int] | Tensor, k: int = 50, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Whether a sample's nearest training samples share its label: ``{layer: (1, n)}``, from 1 (all do) to -1 (none does).

    Cosine similarities of centred states, negative ones counting as 0, of the ``k`` nearest others: those with the same
    label minus those with another, over all. It needs no queries and, with states of the model before fine-tuning
    (:func:`~influence_fast.hidden_states`, for PEFT models within ``model.disable_adapter()``), nothing that was learned
    from the labels, so that it errs elsewhere than the loss does.

    Raises:
        InputError: unknown layer, labels of another length, k out of range.
    """
    given = torch.as_tensor(labels)
    out = {}
    for name in chosen_layers(list(states), layers):
        votes = class_votes(states[name], given, k)
        total = votes.sum(1)
        same = votes.gather(1, given[:, None].long())[:, 0]
        out[name] = torch.where(total > 0, (2 * same - total) / total, 0)[None]
    return out


def class_votes(
    states: Tensor, labels: Tensor, k: int, queries: Tensor | None = None, classes: int | None = None
) -> Tensor:
    """Similarity of the ``k`` nearest rows of ``states``, summed by class: ``(rows, classes)``."""
    return votes_of_nearest(states, labels, (k,), queries, classes)[0]


def votes_of_nearest(
    states: Tensor,
    labels: Tensor,
    counts: Sequence[int],
    queries: Tensor | None = None,
    classes: int | None = None,
    voters: Tensor | None = None,
) -> list[Tensor]:
    """The votes of :func:`class_votes` for several numbers of neighbours, from one search.

    ``voters`` are the numbers of the rows that vote, all by default.
    """
    n, k = len(states), max(counts)
    if labels.shape != (n,) or not 1 <= min(counts) <= k < n:
        raise InputError(f"labels, k: expected ({n},) and 1 to {n - 1}, got {tuple(labels.shape)} and {k!r}")
    mean = states.float().mean(0)

    def unit(rows: Tensor) -> Tensor:
        return nn.functional.normalize(rows.float() - mean, dim=1)

    voting, theirs = (states, labels) if voters is None else (states[voters], labels[voters])
    own = torch.arange(n)
    if voters is not None:
        own = torch.full((n,), -1)
        own[voters] = torch.arange(len(voters))
    directions, rows = unit(voting), states if queries is None else queries
    votes = [torch.zeros(len(rows), classes or int(labels.max()) + 1) for _ in counts]
    for begin in range(0, len(rows), _ROWS):
        part = slice(begin, min(begin + _ROWS, len(rows)))
        similarity = unit(rows[part]) @ directions.T
        if queries is None:
            itself = own[part]
            there = (itself >= 0).nonzero()[:, 0]
            similarity[there, itself[there]] = -2
        near = similarity.topk(k, dim=1)
        of_class, weight = theirs[near.indices].long(), near.values.clamp_min(0)
        for count, found in zip(counts, votes, strict=True):
            found[part].scatter_add_(1, of_class[:, :count], weight[:, :count])
    return votes


def votes_with_queries(
    states: Tensor, labels: Tensor, queries: Tensor, own: Tensor, counts: Sequence[int], classes: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Votes of samples and labelled queries together, of either kind none for itself: of the samples, of the queries.

    Of more than 100,000 samples so many vote, drawn at random.
    """
    n, m, voters = len(states), len(queries), None
    if own.shape != (m,):
        raise InputError(f"query_labels: expected ({m},), got {tuple(own.shape)}")
    if n > _VOTERS:
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:_VOTERS].sort().values
        voters = torch.cat([drawn, torch.arange(n, n + m)])
    found = votes_of_nearest(torch.cat([states, queries]), torch.cat([labels, own]), counts, None, classes, voters)
    return [(votes[:n], votes[n:]) for votes in found]
