"""How good a ranking is: noise detection rate and its companions, cancellation, filter and retrain.

Everywhere ``scores (n,)`` are sorted ascending (lowest = most harmful first) and ``noise (n,)`` is true where a sample is
known to be bad. With ``c_j`` noisy samples among the first j, m noisy of n:

``NDR@q = c_{floor(q n)} / m`` and ``AUC_NDR = (1/m) sum_j c_j / (n - m/2)`` (arXiv 2511.04715). A random order has AUC_NDR
``(n + 1) / (2 n - m)`` on average, a perfect one just over 1. Tied scores count with the expectation over their orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.attribution.aggregation import Matrix, aggregate_many
from influence_fast.attribution.influence_matrix import Gradients, Source, chosen_layers, influence
from influence_fast.errors import InputError
from influence_fast.gradients.layers import block_of, kind_of

Key = tuple[str, str, str]
BASELINES = ("random", "loss", "self-influence")


def ndr_curve(scores: Tensor, noise: Tensor) -> Tensor:
    """Share of the noisy samples found among the first j: float64 ``(n,)``, entry ``j - 1`` for j = 1 .. n."""
    values, bad = _checked(scores, noise)
    order = np.argsort(values, kind="stable")
    values, bad = values[order], bad[order].astype(np.float64)
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    sizes = np.diff(np.r_[first, len(values)])
    # Within a tie every sample is as likely to come first: each step finds the tie's mean share of noise.
    step = np.repeat(np.add.reduceat(bad, first) / sizes, sizes)
    return torch.from_numpy(np.cumsum(step) / bad.sum())


def ndr(scores: Tensor, noise: Tensor, at: float = 0.3) -> float:
    """Noise detection rate: share of the noisy samples among the lowest ``floor(at * n)``."""
    curve = ndr_curve(scores, noise)
    count = _first(at, len(curve))
    return float(curve[count - 1]) if count else 0.0


def ndr_auc(scores: Tensor, noise: Tensor) -> float:
    """``AUC_NDR = (1/m) sum_j c_j / (n - m/2)``."""
    curve = ndr_curve(scores, noise)
    bad = int(torch.as_tensor(noise).sum())
    return float(curve.sum()) / (len(curve) - bad / 2)


def roc_auc(scores: Tensor, noise: Tensor) -> float:
    """Probability that a noisy sample scores below a clean one, ties counting half."""
    from sklearn.metrics import roc_auc_score

    values, bad = _checked(scores, noise)
    return float(roc_auc_score(bad, -values))


def precision(scores: Tensor, noise: Tensor, at: float = 0.3) -> float:
    """Share of noisy samples among the lowest ``floor(at * n)``."""
    curve = ndr_curve(scores, noise)
    count = _first(at, len(curve))
    if count == 0:
        raise InputError(f"at: {at!r} of {len(curve)} samples is none")
    return float(curve[count - 1]) * int(torch.as_tensor(noise).sum()) / count


def bootstrap(
    metric: Callable[[Tensor, Tensor], float],
    scores: Tensor,
    noise: Tensor,
    *,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of ``metric(scores, noise)`` under resampling of the samples, noisy and clean apart."""
    values, bad = _checked(scores, noise)
    if resamples < 1 or not 0 < level < 1:
        raise InputError(f"resamples, level: expected at least 1 and a share below 1, got {resamples!r} and {level!r}")
    random = np.random.default_rng(seed)
    strata = [np.flatnonzero(bad), np.flatnonzero(~bad)]
    found = []
    for _ in range(resamples):
        rows = np.concatenate([random.choice(stratum, len(stratum)) for stratum in strata])
        found.append(metric(torch.from_numpy(values[rows]), torch.from_numpy(bad[rows])))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rank_correlation(values: Sequence[float], others: Sequence[float], tasks: Sequence[Any] | None = None) -> float:
    """Spearman's rho within each task, averaged over tasks: how well one figure predicts another, such as NDR the accuracy
    after filtering. Tasks in which either does not vary are left out; NaN where none is left.

    Raises:
        InputError: lengths that differ.
    """
    from scipy.stats import spearmanr

    x, y = (np.asarray(column, dtype=np.float64) for column in (values, others))
    task = np.zeros(len(x), dtype=int) if tasks is None else np.unique(np.asarray(tasks), return_inverse=True)[1]
    if x.ndim != 1 or x.shape != y.shape or x.shape != task.shape:
        raise InputError(f"values, others, tasks: expected one length, got {x.shape}, {y.shape} and {task.shape}")
    found = [
        float(spearmanr(x[task == t], y[task == t]).statistic)
        for t in np.unique(task)
        if np.ptp(x[task == t]) and np.ptp(y[task == t])
    ]
    return float(np.mean(found)) if found else math.nan


