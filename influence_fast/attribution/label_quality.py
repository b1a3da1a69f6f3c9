"""What says of a sample's label: the model itself, like samples, a probe; and what all say together.

An opinion is of every class: log-probabilities ``(rows, classes)``, of the training samples and of the trusted queries. What
is added to all classes of a row changes nothing, so log-odds of one class beside zeros are an opinion too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_fast.attribution.influence_matrix import chosen_layers
from influence_fast.errors import InputError

_ROWS = 1024
# A probe learns no better from more.
_PROBE_ROWS = 20_000
_PENALTIES = (1e-4, 1e-3, 1e-2)
FOLDS = 5
# How far pooled weights stray from those of the model alone before the queries are seen: standard deviation.
_STRAY = 0.3
# Log-probability of what an opinion holds impossible.
_LEAST = -30.0

# Of the training samples and of the queries.
Opinion = tuple[Tensor, Tensor]


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
        votes = _votes(states[name], given, k)
        total = votes.sum(1)
        same = votes.gather(1, given[:, None].long())[:, 0]
        out[name] = torch.where(total > 0, (2 * same - total) / total, 0)[None]
    return out


def neighbour_opinion(
    states: Tensor, labels: Sequence[int] | Tensor, asked: Tensor, k: int = 50, classes: int | None = None
) -> Opinion:
    """Shares of the classes among the ``k`` nearest training samples, as of :func:`neighbours`; a sample is not its own.

    Args:
        states: float ``(n, width)`` of the training samples; ``asked`` ``(m, width)`` of the queries.
        labels: int ``(n,)``, classes from 0; there are ``classes`` of them, by default as many as labels say.

    Raises:
        InputError: labels of another length, k out of range.
    """
    given = torch.as_tensor(labels)
    return _shares(_votes(states, given, k, classes=classes)), _shares(_votes(states, given, k, asked, classes))


def probe_opinion(
    states: Tensor, labels: Sequence[int] | Tensor, asked: Tensor, classes: int | None = None, seed: int = 0
) -> Opinion:
    """Logistic regression on states (standardised, L2): of a training sample by one fitted without it, in five folds.

    The penalty is the one of three with the lowest loss out of fold. At most 20,000 samples are learned from.

    Raises:
        InputError: labels of another length, or a class with fewer samples than folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = states.float().numpy(), torch.as_tensor(labels).numpy()
    if y.shape != (len(x),) or np.bincount(y)[np.unique(y)].min() < FOLDS:
        raise InputError(f"labels: expected ({len(x)},), each class {FOLDS} times or more, got {y.shape}")
    random, width = np.random.default_rng(seed), classes or int(y.max()) + 1

    def fitted(rows: np.ndarray, penalty: float) -> Any:
        chosen = random.permutation(rows)[:_PROBE_ROWS]
        return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=500)).fit(x[chosen], y[chosen])

    def said(model: Any, rows: np.ndarray) -> np.ndarray:
        out = np.full((len(rows), width), -np.inf)
        out[:, model.classes_] = model.predict_log_proba(rows)
        return out

    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, y))
    best, chosen = np.inf, _PENALTIES[0]
    opinion = np.empty((0, width))
    for penalty in _PENALTIES:
        found = np.empty((len(x), width))
        for learned, left in folds:
            found[left] = said(fitted(learned, penalty), x[left])
        # A rare class may be missing from what was learned.
        loss = -np.maximum(found[np.arange(len(y)), y], _LEAST).mean()
        if loss < best:
            best, chosen, opinion = loss, penalty, found
    whole = said(fitted(np.arange(len(x)), chosen), asked.float().numpy())
    return torch.from_numpy(opinion), torch.from_numpy(whole)


def pooled(
    opinions: Sequence[Opinion], labels: Sequence[int] | Tensor, query_labels: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """Log-linear pool: how probable a sample's given label is by all opinions together, lowest for the most doubtful.

    ``log p(class) = sum_e weight_e log p_e(class) + bias_class - log Z``. Weights and biases are fitted to the labels of
    the trusted queries (maximum a posteriori: the first opinion alone, with a standard deviation of 0.3), so an opinion that
    says nothing of them gets no weight, and no noise needs to be known.

    Args:
        opinions: of the training samples and of the queries, the model's own first.

    Returns:
        Scores float64 ``(n,)``, the log-probability of the given label, and the weights ``(opinions,)``.

    Raises:
        InputError: opinions or labels of other shapes.
    """
    given, trusted = torch.as_tensor(labels).long(), torch.as_tensor(query_labels).long()
    classes = opinions[0][0].shape[1]
    for place, opinion in enumerate(opinions):
        shapes = [tuple(part.shape) for part in opinion]
        if shapes != [(len(given), classes), (len(trusted), classes)]:
            raise InputError(
                f"opinions: expected ({len(given)}, {classes}) and ({len(trusted)}, {classes}), number {place} has {shapes}"
            )
    train, queries = (torch.stack([o[side].double().clamp_min(_LEAST) for o in opinions], -1) for side in (0, 1))
    prior = torch.zeros(len(opinions), dtype=torch.float64)
    prior[0] = 1
    weights, bias = prior.clone().requires_grad_(), torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        stray = (weights - prior).square().sum() + bias.square().sum()
        loss = nn.functional.cross_entropy(queries @ weights + bias, trusted, reduction="sum")
        loss = loss + stray / (2 * _STRAY**2)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        scores = (train @ weights + bias).log_softmax(1).gather(1, given[:, None])[:, 0]
    return scores, weights.detach()


def _votes(states: Tensor, labels: Tensor, k: int, asked: Tensor | None = None, classes: int | None = None) -> Tensor:
    """Similarity of the ``k`` nearest rows of ``states``, summed by class: ``(rows asked, classes)``."""
    n = len(states)
    if labels.shape != (n,) or not 1 <= k < n:
        raise InputError(f"labels, k: expected ({n},) and 1 to {n - 1}, got {tuple(labels.shape)} and {k!r}")
    mean = states.float().mean(0)
    unit = nn.functional.normalize(states.float() - mean, dim=1)
    rows = unit if asked is None else nn.functional.normalize(asked.float() - mean, dim=1)
    votes = torch.zeros(len(rows), classes or int(labels.max()) + 1)
    for begin in range(0, len(rows), _ROWS):
        part = slice(begin, min(begin + _ROWS, len(rows)))
        similarity = rows[part] @ unit.T
        if asked is None:
            similarity[torch.arange(len(similarity)), torch.arange(part.start, part.stop)] = -2
        near = similarity.topk(k, dim=1)
        votes[part].scatter_add_(1, labels[near.indices].long(), near.values.clamp_min(0))
    return votes


def _shares(votes: Tensor) -> Tensor:
    """Log of shares, a hundredth of a vote more for each class, so that none is impossible."""
    return ((votes + 0.01) / (votes.sum(1, keepdim=True) + 0.01 * votes.shape[1])).log()
