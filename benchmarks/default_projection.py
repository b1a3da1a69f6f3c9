"""Which projection a model that was trained as a whole gets by default: rankings of projected gradients beside exact ones.

Fine-tunes all of an encoder's weights on labels of which a fifth are flipped, takes the exact influence of the samples on
the queries from whole gradients that are never formed, and the same from stores of several projections::

    python -m benchmarks.default_projection --model MODEL_DIR --train sst2/train.jsonl --queries sst2/validation.jsonl

Of each it prints what a store of 5,452 rows takes, how its ranking correlates with the exact one (Spearman, of scores by
``rank`` over all layers), how much of the lowest 30 % both agree on, and how well it finds the flips (AUC_NDR).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from benchmarks.training import BATCH, one_epoch
from influence_fast.data.batching import collate
from influence_fast.data.loading import read_table
from influence_fast.data.samples import Samples, prepare
from influence_fast.data.settings import DataSettings
from influence_fast.gradients.default_projection import numbers
from influence_fast.gradients.layers import default_layers

PROJECTIONS = (
    "rademacher:4x4",
    "rademacher:8x8",
    "rademacher:16x16",
    "rademacher:32x32",
    "sjlt:16",
    "sjlt:64",
    "sjlt:256",
    "sjlt:4096",
)
METHODS = ("dot", "cosine")
LOWEST = 0.3
# Rows of the question set that first filled a disk.
ROWS = 5452


def encoder_options(query_samples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options of an encoder that is fine-tuned by :func:`trained`, and of its rows."""
    options = [
        click.option("--model", required=True, help="Folder of the pretrained encoder, with its tokenizer."),
        click.option("--train", required=True, help="Rows with a label to draw the training set from."),
        click.option("--queries", required=True, help="Rows with a label to draw the queries from."),
        click.option("--samples", default=600, show_default=True, help="Training samples."),
        click.option("--query-samples", default=query_samples, show_default=True, help="Queries."),
        click.option("--epochs", default=2, show_default=True, help="Epochs of the fine-tuning."),
        click.option("--seed", default=0, show_default=True, help="Seed of the draw, the flips and the head."),
    ]

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@encoder_options(64)
@click.option("--flip", default=0.2, show_default=True, help="Share of the training labels that are flipped.")
@click.option("--projections", default=",".join(PROJECTIONS), help="Which to measure, joined by commas.")
@protocol.threads_option
@protocol.out_option("An earlier result there is replaced.")
@protocol.json_option
def main(
    model: str,
    train: str,
    queries: str,
    samples: int,
    query_samples: int,
    epochs: int,
    flip: float,
    seed: int,
    projections: str,
    threads: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure projections on a fully trained encoder."""
    torch.set_num_threads(threads)
    header = protocol.header("default_projection")
    header |= {"model": Path(model).name, "samples": samples, "queries": query_samples, "epochs": epochs, "seed": seed}
    file = protocol.result_file(out, protocol.dated_name(header, "default-projection", f"seed{seed}"))
    protocol.previous(file, "default_projection")
    chosen = projections.split(",")
    with (
        protocol.Results(file, header) as results,
        protocol.Progress(epochs + 1 + len(chosen)) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        network, rows, trusted, noise = trained(
            model, (train, samples), (queries, query_samples), epochs, flip, seed, progress
        )
        layers = inf.select_layers(network, default_layers(network))
        with progress.step("exact influence"):
            exact = inf.exact_influence(network, rows.rows, trusted.rows, layers, METHODS, progress=False)
        truth = {method: inf.aggregate(exact[method], "rank") for method in METHODS}
        whole = sum(numbers(network, layers, inf.Projection("identity")).values())
        found: dict[str, Any] = {
            "identity": {
                "bytes": 4 * whole * ROWS,
                **{method: of(truth[method], truth[method], noise) for method in METHODS},
            }
        }
        results.add(layers=len(layers), projections=found)
        for projection in chosen:
            with progress.step(projection):
                found[projection] = measured(network, rows, trusted, layers, projection, truth, noise, Path(folder))
            results.add(projections=found)
    protocol.show(results.document, as_json, show)


def trained(
    folder: str,
    train: tuple[str, int],
    queries: tuple[str, int],
    epochs: int,
    flip: float,
    seed: int,
    progress: protocol.Progress,
) -> tuple[nn.Module, Samples, Samples, Tensor]:
    """The encoder with all its weights trained on flipped labels, its samples and queries, and which were flipped.

    ``train`` and ``queries`` are files and how many of their rows are drawn.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.set_verbosity_error()
    torch.manual_seed(seed)
    network: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    random = torch.Generator().manual_seed(seed)
    parts = []
    for argument, (source, count) in (("train", train), ("queries", queries)):
        table = read_table(argument, source)
        drawn = [table.rows[i] for i in torch.randperm(len(table), generator=random)[:count].tolist()]
        parts.append(prepare(argument, drawn, DataSettings(truncate=True), "classification", network, tokenizer))
    noise = torch.zeros(len(parts[0]), dtype=torch.bool)
    noise[torch.randperm(len(noise), generator=random)[: round(flip * len(noise))]] = True
    for row, bad in zip(parts[0].rows, noise.tolist(), strict=True):
        row["labels"] ^= int(bad)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-5)

    def loss(chosen: list[int]) -> Tensor:
        batch = collate([parts[0].rows[i] for i in chosen], network)
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(network(**batch).logits, labels)

    for epoch in range(1, epochs + 1):
        name = f"epoch {epoch} of {epochs}"
        with progress.step(name):
            network.train()
            order = torch.randperm(len(noise), generator=random).tolist()
            batches = [order[begin : begin + BATCH] for begin in range(0, len(order), BATCH)]
            one_epoch(progress.each(batches, name), loss, optimizer)
    return network.eval(), parts[0], parts[1], noise


