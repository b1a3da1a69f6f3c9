"""How often a probability of a wrong label is right, and whether the interval for their number holds the truth.

Draws training and trusted rows, flips labels of the training rows, and calibrates as an audit does: over frozen hidden
states of a pretrained encoder (what an adapter's base gives), and over words alone (what an audit has of a model that was
trained as a whole); 10 seeds, two shares of flips::

    python -m benchmarks.calibration --model MODEL_DIR --data sst2/train.jsonl --data cola/train.jsonl --out results.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import influence_fast as inf
from benchmarks import protocol
from influence_fast.attribution.probe import cross_fitted, log_shares
from influence_fast.attribution.representations import neighbour_count, votes_with_queries
from influence_fast.auditing.findings.calibration import calibrate, reliability
from influence_fast.auditing.findings.estimates import word_estimate
from influence_fast.data.label_noise import uniform
from influence_fast.data.loading import read_table
from influence_fast.data.models import load_model
from influence_fast.data.samples import prepare
from influence_fast.data.settings import DataSettings


@click.command()
@click.option("--model", required=True, help="Folder of the pretrained encoder, with its tokenizer.")
@click.option("--data", required=True, multiple=True, help="Rows with a sentence and a right label.")
@protocol.out_option("An earlier result there is replaced.")
@click.option("--samples", default=3000, show_default=True, help="Training rows.")
@click.option("--trusted", default=300, show_default=True, help="Trusted rows.")
@click.option("--flips", default="0.1,0.2", show_default=True, help="Shares of flipped labels, joined by commas.")
@click.option("--seeds", default=10, show_default=True, help="How many draws of rows and flips.")
@protocol.threads_option
def main(
    model: str,
    data: tuple[str, ...],
    out: Path | None,
    samples: int,
    trusted: int,
    flips: str,
    seeds: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    header = {**protocol.header("calibration"), "samples": samples, "trusted": trusted}
    file = protocol.result_file(out, protocol.dated_name(header, "calibration"))
    protocol.previous(file, "calibration")
    with protocol.Results(file, header) as results:
        runs: list[dict[str, Any]] = []
        for run in _runs(model, data, samples, trusted, [float(flip) for flip in flips.split(",")], seeds):
            runs.append(run)
            click.echo(json.dumps(run))
            results.add(summary=_summary(runs), runs=runs)
    for line in _summary(runs):
        click.echo(json.dumps(line))


def _runs(
    model: str, data: Sequence[str], samples: int, trusted: int, flips: Sequence[float], seeds: int
) -> Iterator[dict[str, Any]]:
    for path in data:
        network, tokenizer = load_model(model, "classification", allow_new_weights=True)
        table = read_table("data", path)
        every = prepare(
            "data", table, DataSettings(text="sentence", truncate=True), "classification", network, tokenizer
        )
        # Every seed draws from these.
        pool = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: 2 * (samples + trusted)]
        kept = every.some(pool.tolist())
        states = list(inf.hidden_states(network, kept.rows).values())
        wide = torch.cat(states, 1)
        for seed in range(seeds):
            random = torch.Generator().manual_seed(seed)
            drawn = torch.randperm(len(kept), generator=random)[: samples + trusted]
            rows, asked = drawn[:samples], drawn[samples:]
            labels = torch.tensor([kept.rows[i]["labels"] for i in drawn.tolist()])
            for flip in flips:
                flipped, wrong = uniform(labels[:samples].tolist(), flip, 2, seed)
                given, right = torch.tensor(flipped), labels[samples:]
                begin = time.perf_counter()
                parts = [kept.some(part.tolist()).rows for part in (rows, asked)]
                estimates: dict[str, Any] = {"words": word_estimate(parts[0], parts[1], given, 2)}
                probe = cross_fitted(wide[rows].numpy(), given, wide[asked].numpy(), 2, query_labels=right)
                estimates["probe"] = probe.train, probe.by_fold
                last, k = states[-1], neighbour_count(samples)
                (votes,) = votes_with_queries(last[rows], given, last[asked], right, (k,), 2)
                estimates["neighbours"] = tuple(map(log_shares, votes))
                for name, used in (("states and words", list(estimates)), ("words", ["words"])):
                    sides = [{one: estimates[one][side] for one in used} for side in (0, 1)]
                    found = calibrate(sides[0], given, sides[1], right)
                    if found is None:
                        click.echo(f"{name}, seed {seed}: the estimates tell nothing apart", err=True)
                        continue
                    said, truth = found.wrong.numpy(), wrong.numpy()
                    number = int(wrong.sum())
                    yield {
                        "data": Path(path).parent.name, "estimates": name, "seed": seed, "flipped": flip,
                        "wrong": number, "estimate": found.share * samples,
                        "low": found.low * samples, "high": found.high * samples,
                        "covered": found.low * samples <= number <= found.high * samples,
                        "ece": reliability(said, truth.astype(float), np.ones(samples))[1],
                        "ece_trusted": found.error, "auc": float(roc_auc_score(truth, said)),
                        "seconds": time.perf_counter() - begin,
                    }  # fmt: skip


def _summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for key in dict.fromkeys((run["data"], run["estimates"], run["flipped"]) for run in runs):
        mine = [run for run in runs if (run["data"], run["estimates"], run["flipped"]) == key]
        mean = {name: float(np.mean([run[name] for run in mine])) for name in ("estimate", "low", "high", "ece", "auc")}
        out.append(
            {
                **dict(zip(("data", "estimates", "flipped"), key, strict=True)),
                "wrong": mine[0]["wrong"],
                **mean,
                "worst_ece": max(run["ece"] for run in mine),
                "covered": sum(run["covered"] for run in mine),
                "seeds": len(mine),
            }
        )
    return out


if __name__ == "__main__":
    main()
