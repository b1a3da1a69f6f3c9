"""Rankings compared on the same resamples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from scipy.stats import t

import influence_fast as inf


def tied(n: int, seed: int, levels: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, generator=random) < 0.25
    return torch.randint(levels, (n,), generator=random).double() - noise.double(), noise


def test_intervals_are_those_of_literal_resamples_and_differences_are_paired() -> None:
    scores, noise = tied(40, 0)
    other = scores + torch.randn(40, generator=torch.Generator().manual_seed(1)).double().round()
    found = inf.compare({("a", "all", "mean"): scores, ("loss", "", ""): other}, noise, resamples=50, seed=3)
    random = np.random.default_rng(3)
    drawn = np.zeros((50, 40), dtype=int)
    for stratum in (np.flatnonzero(noise), np.flatnonzero(~noise)):
        drawn[:, stratum] = random.multinomial(len(stratum), np.full(len(stratum), 1 / len(stratum)), 50)
    literal = np.array([[inf.ndr_auc(v.repeat_interleave(torch.from_numpy(d)), noise.repeat_interleave(torch.from_numpy(d)))
                         for v in (scores, other)] for d in drawn])  # fmt: skip
    row = found.rows[0]
    # Student's t with one less than the fewer of noisy and clean, a little wider; of one figure on the scale of log-odds.
    m = int(noise.sum())
    scale = t.ppf(0.975, m - 1) * np.sqrt((m + 5) / (m - 1))
    worst, best = (inf.ndr_auc(order, noise) for order in (noise.double(), -noise.double()))
    share = (row["auc_ndr"] - worst) / (best - worst)
    width = scale * literal[:, 0].std(ddof=1) / (best - worst) / (share * (1 - share))
    bounds = worst + (best - worst) * expit(logit(share) + width * np.array([-1, 1]))
    np.testing.assert_allclose([row["low"], row["high"]], bounds)
    by_chance = 41 / (80 - m)
    np.testing.assert_allclose(row["over_random"], bounds - by_chance)
    half = scale * (literal[:, 0] - literal[:, 1]).std(ddof=1)
    apart = inf.ndr_auc(scores, noise) - inf.ndr_auc(other, noise)
    np.testing.assert_allclose(row["over_loss"], [apart - half, apart + half])
    np.testing.assert_allclose(
        found.wins[0, 1], np.mean((literal[:, 0] > literal[:, 1]) + 0.5 * (literal[:, 0] == literal[:, 1]))
    )
    assert found.wins.diagonal().tolist() == [0.5, 0.5]


def test_errors_of_the_table() -> None:
    scores, noise = tied(20, 0)
    with pytest.raises(inf.InputError, match="at least one ranking"):
        inf.compare({}, noise)
    with pytest.raises(inf.InputError, match="resamples, level"):
        inf.compare({("a", "", ""): scores}, noise, resamples=0)
    with pytest.raises(inf.InputError, match="one length"):
        inf.rank_correlation([1, 2], [1])
    with pytest.raises(inf.InputError, match=r"\(repeats, cells\)"):
        inf.wins(torch.zeros(3))