def wins(values: Any) -> Tensor:
    """``(repeats, cells)`` of a metric -> ``(cells, cells)``: share of repeats in which row beats column, ties half."""
    given = torch.as_tensor(values, dtype=torch.float64)
    if given.dim() != 2 or 0 in given.shape:
        raise InputError(f"values: expected (repeats, cells), got {tuple(given.shape)}")
    return torch.stack([((c[:, None] > given).double() + 0.5 * (c[:, None] == given)).mean(0) for c in given.T])


@dataclass(frozen=True)
class Evaluation:
    """A table of rankings, all on the same resamples.

    Attributes:
        rows: one dict for each ranking, baselines first: ``method``, ``group``, ``aggregation``; ``ndr@10`` and
            ``precision@10`` for each level; ``auc_ndr`` with its interval ``low`` to ``high``; ``roc_auc``; and, beside
            ``random`` and ``loss``, the interval of the difference in AUC_NDR: ``over_random``, ``over_loss`` (low, high).
        wins: ``(rows, rows)``: share of resamples in which a row's AUC_NDR exceeds a column's.
        warnings: in plain words, which rankings are not better than random or than the loss.
        correlation: with retrained accuracies given, Spearman's rho of each metric with them.
    """

    rows: list[dict[str, Any]]
    wins: Tensor
    warnings: list[str]
    correlation: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, Any]:
        """The row with the highest AUC_NDR that is no baseline (chosen after the fact, which flatters it)."""
        return max((row for row in self.rows if row["group"]), key=lambda row: row["auc_ndr"])


