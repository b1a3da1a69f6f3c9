"""Label-quality estimates: how probable a label is by the model, by similar samples, by a probe, and by all of them pooled.

A class estimate is log-probabilities ``(rows, classes)``, of the training samples and of the trusted queries. What is added
to all classes of a row changes nothing, so log-odds of one class beside zeros are an estimate too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from influence_fast.attribution.gradient_source import GradientSource
from influence_fast.attribution.influence_matrix import InMemory, inner_products
from influence_fast.attribution.method_inputs import CLASSES, PROBE, VOTES, MethodInputs, of_no_query
from influence_fast.attribution.probe import LEAST, ClassEstimate, CrossFitted, cross_fitted, log_shares
from influence_fast.attribution.probe import probe_estimate as probe_estimate
from influence_fast.attribution.query_weighting import fitted_influence
from influence_fast.attribution.representations import class_votes, neighbour_count
from influence_fast.errors import InputError

# How far pooled weights stray from those of the model alone before the queries are seen: standard deviation.
_PRIOR_DEVIATION = 0.3
# Multiplications that whitening all layers may take within a pool: about a minute on two cores.
_WHITENING = 2e12


def make_pool(inputs: MethodInputs) -> InMemory:
    """``pool``: the model, neighbours in its last block before fine-tuning, a probe of all its blocks then, influence."""
    mislabelled = inputs.mislabelled_queries()
    labels, own = (torch.tensor(part) for part in inputs.labels())
    trusted = own[mislabelled.rows]
    both, passes = (inputs.samples, inputs.trusted), inputs.passes
    train, queries = (passes.class_log_probabilities(part) for part in both)
    classes, rows, k = train.shape[1], mislabelled.rows, neighbour_count(len(labels))

    # Nothing but the passes keeps the states: those of all blocks are the most that an audit has in memory.
    def probed() -> CrossFitted:
        return _probe([passes.all_states(part, base=True) for part in both], labels, rows, classes)

    def voted() -> tuple[Tensor, Tensor, int]:
        return _votes([passes.last_states(part, base=True) for part in both], labels, rows, k, classes)

    probe, votes = inputs.once(PROBE, probed), inputs.once(VOTES, voted)
    estimates = {
        "model": (train, queries[rows]),
        "neighbours": (log_shares(votes[0]), log_shares(votes[1])),
        "probe": (probe.train, probe.queries),
    }
    fit_on = torch.arange(len(rows)) if inputs.fit_on is None else inputs.fit_on
    if len(mislabelled.right[fit_on].unique()) > 1:
        source = GradientSource("train", inputs.train)
        work = sum(source.rows * dim * min(source.rows, dim) for dim in map(source.dim, source.layers))
        method = "trackstar" if work <= _WHITENING else "cosine"
        matrix = inputs.once(f"mislabelled {method}", lambda: inner_products(inputs.train, mislabelled.store, method))
        by_layer, odds = fitted_influence(matrix, mislabelled.right, fit_on)
        # Of the one label that a sample or query is given, the only one whose gradient there is.
        given = labels, torch.tensor(mislabelled.labels)
        found = torch.cat(list(by_layer.values())).double().sum(0), odds
        one_hot = [
            nn.functional.one_hot(label, classes) * odds[:, None] for label, odds in zip(given, found, strict=True)
        ]
        estimates["influence"] = one_hot[0], one_hot[1]
    parts = [(train, queries[fit_on]) for train, queries in estimates.values()]
    by_class, weights = _pool(parts, labels, trusted[fit_on])
    if inputs.fit_on is None:
        inputs.once(CLASSES, lambda: by_class)
    scores = by_class.gather(1, labels[:, None])[:, 0]
    inputs.facts["pool_weights"] = dict(zip(estimates, weights.tolist(), strict=True))
    return of_no_query({"pool": scores[None].float()})


def _votes(last: Sequence[Tensor], labels: Tensor, rows: Tensor, k: int, classes: int) -> tuple[Tensor, Tensor, int]:
    train, queries = (class_votes(last[0], labels, k, part, classes) for part in (None, last[1][rows]))
    return train, queries, k


def _probe(every: Sequence[Tensor], labels: Tensor, rows: Tensor, classes: int) -> CrossFitted:
    return cross_fitted(every[0].flatten(1).numpy(), labels, every[1][rows].flatten(1).numpy(), classes)


def neighbour_estimate(
    states: Tensor, labels: Sequence[int] | Tensor, queries: Tensor, k: int = 50, classes: int | None = None
) -> ClassEstimate:
    """Shares of the classes among the ``k`` nearest training samples, as of :func:`neighbours`; a sample is not its own.

    Args:
        states: float ``(n, width)`` of the training samples; ``queries`` ``(m, width)`` those of the queries.
        labels: int ``(n,)``, classes from 0; there are ``classes`` of them, by default one more than the highest label.

    Raises:
        InputError: labels of another length, k out of range.
    """
    given = torch.as_tensor(labels)
    votes = class_votes(states, given, k, classes=classes), class_votes(states, given, k, queries, classes)
    return log_shares(votes[0]), log_shares(votes[1])


def pooled(
    estimates: Sequence[ClassEstimate], labels: Sequence[int] | Tensor, query_labels: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """Log-linear pool: how probable a sample's given label is by all estimates together, lowest for the most doubtful.

    ``log p(class) = sum_e weight_e log p_e(class) + bias_class - log Z``. Weights and biases are fitted to the labels of
    the trusted queries (maximum a posteriori: the first estimate alone, with a standard deviation of 0.3), so an estimate
    that does not predict them gets no weight, and no noise needs to be known.

    Args:
        estimates: of the training samples and of the queries, the model's own first.

    Returns:
        Scores float64 ``(n,)``, the log-probability of the given label, and the weights ``(estimates,)``.

    Raises:
        InputError: estimates or labels of other shapes.
    """
    given = torch.as_tensor(labels).long()
    found, weights = _pool(estimates, given, torch.as_tensor(query_labels).long())
    return found.gather(1, given[:, None])[:, 0], weights


def _pool(estimates: Sequence[ClassEstimate], given: Tensor, trusted: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled log-probabilities of the classes, float64 ``(n, classes)``, and the weights of the estimates."""
    classes = estimates[0][0].shape[1]
    for place, estimate in enumerate(estimates):
        shapes = [tuple(part.shape) for part in estimate]
        if shapes != [(len(given), classes), (len(trusted), classes)]:
            raise InputError(
                f"estimates: expected ({len(given)}, {classes}) and ({len(trusted)}, {classes}), number {place} has {shapes}"
            )
    train, queries = (torch.stack([both[side].double().clamp_min(LEAST) for both in estimates], -1) for side in (0, 1))
    prior = torch.zeros(len(estimates), dtype=torch.float64)
    prior[0] = 1
    weights, bias = prior.clone().requires_grad_(), torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        stray = (weights - prior).square().sum() + bias.square().sum()
        loss = nn.functional.cross_entropy(queries @ weights + bias, trusted, reduction="sum")
        loss = loss + stray / (2 * _PRIOR_DEVIATION**2)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (train @ weights + bias).log_softmax(1), weights.detach()
