"""Whether scores foresee what retraining does: over random subsets of the rows, and without the rows that matter most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata, t
from torch import Tensor

from influence_fast.attribution.influence_matrix import Matrix, as_matrix
from influence_fast.errors import InputError
from influence_fast.evaluation.retrainings import Losses, Retraining, Train, retrained_losses

Scores = Matrix | Tensor | Mapping[str, Tensor]
_ONE = "scores"


@dataclass(frozen=True)
class LDS:
    """What :func:`lds` found.

    Attributes:
        table: a frame with one row for each of the scores: ``lds``, the mean over queries; ``se_queries``, its standard
            error by a bootstrap over queries; ``se_subsets``, by leaving out one subset at a time (jackknife); ``se``, both
            together; ``low`` and ``high``, its interval by Student's t on ``se``; ``se_best``, the standard error, both
            together, of its difference to the best in the table, from the same resamples; ``queries``, how many count.
        by_query: ``{name: (m,)}`` float64, Spearman's rho of each query; NaN where it is left out.
        left_out: ``{name: {query: why}}``.
        losses: of the queries after retraining on each subset, averaged over repeats: float64 ``(subsets, m)``.
        subsets: which rows each had: boolean ``(subsets, n)``.
    """

    table: pd.DataFrame
    by_query: dict[str, Tensor]
    left_out: dict[str, dict[int, str]]
    losses: Tensor
    subsets: Tensor


@dataclass(frozen=True)
class LeftOut:
    """What :func:`leave_out` found.

    Attributes:
        table: a frame with one row for each of the scores and each side, ``helpful`` and ``harmful``: ``change`` in a
            query's loss without its k rows, ``random`` without k random rows, ``over_random`` their difference, all means
            over queries, and ``se``, its standard error over queries (NaN for one), with the interval ``low`` to ``high``.
        by_query: the same for each query: ``change``, ``change_se`` over seeds, ``random``, ``random_se`` over draws,
            ``over_random`` and its ``se``.
        base: losses of the queries with all rows, one line a seed: float64 ``(seeds, m)``.
    """

    table: pd.DataFrame
    by_query: pd.DataFrame
    base: Tensor


def lds(
    train: Train,
    losses: Losses,
    scores: Scores | Mapping[str, Scores],
    *,
    subsets: int = 64,
    fraction: float = 0.5,
    repeats: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
    processes: int = 1,
    depends_on: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    progress: bool = True,
) -> LDS:
    """Linear datamodeling score: how well sums of scores foresee query losses after retraining on random subsets.

    For each query, Spearman's rho over the subsets between minus its loss after retraining and the sum of the scores of the
    subset's rows (Park et al. 2023, TRAK, definition 2.3), averaged over queries; ties take their average rank.

    Args:
        train: ``train(rows)`` trains a model from the start on these row numbers (int64, ascending). Before each call the
            generators of torch, NumPy and Python are seeded, so that a training which draws from them can be repeated.
        losses: ``losses(model)`` gives the loss of each query, ``(m,)``.
        scores: positive = helpful: an influence matrix (its layers are summed), a tensor ``(m, n)``, or ``{layer: (m, n)}``
            within ``{name: scores}``; a single row, ``(1, n)`` or ``(n,)``, stands for all queries. Several are measured on
            the same models as ``{name: scores}``.
        subsets, fraction, seed: how many subsets, and the share of the rows in each, drawn without replacement. Subset i
            depends on ``seed`` and i alone, so that more subsets later go on from fewer.
        repeats: models for each subset, whose losses are averaged.
        folder: keeps every retraining, so that the same call goes on where it stopped. It is refused where number of rows,
            ``depends_on``, or the source, defaults and closures of ``train`` and ``losses`` are others. What they read
            beside these, such as globals and files, only ``depends_on`` can tell.
        processes: models that train at a time; what ``train`` and ``losses`` close over travels to each.
        depends_on: whatever else retraining depends on, such as versions of data.
        resamples, level: of the bootstrap over queries, and of the intervals.

    Raises:
        InputError: counts or shares out of range, scores of other shapes or not finite (names query and row), no query
            whose losses and scores vary.
        StoreError: the folder holds something else, is damaged, or is in use.
    """
    named = _named(scores)
    m, n = _shape(named)
    size = round(fraction * n) if 0 < fraction < 1 else 0
    if subsets < 3 or repeats < 1 or not 0 < size < n:
        raise InputError(
            f"subsets, repeats, fraction: expected at least 3, at least 1 and a share of {n} rows that leaves some in and "
            f"some out, got {subsets!r}, {repeats!r} and {fraction!r}"
        )
    if resamples < 2 or not 0 < level < 1:
        raise InputError(f"resamples, level: expected at least 2 and a share below 1, got {resamples!r} and {level!r}")
    drawn = [_draw(n, size, seed, number) for number in range(subsets)]
    mask = torch.zeros(subsets, n, dtype=torch.bool)
    for number, rows in enumerate(drawn):
        mask[number, rows] = True
    predicted = {name: _sums(name, matrix, mask) for name, matrix in named.items()}
    jobs = [Retraining(rows, _model_seed(seed, i, r)) for i, rows in enumerate(drawn) for r in range(repeats)]
    found = retrained_losses(
        jobs, train, losses, n, folder=folder, processes=processes, depends_on=depends_on, progress=progress
    )
    reached = found.unflatten(0, (subsets, repeats)).mean(1)
    m = _checked_queries(m, reached.shape[1])
    return _judged(predicted, reached, mask, resamples, level, seed)


def leave_out(
    train: Train,
    losses: Losses,
    scores: Scores | Mapping[str, Scores],
    *,
    k: int,
    queries: Sequence[int] | None = None,
    seeds: int = 3,
    draws: int = 8,
    seed: int = 0,
    folder: str | Path | None = None,
    processes: int = 1,
    depends_on: Mapping[str, Any] | None = None,
    level: float = 0.95,
    progress: bool = True,
) -> LeftOut:
    """How a query's loss changes after retraining without its k most helpful, or most harmful, rows, beside k random ones.

    Changes are differences to a model with all rows and the same seed. Scores are right where ``over_random`` is above 0
    for ``helpful`` and below 0 for ``harmful``. It takes ``seeds + draws`` models, and ``2 * seeds`` more for each query
    and each of the scores; equal choices of rows are trained once.

    Args:
        train, losses, scores, folder, processes, depends_on: as of :func:`lds`, with which a folder can be shared.
        k: rows to drop.
        queries: numbers of the queries to ask about; all by default.
        seeds: models for each choice of rows.
        draws: random choices of k rows, the same for all queries, one model each.

    Raises:
        InputError: counts out of range, a query that is not there, scores of other shapes or not finite, losses of a
            retrained model that are not finite (names the query).
        StoreError: as of :func:`lds`.
    """
    named = _named(scores)
    m, n = _shape(named)
    if not 0 < k < n or seeds < 1 or draws < 2 or not 0 < level < 1:
        raise InputError(
            f"k, seeds, draws, level: expected 1 to {n - 1}, at least 1, at least 2 and a share below 1, got {k!r}, "
            f"{seeds!r}, {draws!r} and {level!r}"
        )
    run = lambda jobs: retrained_losses(  # noqa: E731
        jobs, train, losses, n, folder=folder, processes=processes, depends_on=depends_on, progress=progress
    )
    model_seeds = [_model_seed(seed, 0, r) for r in range(seeds)]
    everything = torch.arange(n)
    random_rows = [_without(_draw(n, k, seed, number), n) for number in range(draws)]
    shared = [Retraining(everything, one) for one in model_seeds]
    shared += [Retraining(rows, model_seeds[i % seeds]) for i, rows in enumerate(random_rows)]
    chosen: list[tuple[str, str, int, Tensor]] = []
    whole = {name: _total(name, matrix) for name, matrix in named.items()}
    # A single row of scores stands for as many queries as there are losses, which one model tells.
    m = _checked_queries(m, run(shared[:1]).shape[1])
    asked = list(range(m)) if queries is None else [int(query) for query in queries]
    if not asked or not all(0 <= query < m for query in asked):
        raise InputError(f"queries: expected numbers from 0 to {m - 1}, got {list(asked)}")
    for name, values in whole.items():
        for query in asked:
            order = values[min(query, len(values) - 1)].argsort(stable=True)
            chosen.append((name, "helpful", query, _without(order[-k:], n)))
            chosen.append((name, "harmful", query, _without(order[:k], n)))
    jobs = shared + [Retraining(rows, one) for *_, rows in chosen for one in model_seeds]
    found = run(jobs)
    bad = found[:, asked].isfinite().all(0).logical_not().nonzero()
    if len(bad):
        raise InputError(f"losses: query {asked[int(bad[0])]} has NaN or infinity after a retraining")
    base, rest = found[:seeds], found[seeds + draws :].unflatten(0, (len(chosen), seeds))
    random_change = found[seeds : seeds + draws] - base[[i % seeds for i in range(draws)]]
    lines = []
    for (name, side, query, _), reached in zip(chosen, rest, strict=True):
        change, by_chance = reached[:, query] - base[:, query], random_change[:, query]
        line = {"change": float(change.mean()), "change_se": _error(change)}
        line |= {"random": float(by_chance.mean()), "random_se": _error(by_chance)}
        line |= {"over_random": line["change"] - line["random"]}
        line |= {"se": float(np.hypot(line["change_se"], line["random_se"]))}
        lines.append({"scores": name, "side": side, "query": query, **line})
    by_query = pd.DataFrame(lines).set_index(["scores", "side", "query"])
    summary = []
    for key, part in by_query.groupby(level=["scores", "side"], sort=False):
        mean = part[["change", "random", "over_random"]].mean()
        error = _error(torch.tensor(part["over_random"].tolist(), dtype=torch.float64))
        half = float(t.ppf((1 + level) / 2, max(len(part) - 1, 1))) * error
        row = {"scores": key[0], "side": key[1], **mean.to_dict(), "se": error}
        summary.append({**row, "low": row["over_random"] - half, "high": row["over_random"] + half})
    return LeftOut(pd.DataFrame(summary).set_index(["scores", "side"]), by_query, base)


def _judged(
    predicted: Mapping[str, Tensor], reached: Tensor, mask: Tensor, resamples: int, level: float, seed: int
) -> LDS:
    subsets, m = reached.shape
    left_out: dict[str, dict[int, str]] = {}
    by_query, jackknife = {}, {}
    outcome = -reached.numpy()
    for name, sums in predicted.items():
        foreseen = sums.expand(subsets, m).numpy()
        left_out[name] = _degenerate(outcome, foreseen)
        kept = [query for query in range(m) if query not in left_out[name]]
        if not kept:
            query, why = next(iter(left_out[name].items()))
            raise InputError(f"scores: {name!r} has no query to be judged by; query {query}: {why}")
        rho = np.full(m, np.nan)
        rho[kept] = _spearman(outcome[:, kept], foreseen[:, kept])
        by_query[name] = rho
        without = [np.arange(subsets) != number for number in range(subsets)]
        # Without one subset a query may be constant, which has no rho: it then counts as 0.
        jackknife[name] = np.array([_spearman(outcome[w][:, kept], foreseen[w][:, kept]).mean() for w in without])
    random = np.random.default_rng(seed)
    counts = random.multinomial(m, np.full(m, 1 / m), resamples).astype(np.float64)
    boot = {}
    for name, rho in by_query.items():
        there = ~np.isnan(rho)
        total = counts[:, there].sum(1)
        sums = counts[:, there] @ rho[there]
        boot[name] = np.divide(sums, total, out=np.full(resamples, np.nan), where=total > 0)
    means = {name: float(np.nanmean(rho)) for name, rho in by_query.items()}
    best = max(means, key=lambda name: means[name])
    quantile = float(t.ppf((1 + level) / 2, subsets - 1))
    lines = []
    for name, mean in means.items():
        queries, subset = _deviation(boot[name]), _jackknife_error(jackknife[name])
        both = float(np.hypot(queries, subset))
        apart = np.hypot(_deviation(boot[name] - boot[best]), _jackknife_error(jackknife[name] - jackknife[best]))
        line = {"lds": mean, "se": both, "low": mean - quantile * both, "high": mean + quantile * both}
        line |= {"se_queries": queries, "se_subsets": subset, "se_best": float(apart)}
        lines.append({**line, "queries": int((~np.isnan(by_query[name])).sum())})
    table = pd.DataFrame(lines, index=pd.Index(list(means), name="scores"))
    return LDS(table, {name: torch.from_numpy(rho) for name, rho in by_query.items()}, left_out, reached, mask)


def _degenerate(outcome: np.ndarray, foreseen: np.ndarray) -> dict[int, str]:
    """Queries whose rho is not defined, with the reason."""
    out = {}
    for query in range(outcome.shape[1]):
        bad = np.flatnonzero(~np.isfinite(outcome[:, query]))
        if len(bad):
            out[query] = f"its loss is NaN or infinity after retraining on subset {int(bad[0])}"
        elif not np.ptp(outcome[:, query]):
            out[query] = "its loss is the same after every retraining"
        elif not np.ptp(foreseen[:, query]):
            out[query] = "its scores sum to the same in every subset"
    return out


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho of each column, ties by average rank; 0 for a column that does not vary."""
    ranks = [rankdata(part, axis=0) for part in (x, y)]
    a, b = (part - part.mean(0) for part in ranks)
    length = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return np.divide((a * b).sum(0), length, out=np.zeros(len(length)), where=length > 0)


