"""Which kind of finding a row is, and the sentence that says why."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.auditing.findings.finding import Finding

#: A label is held wrong from this probability on, and right up to that one.
WRONG, RIGHT = 0.5, 0.2
# Robust standard deviations below the middle at which a row is far from its neighbours; the share that can be.
_FAR, _FAR_SHARE = 4.0, 0.02
# Standard errors below zero at which the mean influence on a group is harm.
_HARM = 3.0


def far_away(similarity: Tensor) -> Tensor:
    """Which rows are unusually far from their nearest neighbours, boolean ``(n,)``.

    By the median and the median distance from it, since rows that are far would stretch a standard deviation; 2 % at most.
    """
    middle = similarity.median()
    spread = 1.4826 * (similarity - middle).abs().median()
    lowest = torch.zeros(len(similarity), dtype=torch.bool)
    lowest[similarity.argsort(stable=True)[: int(_FAR_SHARE * len(similarity))]] = True
    return lowest & (middle - similarity > _FAR * spread) & (spread > 0)


def hurt_groups(influence: Tensor, groups: list[str]) -> list[str | None]:
    """Of each row the one group of queries that it hurts while it helps the others on the whole; None where there is none.

    A row hurts a group where its mean influence on it is three standard errors below zero.

    Args:
        influence: ``(rows, queries)``.
        groups: of each query.
    """
    names = sorted(set(groups))
    if len(names) < 2:
        return [None] * len(influence)
    of = torch.tensor([names.index(group) for group in groups])
    means, harmed = [], []
    for number in range(len(names)):
        part = influence[:, of == number].double()
        mean = part.mean(1)
        error = part.std(1) / part.shape[1] ** 0.5 if part.shape[1] > 1 else torch.full_like(mean, torch.inf)
        means.append(mean)
        harmed.append(mean < -_HARM * error)
    mean, harm = torch.stack(means, 1), torch.stack(harmed, 1)
    alone = (harm.sum(1) == 1) & ((mean < 0).sum(1) == 1)
    return [names[int(harm[i].long().argmax())] if bool(alone[i]) else None for i in range(len(influence))]


def name_kind(finding: Finding, other_labels: int, far: bool, group: str | None, rare: bool) -> None:
    """Give a finding its kind and reason: the first that holds, the most serious first.

    Args:
        finding: with labels, probabilities and duplicates.
        other_labels: how many of its duplicates have another label.
        far: from all other rows.
        group: the one group of queries that it hurts.
        rare: the model or its neighbours say another label.
    """
    wrong, copies = finding.wrong_probability, len(finding.duplicates)
    better = finding.suggested_label is not None and finding.suggested_label != finding.given_label
    copied = f"; {other_labels} of its {copies} duplicates {_have(other_labels)} another label" if other_labels else ""
    if wrong is not None and wrong >= WRONG:
        what = f", {finding.suggested_label} fits better" if better else ""
        _set(finding, "wrong label", f"The label is wrong with a probability of {wrong:.0%}{what}{copied}.")
    elif wrong is None and better and finding.label_probability is not None and finding.label_probability < WRONG:
        said = f"The label looks wrong, {finding.suggested_label} fits better (not calibrated){copied}."
        _set(finding, "wrong label", said)
    elif other_labels:
        said = f"{other_labels} of its {copies} duplicates {_have(other_labels)} another label."
        _set(finding, "conflicting duplicate", said)
    elif group is not None:
        _set(finding, "hurts one group", f"It hurts the queries of the group {group} and no other.")
    elif far:
        _set(finding, "far from everything", "No other training row is like it.")
    elif copies:
        more = "another row" if copies == 1 else f"{copies} other rows"
        _set(finding, "duplicate", f"It is the same as {more}, or nearly so.")
    elif wrong is not None and wrong <= RIGHT and rare:
        said = "The model or its neighbours say another label, but it is wrong with a probability of only"
        _set(finding, "atypical but right", f"{said} {wrong:.0%}.")
    else:
        _set(finding, "unremarkable", "Nothing stands out.")


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _set(finding: Finding, kind: str, reason: str) -> None:
    finding.kind, finding.reason = kind, reason
