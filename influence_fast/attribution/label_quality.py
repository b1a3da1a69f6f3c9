"""Label-quality estimates: how probable a label is by the model, by similar samples, by a probe, and by all of them pooled.

A class estimate is log-probabilities ``(rows, classes)``, of the training samples and of the trusted queries. What is added
to all classes of a row changes nothing, so log-odds of one class beside zeros are an estimate too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from influence_fast.attribution.gradient_source import GradientSource
from influence_fast.attribution.influence_matrix import InMemory, inner_products
from influence_fast.attribution.method_inputs import (
    CLASSES,
    PROBE,
    VOTES,
    MethodInputs,
    MislabelledQueries,
    of_no_query,
)
from influence_fast.attribution.probe import LEAST, ClassEstimate, CrossFitted, cross_fitted, log_shares
from influence_fast.attribution.probe import probe_estimate as probe_estimate
from influence_fast.attribution.query_weighting import fitted_influence
from influence_fast.attribution.representations import class_votes, neighbour_count, votes_with_queries
from influence_fast.errors import InputError
from influence_fast.gradients.model_state import is_trained_inside

STACK = "stack"

# A pool's weights before the trusted queries are seen, and how far they stray from them: standard deviation.
_PRIOR, _PRIOR_DEVIATION = {"model": 0.5, STACK: 1.0}, 0.3
# The same of a stack: the deviation of the logarithm of a weight, and of the biases of classes.
_STACK_DEVIATION, _BIAS_DEVIATION = 0.5, 1.0
# Nearest rows beside the usual number of neighbours.
_FEW = 10
# Multiplications that whitening all layers may take within a pool: about a minute on two cores.
_WHITENING = 2e12


def make_pool(inputs: MethodInputs) -> InMemory:
    """``pool``: what the model says, what states that no label was learned from say, and influence.

    Neighbours and a probe come of the states before fine-tuning: of an adapter's base, of a model of which the head alone
    was trained, else of the first block's inputs. They are stacked by how well they foresee the labels of samples they
    were fitted without (:func:`stacked`), and their stack is pooled with the rest by the trusted queries (:func:`pooled`).
    Where there are none, and training rows stand for them that the model has learned, the pool's weights stay as they are
    before queries are seen, and influence is left out.
    """
    labels, own = (torch.tensor(part) for part in inputs.labels())
    mislabelled = None if inputs.given.held_out else inputs.mislabelled_queries()
    rows = torch.arange(len(own)) if mislabelled is None else mislabelled.rows
    trusted, both, passes = own[rows], (inputs.samples, inputs.trusted), inputs.passes
    train, queries = (passes.class_log_probabilities(part) for part in both)
    classes = train.shape[1]
    estimates = _untouched(inputs, labels, rows, trusted, classes)
    whole, weights = stacked(list(estimates.values()), labels)
    parts = {"model": (train, queries[rows]), STACK: whole}
    fit_on = torch.arange(len(rows)) if inputs.fit_on is None else inputs.fit_on
    if mislabelled is not None and len(mislabelled.right[fit_on].unique()) > 1:
        parts["influence"] = _influence(inputs, mislabelled, labels, fit_on, classes)
    prior = [_PRIOR.get(name, 0.0) for name in parts]
    if mislabelled is None:
        fit_on = fit_on[:0]
    fitted = [(one, asked[fit_on]) for one, asked in parts.values()]
    by_class, of_parts = _pool(fitted, labels, trusted[fit_on], prior)
    if inputs.fit_on is None:
        inputs.once(CLASSES, lambda: by_class)
    scores = by_class.gather(1, labels[:, None])[:, 0]
    said = dict(zip(parts, of_parts.tolist(), strict=True))
    stack = said.pop(STACK)
    inputs.facts["pool_weights"] = {**said, **{n: stack * w for n, w in zip(estimates, weights.tolist(), strict=True)}}
    return of_no_query({"pool": scores[None].float()})


def _untouched(
    inputs: MethodInputs, labels: Tensor, rows: Tensor, trusted: Tensor, classes: int
) -> dict[str, ClassEstimate]:
    """Estimates by states that no label was learned from, of samples and of queries ``rows``, each without itself."""
    both, passes, k = (inputs.samples, inputs.trusted), inputs.passes, neighbour_count(len(labels))
    inside = is_trained_inside(inputs.model)

    # Nothing but the passes keeps the states: those of all blocks are the most that an audit has in memory.
    def voted(place: int) -> list[tuple[Tensor, Tensor]]:
        train, queries = (passes.all_states(part, base=True)[:, place].contiguous() for part in both)
        return votes_with_queries(train, labels, queries[rows], trusted, (k, min(_FEW, k)), classes)

    def probed() -> CrossFitted:
        x, asked = map(passes.untouched_states, both)
        return cross_fitted(x.numpy(), labels, asked[rows].numpy(), classes, query_labels=trusted)

    behind = inputs.once("votes behind the last block", lambda: voted(-1))
    inputs.once(VOTES, lambda: (*behind[0], k))
    votes = inputs.once("votes before the first block", lambda: voted(0)) if inside else behind
    usual, few = ((log_shares(train), log_shares(queries)) for train, queries in votes)
    probe = inputs.once(PROBE, probed)
    return {"neighbours": usual, "nearest neighbours": few, "probe": (probe.train, probe.by_fold)}


def _influence(
    inputs: MethodInputs, mislabelled: MislabelledQueries, labels: Tensor, fit_on: Tensor, classes: int
) -> ClassEstimate:
    """Log-odds that a label is right by influence, of the one label that a sample or query is given."""
    source = GradientSource("train", inputs.train)
    work = sum(source.rows * dim * min(source.rows, dim) for dim in map(source.dim, source.layers))
    method = "trackstar" if work <= _WHITENING else "cosine"
    matrix = inputs.once(f"mislabelled {method}", lambda: inner_products(inputs.train, mislabelled.store, method))
    by_layer, odds = fitted_influence(matrix, mislabelled.right, fit_on)
    given = labels, torch.tensor(mislabelled.labels)
    found = torch.cat(list(by_layer.values())).double().sum(0), odds
    train, queries = (
        nn.functional.one_hot(label, classes) * odds[:, None] for label, odds in zip(given, found, strict=True)
    )
    return train, queries


def neighbour_estimate(
    states: Tensor,
    labels: Sequence[int] | Tensor,
    queries: Tensor,
    k: int = 50,
    classes: int | None = None,
    query_labels: Sequence[int] | Tensor | None = None,
) -> ClassEstimate:
    """Shares of the classes among the ``k`` nearest training samples, as of :func:`neighbours`; a sample is not its own.

    Args:
        states: float ``(n, width)`` of the training samples; ``queries`` ``(m, width)`` those of the queries.
        labels: int ``(n,)``, classes from 0; there are ``classes`` of them, by default one more than the highest label.
        query_labels: int ``(m,)``; where given, queries are neighbours too, none its own.

    Raises:
        InputError: labels of another length, k out of range.
    """
    given = torch.as_tensor(labels)
    if query_labels is not None:
        (both,) = votes_with_queries(states, given, queries, torch.as_tensor(query_labels), (k,), classes)
        return log_shares(both[0]), log_shares(both[1])
    votes = class_votes(states, given, k, classes=classes), class_votes(states, given, k, queries, classes)
    return log_shares(votes[0]), log_shares(votes[1])


def stacked(estimates: Sequence[ClassEstimate], labels: Sequence[int] | Tensor) -> tuple[ClassEstimate, Tensor]:
    """One estimate of several, weighed by how well they foresee the labels that the samples are given.

    ``log p(class) = sum_e weight_e log p_e(class) + bias_class - log Z`` (stacking, Wolpert 1992, by a log-linear pool).
    Wrong labels that have nothing to do with a sample's features make all of them foresee worse, and none of them better
    than another. Weights are positive: copies with another label would teach that neighbours err. They are the most
    probable ones (logarithms normal around equal weights that sum to 1, with deviation 0.5; biases around 0, deviation 1).

    Args:
        estimates: of the training samples, each fitted without the sample that it judges, and of the queries likewise.

    Returns:
        Their stack, float64 ``(n, classes)`` and ``(m, classes)``, and the weights ``(estimates,)``.

    Raises:
        InputError: estimates or labels of other shapes.
    """
    given = torch.as_tensor(labels).long()
    train, queries = _both_sides(estimates, len(given))
    prior = torch.full((len(estimates),), -math.log(len(estimates)), dtype=torch.float64)
    logs, bias = _most_probable(
        lambda logs, bias: nn.functional.cross_entropy(train @ logs.exp() + bias, given, reduction="sum"),
        prior,
        train.shape[1],
        (_STACK_DEVIATION, _BIAS_DEVIATION),
    )
    weights = logs.exp()
    return ((train @ weights + bias).log_softmax(1), (queries @ weights + bias).log_softmax(1)), weights


def pooled(
    estimates: Sequence[ClassEstimate],
    labels: Sequence[int] | Tensor,
    query_labels: Sequence[int] | Tensor,
    prior: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-linear pool: how probable a sample's given label is by all estimates together, lowest for the most doubtful.

    ``log p(class) = sum_e weight_e log p_e(class) + bias_class - log Z``. Weights and biases are fitted to the labels of
    the trusted queries (maximum a posteriori: around ``prior``, with a standard deviation of 0.3), so an estimate
    that does not predict them gets no weight, and no noise needs to be known.

    Args:
        estimates: of the training samples and of the queries, the model's own first.
        prior: weights before the queries are seen, by default 1 for the first estimate and 0 for the others.

    Returns:
        Scores float64 ``(n,)``, the log-probability of the given label, and the weights ``(estimates,)``.

    Raises:
        InputError: estimates, labels or prior of other shapes.
    """
    given = torch.as_tensor(labels).long()
    around = [1.0] + [0.0] * (len(estimates) - 1) if prior is None else list(prior)
    if len(around) != len(estimates):
        raise InputError(f"prior: expected {len(estimates)} weights, got {len(around)}")
    found, weights = _pool(estimates, given, torch.as_tensor(query_labels).long(), around)
    return found.gather(1, given[:, None])[:, 0], weights