def _deviation(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.std(ddof=1)) if len(there) > 1 else float("nan")


def _jackknife_error(values: np.ndarray) -> float:
    return float(np.sqrt((len(values) - 1) * np.mean((values - values.mean()) ** 2)))


def _error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")


def _named(scores: Scores | Mapping[str, Scores]) -> dict[str, Matrix]:
    given = scores if isinstance(scores, Mapping) else {_ONE: scores}
    if not given:
        raise InputError("scores: expected at least one, got none")
    out = {}
    for name, values in given.items():
        if isinstance(values, Tensor | np.ndarray):
            tensor = torch.as_tensor(values)
            values = {"all": tensor[None] if tensor.dim() == 1 else tensor}
        out[str(name)] = as_matrix(values)
    return out


def _shape(named: Mapping[str, Matrix]) -> tuple[int, int]:
    """Queries and rows; 1 query where every one of the scores has a single row."""
    shapes = {name: tuple(matrix.shape) for name, matrix in named.items()}
    many = {shape for shape in shapes.values() if shape[0] != 1}
    if len({n for _, n in shapes.values()}) > 1 or len(many) > 1:
        raise InputError(f"scores: expected as many queries and rows in each, or a single row, got {shapes}")
    n = next(iter(shapes.values()))[1]
    return (many.pop()[0] if many else 1), n


