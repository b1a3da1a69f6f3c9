"""Rankings measured against known noise, side by side on the same resamples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from torch import Tensor

from influence_fast.errors import InputError
from influence_fast.evaluation.metrics import (
    checked_scores,
    interval,
    ndr,
    ndr_auc,
    precision,
    rank_correlation,
    roc_auc,
    smaller,
    wins,
)

_Key = TypeVar("_Key", bound=tuple[str, str, str])
_INTERVALS = ("over_random", "over_loss")


# Baselines that know more than the loss, where there is what they need: ``rivals`` makes the first three, training that was
# recorded (``inf.InfluenceCallback``) the others.
RIVALS = ("cleanlab probe", "cleanlab folds", "neighbours agree", "aum", "mean_loss")


class RankingKey(NamedTuple):
    """The key of a ranking: method, layer group, aggregation. A baseline has a name alone."""

    method: str
    group: str = ""
    aggregation: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, self))

    @property
    def is_baseline(self) -> bool:
        """Whether it is ``random``, ``loss`` or another ranking that is no influence: one without a layer group."""
        return not self.group


@dataclass(frozen=True)
class Evaluation:
    """A table of rankings, all on the same resamples.

    Attributes:
        table: a frame with one row for each ranking, indexed by ``method``, ``group`` and ``aggregation``, baselines first.
            Columns ``ndr@10`` and ``precision@10`` for each level; ``auc_ndr`` with its interval ``low`` to ``high``;
            ``roc_auc``; and, beside ``random`` and ``loss``, the interval of the difference in AUC_NDR:
            ``over_random_low``, ``over_random_high``, ``over_loss_low``, ``over_loss_high``.
        wins: ``(rows, rows)``: share of resamples in which a row's AUC_NDR exceeds a column's.
        warnings: in plain words, which rankings are not better than random or than the loss.
        correlation: with retrained accuracies given, Spearman's rho of each metric with them.
    """

    table: pd.DataFrame
    wins: Tensor
    warnings: list[str]
    correlation: dict[str, float] = field(default_factory=dict)

    @property
    def keys(self) -> list[RankingKey]:
        """The rankings, in the table's order."""
        return [RankingKey(*key) for key in self.table.index]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table as one dict for each ranking, with the key's parts among them and intervals as ``[low, high]``."""
        out = []
        for key, row in zip(self.keys, self.table.to_dict("records"), strict=True):
            pairs = {
                name: [row.pop(f"{name}_low"), row.pop(f"{name}_high")] for name in _INTERVALS if f"{name}_low" in row
            }
            out.append({**key._asdict(), **{str(name): value for name, value in row.items()}, **pairs})
        return out

    @property
    def winner(self) -> str:
        """Which ranking has the highest AUC_NDR, baselines among them, and how it stands to the best of the other kind."""
        rows = self.rows
        by_kind = [[i for i, row in enumerate(rows) if bool(row["group"]) is kind] for kind in (True, False)]
        best = [max(some, key=lambda i: rows[i]["auc_ndr"]) for some in by_kind if some]
        first, *second = sorted(best, key=lambda i: -rows[i]["auc_ndr"])
        name, value = str(self.keys[first]), rows[first]["auc_ndr"]
        if not second:
            return f"{name} has the highest AUC_NDR, {value:.3f}."
        kind = "the best baseline" if rows[first]["group"] else "the best influence ranking"
        other = f"{self.keys[second[0]]} ({rows[second[0]]['auc_ndr']:.3f})"
        share = float(self.wins[first, second[0]])
        return f"{name} has the highest AUC_NDR, {value:.3f}: above {kind}, {other}, in {share:.0%} of resamples."

    @property
    def best(self) -> dict[str, Any]:
        """The row with the highest AUC_NDR that is no baseline (chosen after the fact, which flatters it)."""
        return max((row for row in self.rows if row["group"]), key=lambda row: row["auc_ndr"])


