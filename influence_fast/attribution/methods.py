"""Methods that are not an inner product of two stores: words, one-class SVMs, label contrast, several checkpoints, fitted
weights of the queries.

What they return is aggregated like any influence: ``{layer: (m, n)}`` or a matrix with the face of
:class:`~influence_fast.InfluenceMatrix`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from influence_fast.attribution.aggregation import Matrix
from influence_fast.attribution.influence_matrix import Gradients, InfluenceMatrix, Source, chosen_layers
from influence_fast.attribution.model_passes import WordGradients
from influence_fast.errors import InputError
from influence_fast.gradients import losses

FITTED = ("cosine", "trackstar")
# How freely fitted weights may follow the queries: the prior's variance, chosen out of fold.
_VARIANCES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_FOLDS = 10


def label_contrast(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Loss with the given label minus the mean loss with each other label, as a ``loss`` of ``build_store``.

    Gradients are linear in the loss, so a store built with it holds each sample's gradient with its given label minus the
    mean of those with the others, and its influence is the sample's influence as labelled minus as labelled otherwise.
    Cross entropies differ by logits alone, ``mean_{c != y} z_c - z_y``: one forward, one backward, and how confident the
    model is in the sample has no part in it. With two classes a sample's two gradients are parallel, so contrast changes
    their lengths alone: cosines stay as they are.
    """
    logits = losses.logits(model, batch)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    given = logits.gather(1, batch["labels"][:, None])[:, 0]
    return (logits.sum(1) - given) / (logits.shape[1] - 1) - given


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
    theirs = _by_token(train)
    for token, asked in _by_token(queries).items():
        if (there := theirs.get(token)) is not None:
            product = queries.values[asked].float() @ train.values[there].float().T
            out[queries.rows[asked][:, None], train.rows[there][None]] += product
    return {"embedding": out}


def _by_token(words: WordGradients) -> dict[int, Tensor]:
    order = words.tokens.argsort(stable=True)
    tokens, counts = words.tokens[order].unique_consecutive(return_counts=True)
    return dict(zip(tokens.tolist(), order.split(counts.tolist()), strict=True))


def outlier(
    train: Gradients,
    queries: Gradients,
    train_labels: Sequence[int] | Tensor,
    query_labels: Sequence[int] | Tensor,
    layers: list[str] | None = None,
    *,
    correct: Tensor | None = None,
    nu: float = 0.5,
) -> dict[str, Tensor]:
    """How far a sample's gradient lies inside those of the trusted queries of its class: ``{layer: (1, n)}``, low = outside.

    For each layer and class a one-class SVM (Schoelkopf et al. 2001; scikit-learn, RBF kernel, ``gamma="scale"``) is fitted
    on the query gradients of the class; the score is its decision function. ``correct`` is a mask of the queries to fit on.

    Raises:
        InputError: labels of another length; a class of the training set that no query has.
    """
    from sklearn.svm import OneClassSVM

    given, trusted = Source("train", train), Source("queries", queries)
    given.check_matches(trusted)
    labels = [torch.as_tensor(values) for values in (train_labels, query_labels)]
    for name, values, side in zip(("train_labels", "query_labels"), labels, (given, trusted), strict=True):
        if values.shape != (side.rows,):
            raise InputError(f"{name}: expected one label for each of the {side.rows} rows, got {tuple(values.shape)}")
    mask = torch.ones(trusted.rows, dtype=torch.bool) if correct is None else correct
    classes = labels[0].unique().tolist()
    members = {label: torch.nonzero((labels[1] == label) & mask)[:, 0] for label in classes}
    for label, found in members.items():
        if not len(found):
            raise InputError(f"query_labels: no query of class {label} to fit on, which training samples have")
    out = {}
    for name in chosen_layers(given.layers, layers):
        gradients = trusted.read(name)
        models = {label: OneClassSVM(nu=nu).fit(gradients[rows].double().numpy()) for label, rows in members.items()}
        scores = torch.empty(1, given.rows)
        for block in given.blocks(name):
            values, own = given.read(name, block).double(), labels[0][block]
            for label, model in models.items():
                rows = own == label
                if rows.any():
                    found = model.decision_function(values[rows].numpy())
                    scores[0, block][rows] = torch.from_numpy(found).float()
        out[name] = scores
    return out