def _pool(
    estimates: Sequence[ClassEstimate], given: Tensor, trusted: Tensor, prior: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Pooled log-probabilities of the classes, float64 ``(n, classes)``, and the weights of the estimates."""
    train, queries = _both_sides(estimates, len(given), len(trusted))
    weights, bias = _most_probable(
        lambda weights, bias: nn.functional.cross_entropy(queries @ weights + bias, trusted, reduction="sum"),
        torch.tensor(prior, dtype=torch.float64),
        train.shape[1],
        (_PRIOR_DEVIATION, _PRIOR_DEVIATION),
    )
    return (train @ weights + bias).log_softmax(1), weights


def _both_sides(estimates: Sequence[ClassEstimate], samples: int, queries: int | None = None) -> tuple[Tensor, Tensor]:
    """Of samples and of queries, any number of them by default: float64 ``(rows, classes, estimates)``."""
    if not estimates:
        raise InputError("estimates: expected one or more, got none")
    classes = estimates[0][0].shape[1]
    queries = len(estimates[0][1]) if queries is None else queries
    for place, estimate in enumerate(estimates):
        shapes = [tuple(part.shape) for part in estimate]
        if shapes != [(samples, classes), (queries, classes)]:
            raise InputError(
                f"estimates: expected ({samples}, {classes}) and ({queries}, {classes}), number {place} has {shapes}"
            )
    train, asked = (torch.stack([both[side].double().clamp_min(LEAST) for both in estimates], -1) for side in (0, 1))
    return train, asked


def _most_probable(
    loss: Callable[[Tensor, Tensor], Tensor], prior: Tensor, classes: int, deviations: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Weights around a prior and biases around 0 that are most probable given a loss, in nats."""
    weights, bias = prior.clone().requires_grad_(), torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        stray = (weights - prior).square().sum() / deviations[0] ** 2 + bias.square().sum() / deviations[1] ** 2
        found = loss(weights, bias) + stray / 2
        found.backward()
        return found

    optimizer.step(closure)
    return weights.detach(), bias.detach()