def compare(
    scores: Mapping[_Key, Tensor],
    noise: Tensor,
    *,
    levels: Sequence[float] = (0.1, 0.2, 0.3),
    accuracy: Mapping[_Key, float] | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Measure rankings ``{(method, group, aggregation): (n,)}`` against known noise; a baseline has two empty strings.

    Intervals are bootstraps that resample noisy and clean samples apart (:func:`~influence_fast.bootstrap`), with the same
    resamples for every ranking, so that differences are paired. ``accuracy`` gives what retraining without a ranking's
    lowest share reached.

    Raises:
        InputError: no ranking; scores or noise of other shapes or not finite; resamples or levels out of range.
    """
    if not scores:
        raise InputError("scores: expected at least one ranking")
    if resamples < 1 or not 0 < level < 1:
        raise InputError(f"resamples, level: expected at least 1 and a share below 1, got {resamples!r} and {level!r}")
    rankings = {RankingKey(*key): values for key, values in scores.items()}
    _, bad = checked_scores(next(iter(rankings.values())), noise)
    drawn = _draws(bad, resamples, seed)
    resampled = {key: _resampled_auc(*checked_scores(values, noise), drawn) for key, values in rankings.items()}
    n, m, rows_of_fewer = len(bad), int(bad.sum()), smaller(bad)
    ends = ((m + 1) / 2 / (n - m / 2), (n + 1 - (m + 1) / 2) / (n - m / 2))
    by_chance, loss = (n + 1) / (2 * n - m), RankingKey("loss")
    rows = []
    for key, values in rankings.items():
        row: dict[str, float] = {}
        for at in levels:
            row[f"ndr@{100 * at:g}"] = ndr(values, noise, at)
            row[f"precision@{100 * at:g}"] = precision(values, noise, at)
        value = ndr_auc(values, noise)
        low, high = interval(value, resampled[key], ends, rows_of_fewer, level)
        row |= {"auc_ndr": value, "low": low, "high": high, "roc_auc": roc_auc(values, noise)}
        row |= {"over_random_low": low - by_chance, "over_random_high": high - by_chance}
        if loss in resampled:
            over = value - ndr_auc(rankings[loss], noise)
            low, high = interval(over, resampled[key] - resampled[loss], None, rows_of_fewer, level)
            row |= {"over_loss_low": low, "over_loss_high": high}
        rows.append(row)
    index = pd.MultiIndex.from_tuples(list(rankings), names=RankingKey._fields)
    table = pd.DataFrame(rows, index=index)
    found = Evaluation(table, wins(np.stack(list(resampled.values()), 1)), _warnings(table))
    if accuracy:
        reached = {RankingKey(*key): value for key, value in accuracy.items()}
        known = [key for key in rankings if key in reached]
        metrics = [name for name in table if name in ("auc_ndr", "roc_auc") or str(name).startswith("ndr@")]
        accuracies = [reached[key] for key in known]
        found.correlation.update({str(m): rank_correlation(table[m].loc[known].tolist(), accuracies) for m in metrics})
    return found


def _draws(bad: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each sample: ``(resamples, n)``, noisy and clean apart."""
    random = np.random.default_rng(seed)
    out = np.zeros((resamples, len(bad)))
    for stratum in (np.flatnonzero(bad), np.flatnonzero(~bad)):
        out[:, stratum] = random.multinomial(len(stratum), np.full(len(stratum), 1 / len(stratum)), resamples)
    return out


def _resampled_auc(values: np.ndarray, bad: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """AUC_NDR of every resample: a noisy sample at average place r (from 1) adds ``n + 1 - r`` to ``sum_j c_j``."""
    order = np.argsort(values, kind="stable")
    values, drawn = values[order], drawn[:, order]
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    size = np.add.reduceat(drawn, first, axis=1)
    noisy = np.add.reduceat(drawn * bad[order], first, axis=1)
    place = np.cumsum(size, axis=1) - size / 2 + 0.5
    n, m = len(values), bad.sum()
    return (noisy * (n + 1 - place)).sum(1) / m / (n - m / 2)


def _warnings(table: pd.DataFrame) -> list[str]:
    ours = table[table.index.get_level_values("group") != ""]
    out = []
    for rival, column in (("a random order", "over_random_low"), ("the training loss alone", "over_loss_low")):
        worse = [str(RankingKey(*key)) for key in ours.index[ours[column] <= 0]] if column in ours else []
        if worse:
            some = ", ".join(worse[:5]) + (f" and {len(worse) - 5} more" if len(worse) > 5 else "")
            out.append(
                f"Not better than {rival} (the interval of the difference reaches 0): {len(worse)} of {len(ours)} "
                f"rankings: {some}."
            )
    return out