def compare(
    scores: Mapping[Key, Tensor],
    noise: Tensor,
    *,
    levels: Sequence[float] = (0.1, 0.2, 0.3),
    accuracy: Mapping[Key, float] | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Measure rankings ``{(method, group, aggregation): (n,)}`` against known noise; a baseline has two empty strings.

    Intervals are percentile bootstraps that resample noisy and clean samples apart, with the same resamples for every
    ranking, so that differences are paired. ``accuracy`` gives what retraining without a ranking's lowest share reached.
    """
    if not scores:
        raise InputError("scores: expected at least one ranking")
    if resamples < 1 or not 0 < level < 1:
        raise InputError(f"resamples, level: expected at least 1 and a share below 1, got {resamples!r} and {level!r}")
    ends = [(1 - level) / 2, (1 + level) / 2]
    first = next(iter(scores.values()))
    weights = _weights(torch.as_tensor(noise), resamples, seed) if _checked(first, noise) else None
    rows: list[dict[str, Any]] = []
    resampled: dict[Key, np.ndarray] = {}
    for key, values in scores.items():
        row: dict[str, Any] = dict(zip(("method", "group", "aggregation"), key, strict=True))
        for at in levels:
            row |= {
                f"ndr@{100 * at:g}": ndr(values, noise, at),
                f"precision@{100 * at:g}": precision(values, noise, at),
            }
        resampled[key] = _resampled_auc(*_checked(values, noise), weights)
        low, high = np.quantile(resampled[key], ends)
        row |= {"auc_ndr": ndr_auc(values, noise), "low": float(low), "high": float(high)}
        rows.append(row | {"roc_auc": roc_auc(values, noise)})
    chance = (len(first) + 1) / (2 * len(first) - int(torch.as_tensor(noise).sum()))
    loss = resampled.get(("loss", "", ""))
    for row, repeats in zip(rows, resampled.values(), strict=True):
        for name, rival in (("over_random", chance), ("over_loss", loss)):
            if rival is not None:
                row[name] = [float(end) for end in np.quantile(repeats - rival, ends)]
    found = Evaluation(rows, wins(np.stack(list(resampled.values()), 1)), _warnings(rows))
    if accuracy:
        known = [row for row in rows if (row["method"], row["group"], row["aggregation"]) in accuracy]
        reached = [accuracy[row["method"], row["group"], row["aggregation"]] for row in known]
        metrics = [name for name in rows[0] if name in ("auc_ndr", "roc_auc") or name.startswith("ndr@")]
        found.correlation.update({name: rank_correlation([row[name] for row in known], reached) for name in metrics})
    return found


def evaluate(
    train: Gradients,
    queries: Gradients,
    noise: Tensor,
    *,
    methods: Sequence[str] = ("dot", "cosine", "datainf"),
    aggregations: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    matrices: Mapping[str, Matrix | Mapping[str, Tensor]] | None = None,
    fraction: float = 0.2,
    **settings: Any,
) -> Evaluation:
    """Layer group x method x aggregation from one capture, measured against known noise, with baselines beside.

    Args:
        train, queries: stores or ``{layer: (rows, dim)}``.
        noise: boolean ``(n,)`` of the samples known to be bad.
        methods, fraction: as of :func:`~influence_fast.influence` and :func:`~influence_fast.aggregate`.
        aggregations: ``mean``, ``rank-c`` and ``vote-c`` where it is known which queries are predicted correctly,
            ``mean``, ``rank`` and ``vote`` elsewhere.
        groups: ``{name: layers}``; by default by the layers' names: embedding, attention, mlp, head, each block, all.
        matrices: influence by other methods, by name; of their layers, groups keep those that they have.
        settings: ``levels``, ``accuracy``, ``resamples``, ``level`` and ``seed`` of :func:`compare`.
    """
    source = Source("train", train)
    groups = groups or groups_by_name(source.layers)
    given: dict[str, Matrix | Mapping[str, Tensor]] = {m: influence(train, queries, m) for m in methods}
    scores = {(name, "", ""): values for name, values in baselines(train, seed=settings.get("seed", 0)).items()}
    for method, matrix in {**given, **(matrices or {})}.items():
        for group, aggregation, values in aggregated(matrix, aggregations, groups, fraction):
            scores[method, group, aggregation] = values
    return compare(scores, noise, **settings)


def aggregated(
    matrix: Matrix | Mapping[str, Tensor],
    aggregations: Sequence[str] | None,
    groups: Mapping[str, Sequence[str]],
    fraction: float,
) -> Iterator[tuple[str, str, Tensor]]:
    """``(group, aggregation, scores)``. A matrix with layers of its own has groups of its own: each layer, and all."""
    there = list(matrix) if isinstance(matrix, Mapping) else matrix.layers
    correct = None if isinstance(matrix, Mapping) else matrix.query_correct
    own = {name: [layer for layer in layers if layer in there] for name, layers in groups.items()}
    own = {name: layers for name, layers in own.items() if layers}
    if not own:
        own = {name: [name] for name in there} | {"all": there}
    suffix = "-c" if correct is not None else ""
    wanted = list(aggregations) if aggregations else ["mean", f"rank{suffix}", f"vote{suffix}"]
    if correct is None:
        wanted = list(dict.fromkeys(name.removesuffix("-c") for name in wanted))
    for group, found in aggregate_many(matrix, wanted, own, fraction=fraction).items():
        for aggregation, values in found.items():
            yield group, aggregation, values


def baselines(train: Gradients, seed: int = 0) -> dict[str, Tensor]:
    """``random``, ``loss`` (highest first; where the store has it) and ``self-influence`` (largest ``|g|^2`` first)."""
    source = Source("train", train)
    generator = torch.Generator().manual_seed(seed)
    out = {"random": torch.rand(source.rows, generator=generator, dtype=torch.float64)}
    if source.store is not None and "loss" in source.store.columns:
        out["loss"] = -source.store.column("loss").double()
    exact = source.store.sqnorm if source.store is not None else source.sqnorm
    out["self-influence"] = -sum((exact(name) for name in source.layers), torch.zeros(source.rows, dtype=torch.float64))
    return out


def groups_by_name(layers: Sequence[str]) -> dict[str, list[str]]:
    """Groups told by names alone: embedding, attention, mlp, head, each block, and all."""
    groups: dict[str, list[str]] = {name: [] for name in ("embedding", "attention", "mlp", "head")}
    for layer in layers:
        groups[kind_of(layer, torch.nn.Identity())].append(layer)
    for layer in layers:
        if (block := block_of(layer)) is not None:
            groups.setdefault(f"block {block}", []).append(layer)
    return {name: members for name, members in groups.items() if members} | {"all": list(layers)}


def _weights(noise: Tensor, resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each sample: ``(resamples, n)``, noisy and clean apart."""
    random = np.random.default_rng(seed)
    bad = noise.cpu().numpy().astype(bool)
    out = np.zeros((resamples, len(bad)))
    for stratum in (np.flatnonzero(bad), np.flatnonzero(~bad)):
        out[:, stratum] = random.multinomial(len(stratum), np.full(len(stratum), 1 / len(stratum)), resamples)
    return out


def _resampled_auc(values: np.ndarray, bad: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """AUC_NDR of every resample: a noisy sample at average place r (from 1) adds ``n + 1 - r`` to ``sum_j c_j``."""
    assert weights is not None
    order = np.argsort(values, kind="stable")
    values, drawn = values[order], weights[:, order]
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    size = np.add.reduceat(drawn, first, axis=1)
    noisy = np.add.reduceat(drawn * bad[order], first, axis=1)
    place = np.cumsum(size, axis=1) - size / 2 + 0.5
    n, m = len(values), bad.sum()
    return (noisy * (n + 1 - place)).sum(1) / m / (n - m / 2)


def _warnings(rows: list[dict[str, Any]]) -> list[str]:
    ours = [row for row in rows if row["group"]]
    out = []
    for rival, key in (("a random order", "over_random"), ("the training loss alone", "over_loss")):
        worse = [row for row in ours if key in row and row[key][0] <= 0]
        if worse:
            names = [" ".join((row["method"], row["group"], row["aggregation"])) for row in worse]
            some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            out.append(f"Not better than {rival} (the interval of the difference reaches 0): {len(worse)} of {len(ours)} "
                       f"rankings: {some}.")  # fmt: skip
    return out


def cancellation(gradients: Gradients, layers: Sequence[str] | None = None) -> dict[str, float]:
    """``sum_i |g_i|_1 / |sum_i g_i|_1`` of each layer over all samples, summed in float64; infinity where the sum is 0.

    ``gradients`` is a store or ``{layer: (n, dim)}``.
    """
    source = Source("gradients", gradients)
    out = {}
    for name in chosen_layers(source.layers, layers):
        total, absolute = torch.zeros(source.dim(name), dtype=torch.float64), 0.0
        for block in source.blocks(name):
            values = source.read(name, block).double()
            total += values.sum(0)
            absolute += float(values.abs().sum())
        norm = float(total.abs().sum())
        out[name] = absolute / norm if norm else math.inf
    return out


@dataclass(frozen=True)
class Retrained:
    """One arm of :func:`filter_and_retrain`: rows kept, the epoch chosen, its accuracy on the reported split."""

    rows: Tensor
    epoch: int
    selection: float
    reported: float


def filter_and_retrain(
    train: Callable[[Tensor], Sequence[tuple[float, float]]],
    scores: Mapping[str, Tensor],
    noise: Tensor | None = None,
    *,
    drop: float = 0.3,
    seed: int = 0,
) -> dict[str, Retrained]:
    """Drop the lowest-scoring share, retrain, and compare with dropping nothing, as many at random, and the truly noisy.

    Args:
        train: ``train(rows)`` trains from the same initial checkpoint on the given row numbers (int64, ascending) and
            returns ``(accuracy on the selection split, accuracy on the reported split)`` of each epoch.
        scores: ``{name: (n,)}``, one arm each, beside ``all``, ``random`` and, where ``noise`` is known, ``oracle``.
        drop: share that an arm drops; the oracle drops the noisy samples first and fills up at random.

    Returns:
        ``{arm: Retrained}``. The epoch is the best on the selection split, so the reported split has no part in choosing.
    """
    if not scores or not 0 < drop < 1:
        raise InputError(
            f"scores, drop: expected at least one ranking and a share below 1, got {list(scores)}, {drop!r}"
        )
    n = len(next(iter(scores.values())))
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.rand(n, generator=generator, dtype=torch.float64)
    arms = {**scores, "random": shuffled}
    if noise is not None:
        arms["oracle"] = shuffled - 2 * torch.as_tensor(noise).double()
    cut = _first(drop, n)
    kept = {name: values.argsort(stable=True)[cut:].sort().values for name, values in arms.items()}
    out = {}
    for name, rows in {"all": torch.arange(n), **kept}.items():
        epochs = list(train(rows))
        best = max(range(len(epochs)), key=lambda epoch: epochs[epoch][0])
        out[name] = Retrained(rows, best, *epochs[best])
    return out


def _first(at: float, n: int) -> int:
    """``floor(at * n)``, not one less because 0.29 * 100 is 28.999..."""
    if not 0 <= at <= 1:
        raise InputError(f"at: expected a share from 0 to 1, got {at!r}")
    return math.floor(at * n + 1e-9)


def _checked(scores: Any, noise: Any) -> tuple[np.ndarray, np.ndarray]:
    values = torch.as_tensor(scores).detach().cpu().double().numpy()
    given = torch.as_tensor(noise).detach().cpu().numpy()
    if values.ndim != 1 or values.shape != given.shape:
        raise InputError(f"scores, noise: expected two vectors of one length, got {values.shape} and {given.shape}")
    bad = given.astype(bool)
    if given.dtype != bool and not np.array_equal(bad.astype(given.dtype), given):
        raise InputError("noise: expected booleans, or 0 and 1")
    if bad.all() or not bad.any():
        raise InputError(f"noise: expected some samples marked and some not, got {int(bad.sum())} of {len(bad)} marked")
    if not np.isfinite(values).all():
        raise InputError(f"scores: row {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
    return values, bad