def _checked_queries(m: int, found: int) -> int:
    if m not in (1, found):
        raise InputError(f"losses: expected one for each of the {m} queries of the scores, got {found}")
    return found


def _sums(name: str, matrix: Matrix, mask: Tensor) -> Tensor:
    """Scores summed over layers and over the rows of each subset: float64 ``(subsets, queries)``."""
    total = torch.zeros(len(mask), matrix.shape[0], dtype=torch.float64)
    chosen = mask.double()
    _each(name, matrix, lambda queries, values: total[:, queries].add_(chosen @ values.T))
    return total


def _total(name: str, matrix: Matrix) -> Tensor:
    """Scores summed over layers: float64 ``(queries, rows)``."""
    total = torch.zeros(matrix.shape, dtype=torch.float64)
    _each(name, matrix, lambda queries, values: total[queries].add_(values))
    return total


def _each(name: str, matrix: Matrix, use: Callable[[slice, Tensor], Any]) -> None:
    for layer, queries, values in matrix:
        bad = values.isfinite().logical_not().nonzero()
        if len(bad):
            query, row = int(bad[0, 0]) + (queries.start or 0), int(bad[0, 1])
            raise InputError(f"scores: {name!r} has NaN or infinity in {layer!r} for query {query} and row {row}")
        use(queries, values.detach().cpu().double())


def _draw(n: int, size: int, seed: int, number: int) -> Tensor:
    """Rows of one random subset, int64 ascending: a function of these four numbers."""
    random = np.random.default_rng([seed, number])
    return torch.from_numpy(np.sort(random.permutation(n)[:size])).long()


def _model_seed(seed: int, subset: int, repeat: int) -> int:
    return int(np.random.SeedSequence([seed, subset, repeat]).generate_state(1)[0])


def _without(rows: Tensor, n: int) -> Tensor:
    keep = torch.ones(n, dtype=torch.bool)
    keep[rows] = False
    return keep.nonzero()[:, 0]