def measured(
    network: nn.Module,
    rows: Samples,
    trusted: Samples,
    layers: list[str],
    projection: str,
    truth: dict[str, Tensor],
    noise: Tensor,
    folder: Path,
) -> dict[str, Any]:
    """Size, time and fidelity of one projection."""
    begin = time.perf_counter()
    stores = [
        inf.build_store(folder / projection / name, network, part.rows, layers, projection, progress=False)
        for name, part in (("train", rows), ("queries", trusted))
    ]
    seconds = time.perf_counter() - begin
    out: dict[str, Any] = {"bytes": 4 * sum(stores[0].dims.values()) * ROWS, "seconds": seconds}
    for method in METHODS:
        out[method] = of(inf.aggregate(inf.influence(stores[0], stores[1], method), "rank"), truth[method], noise)
    return out


def of(scores: Tensor, truth: Tensor, noise: Tensor) -> dict[str, float]:
    """How scores compare with the exact ones, and how well they find what was flipped."""
    lowest = [set(each.argsort(stable=True)[: int(LOWEST * len(each))].tolist()) for each in (scores, truth)]
    return {
        "spearman": float(spearmanr(scores, truth).statistic),
        "overlap": len(lowest[0] & lowest[1]) / max(1, len(lowest[0])),
        "auc_ndr": float(inf.ndr_auc(scores, noise)),
    }


def show(document: dict[str, Any]) -> None:
    click.echo(f"{document['samples']} samples, {document['queries']} queries, {document['layers']} layers")
    head = "".join(f"{f'{method} rho':>13}{'overlap':>9}{'AUC':>7}" for method in METHODS)
    click.echo(f"{'projection':<18}{f'{ROWS:,} rows':>12}{head}")
    for name, row in document["projections"].items():
        cells = "".join(
            f"{row[m]['spearman']:>13.3f}{row[m]['overlap']:>9.3f}{row[m]['auc_ndr']:>7.3f}" for m in METHODS
        )
        click.echo(f"{name:<18}{row['bytes'] / 2**20:>8,.0f} MiB" + cells)


if __name__ == "__main__":
    main()
