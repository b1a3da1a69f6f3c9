"""How often 95 % intervals hold the truth, over rankings drawn from a known distribution::

    python -m benchmarks.coverage --draws 2000

Scores of clean samples are standard normal, of noisy ones lower by ``shift``; a second ranking, ``loss``, correlates by 0.5.
The truth of a cell is the mean over its draws. Percentiles of the same resamples stand beside ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks import protocol
from influence_fast.evaluation.comparison import _draws, _resampled_auc
from influence_fast.evaluation.metrics import interval, ndr, ndr_auc, smaller

CELLS = [(n, share, shift) for n, share in ((100, 0.2), (400, 0.2), (400, 0.05)) for shift in (0.5, 1.5, 2.5)]
AT = 0.3


@click.command()
@click.option("--draws", default=2000, show_default=True)
@click.option("--resamples", default=200, show_default=True, help="As `compare` has it.")
@click.option(
    "--cells", default=",".join(map(str, range(len(CELLS)))), show_default=True, help="Numbers of the cells to run."
)
@protocol.out_option("Cells that are there stay.")
def main(draws: int, resamples: int, cells: str, out: Path | None) -> None:
    """Coverage of the intervals of AUC_NDR, of NDR@30 and of the difference of two AUC_NDR."""
    target = protocol.result_file(out or protocol.RESULTS, "coverage")
    there = protocol.previous(target, "coverage")
    settings = {"draws": draws, "resamples": resamples}
    found = there.get("cells", []) if there.get("settings") == settings else []
    with protocol.Progress() as progress, protocol.Results(target, protocol.header("coverage")) as results:
        results.add(settings=settings)
        for n, share, shift in (CELLS[int(number)] for number in cells.split(",")):
            if any((cell["n"], cell["share"], cell["shift"]) == (n, share, shift) for cell in found):
                continue
            with progress.step(f"n {n}, {share:.0%} noisy, shift {shift:g}"):
                found.append({"n": n, "share": share, "shift": shift, **coverage(n, share, shift, draws, resamples)})
                results.add(cells=found)
    for cell in found:
        shown = {name: cell[name] for name in ("auc_ndr", "ndr@30", "over_loss")}
        click.echo(f"n {cell['n']}, {cell['share']:.0%} noisy, shift {cell['shift']:g}: {shown}")


def coverage(n: int, share: float, shift: float, draws: int, resamples: int) -> dict[str, Any]:
    """Of each figure: its truth, and how often ours and the percentile interval hold it."""
    random = np.random.default_rng(0)
    bad = np.arange(n) < round(share * n)
    noise, m = torch.from_numpy(bad), int(bad.sum())
    best, worst = (n + 1 - (m + 1) / 2) / (n - m / 2), (m + 1) / 2 / (n - m / 2)
    cut = int(AT * n + 1e-9)
    ends = {
        "auc_ndr": (worst, best),
        "ndr@30": (max(0.0, (cut - (n - m)) / m), min(1.0, cut / m)),
        "over_loss": None,
    }
    values: dict[str, list[float]] = {name: [] for name in ends}
    intervals: dict[str, list[tuple[float, float]]] = {name: [] for name in ends}
    percentiles: dict[str, list[np.ndarray]] = {name: [] for name in ends}
    for draw in range(draws):
        common, own, other = random.normal(size=(3, n)) * 0.5**0.5
        scores, loss = common + own - shift * bad, common + other - 0.8 * shift * bad
        drawn = _draws(bad, resamples, draw)
        auc = [ndr_auc(torch.from_numpy(part), noise) for part in (scores, loss)]
        boot = [_resampled_auc(part, bad, drawn) for part in (scores, loss)]
        figures = {
            "auc_ndr": (auc[0], boot[0]),
            "ndr@30": (ndr(torch.from_numpy(scores), noise, AT), _resampled_ndr(scores, bad, drawn, cut)),
            "over_loss": (auc[0] - auc[1], boot[0] - boot[1]),
        }
        for name, (value, resampled) in figures.items():
            values[name].append(value)
            intervals[name].append(interval(value, resampled, ends[name], smaller(bad), 0.95))
            percentiles[name].append(np.quantile(resampled, [0.025, 0.975]))
    out = {}
    for name, some in values.items():
        truth = float(np.mean(some))
        out[name] = {
            "truth": round(truth, 4),
            "held": float(np.mean([low <= truth <= high for low, high in intervals[name]])),
            "percentile held": float(np.mean([low <= truth <= high for low, high in percentiles[name]])),
            "width": round(float(np.mean([high - low for low, high in intervals[name]])), 4),
        }
    return out


def _resampled_ndr(values: np.ndarray, bad: np.ndarray, drawn: np.ndarray, cut: int) -> np.ndarray:
    """NDR at the first ``cut`` of every resample, for scores without ties; copies of a sample count in part at the cut."""
    order = np.argsort(values)
    drawn = drawn[:, order]
    before = np.cumsum(drawn, 1) - drawn
    return (np.clip(cut - before, 0, drawn) * bad[order]).sum(1) / bad.sum()


if __name__ == "__main__":
    main()