def fitted_influence(
    matrix: InfluenceMatrix, right: Sequence[bool] | Tensor, fit_on: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Influence summed over the queries with weights that tell right labels from wrong ones: ``{layer: (1, n)}``.

    A mean over queries takes each to say the same. Here some queries are given a wrong label on purpose (``right`` says
    which are not), and the weights ``a`` are those with which ``s(x) = sum_q a_q mean_l I_l(q, x)`` tells the two kinds
    apart best: kernel logistic regression without a bias, whose kernel is the influence between queries. With two classes
    it does not matter which are wrong, for a sample's two gradients are parallel::

        inf.fitted_influence(inf.influence(train, queries, "trackstar"), right)

    Args:
        matrix: influence by ``trackstar`` or ``cosine`` of queries that have their gradients with the label they are given.
        right: boolean ``(m,)``; some of each kind.
        fit_on: numbers of the queries that get a weight; all by default.

    Returns:
        What each layer adds to ``s``, and ``s`` of the queries, float64 ``(m,)``, each by weights that were fitted without
        it (10 folds): the logarithm of the odds that its label is right.

    Raises:
        InputError: another method, ``right`` of another length or of one kind, and all that reading influence raises.
    """
    if matrix.method not in FITTED:
        raise InputError(f"matrix: expected influence by {' or '.join(FITTED)}, got {matrix.method!r}")
    m, count = matrix.shape[0], len(matrix.layers)
    target = torch.as_tensor(right).double() * 2 - 1
    chosen = torch.arange(m) if fit_on is None else fit_on
    if target.shape != (m,) or len(target[chosen].unique()) < 2:
        raise InputError(f"right: expected ({m},), some right and some wrong, got {tuple(target.shape)}")
    kernel = torch.zeros(m, m, dtype=torch.float64)
    for name in matrix.layers:
        kernel += matrix.between_queries(name) / count

    def weights(rows: Tensor, variance: float) -> Tensor:
        out = torch.zeros(m, dtype=torch.float64)
        out[rows] = _query_weights(kernel[rows][:, rows], target[rows], variance)
        return out

    folds = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).chunk(_FOLDS)
    least, best, held_out = float("inf"), _VARIANCES[0], target
    for variance in _VARIANCES:
        said = torch.zeros(m, dtype=torch.float64)
        for left in folds:
            seen = torch.ones(len(chosen), dtype=torch.bool)
            seen[left] = False
            said[chosen[left]] = kernel[chosen[left]] @ weights(chosen[seen], variance)
        loss = float(nn.functional.softplus(-target[chosen] * said[chosen]).mean())
        if loss < least:
            least, best, held_out = loss, variance, said
    fitted = weights(chosen, best)
    out = kernel @ fitted
    out[chosen] = held_out[chosen]
    return {name: matrix.weighted(name, fitted[None] / count).float() for name in matrix.layers}, out


def _query_weights(kernel: Tensor, target: Tensor, variance: float) -> Tensor:
    """Most probable ``a`` for ``P(target) = sigmoid(target * kernel a)`` and ``kernel a ~ N(0, variance * kernel)``."""
    weights = torch.zeros(len(target), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        said = kernel @ weights
        loss = nn.functional.softplus(-target * said).sum() + (weights @ said) / (2 * variance)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


class Checkpoints:
    """TracInCP (Pruthi et al. 2020, eq. 1): the weighted sum of the influence at several checkpoints.

    Args:
        matrices: one :class:`~influence_fast.InfluenceMatrix` for each checkpoint, over the same samples and queries.
        weights: one for each, such as the learning rate there; 1 by default.

    Raises:
        InputError: no matrix; other layers or shapes; a weight missing.
    """

    def __init__(self, matrices: Sequence[Matrix], weights: Sequence[float] | None = None) -> None:
        if not matrices:
            raise InputError("matrices: expected at least one checkpoint")
        self.matrices = list(matrices)
        self.weights = [1.0] * len(matrices) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.matrices):
            raise InputError(
                f"weights: expected {len(self.matrices)}, one for each checkpoint, got {len(self.weights)}"
            )
        first = self.matrices[0]
        self.layers, self.shape = first.layers, first.shape
        for place, matrix in enumerate(self.matrices):
            if matrix.layers != self.layers or matrix.shape != self.shape:
                raise InputError(
                    f"matrices: checkpoint {place} has {len(matrix.layers)} layers and shape {matrix.shape}, "
                    f"the first {len(self.layers)} and {self.shape}"
                )

    @property
    def query_correct(self) -> Tensor | None:
        """Queries that the model predicts correctly at the last checkpoint."""
        return self.matrices[-1].query_correct

    def layer(self, name: str) -> Tensor:
        """All of one layer: float32 ``(m, n)``."""
        return torch.cat([values for layer, _, values in self if layer == name])

    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]:
        for parts in zip(*self.matrices, strict=True):
            name, queries, _ = parts[0]
            yield name, queries, self._sum([values for _, _, values in parts])

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        for parts in zip(*(matrix.columns() for matrix in self.matrices), strict=True):
            yield parts[0][0], self._sum([values for _, values in parts])

    def _sum(self, values: list[Tensor]) -> Tensor:
        total = self.weights[0] * values[0]
        for weight, part in zip(self.weights[1:], values[1:], strict=True):
            total += weight * part
        return total
