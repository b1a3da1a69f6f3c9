"""Hold an audit with whole gradients against the plain loop: one sample at a time, ``autograd.grad``, and the definitions.

    python -m benchmarks.naive --model run/adapter --train run/train.jsonl --queries run/queries.jsonl \\
        --text-column sentence --audit run/audit

Prints the largest relative difference, over layers, of gradients and of every influence, and that of ``mean``, ``rank`` and
``vote`` over all layers and queries; exits with 1 where one exceeds 1e-4.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import click
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from influence_fast.data.models import load_model

FRACTION, TOLERANCE = 0.2, 1e-4


def gradients(
    model: nn.Module, tokenizer: Any, rows: Iterable[dict[str, Any]], text: str, layers: list[str]
) -> list[Tensor]:
    """``(n, weights)`` of every layer."""
    modules = dict(model.named_modules())
    weights = [cast(Tensor, modules[name].weight) for name in layers]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    found = []
    for row in rows:
        logits = model(**tokenizer(row[text], return_tensors="pt")).logits
        loss = nn.functional.cross_entropy(logits, torch.tensor([row["label"]]))
        found.append([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


def influence(method: str, g: Tensor, v: Tensor) -> Tensor:
    """The definition, in float64, with all training samples' products in memory."""
    g, v = g.double(), v.double()
    dot = v @ g.T
    if method == "dot":
        return dot
    if method == "cosine":
        return dot / (v.norm(dim=1)[:, None] * g.norm(dim=1))
    sqnorm = g.square().sum(1)
    damping = sqnorm.sum() / (10 * len(g) * g.shape[1])
    return (dot - (dot / (damping + sqnorm)) @ (g @ g.T) / len(g)) / damping


def aggregate(method: str, layers: list[Tensor]) -> Tensor:
    if method == "mean":
        return torch.stack([layer.mean(0) for layer in layers]).mean(0)
    ranks = torch.stack([torch.from_numpy(rankdata(layer.numpy(), axis=1)) - 1 for layer in layers]).flatten(0, 1)
    k = round(FRACTION * ranks.shape[1])
    return ranks.mean(0) if method == "rank" else -(k - ranks).clamp_min(0).sum(0)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@click.command()
@click.option("--model", required=True)
@click.option("--train", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--queries", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--text-column", default="text")
@click.option("--audit", type=click.Path(path_type=Path, exists=True), required=True, help="Its --out folder.")
@protocol.out_option("An earlier result there is replaced.")
@protocol.json_option
def main(
    model: str, train: Path, queries: Path, text_column: str, audit: Path, out: Path | None, as_json: bool
) -> None:
    """Compare an audit's stores, influence and scores with a naive loop."""
    header = protocol.header("naive")
    file = protocol.result_file(out, protocol.dated_name(header, "naive"))
    protocol.previous(file, "naive")
    stores = [inf.GradientStore.open(audit / "stores" / name) for name in ("train", "queries")]
    network, tokenizer = load_model(model)
    layers, naive, loop = stores[0].layers, [], 0.0
    methods = ("dot", "cosine", "datainf")
    with protocol.Results(file, header) as results, protocol.Progress(2 + len(methods)) as progress:
        for path in (train, queries):
            name, begin = f"gradients of {path.name}, one by one", time.perf_counter()
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            with progress.step(name):
                naive.append(gradients(network.eval(), tokenizer, progress.each(rows, name), text_column, layers))
            loop += time.perf_counter() - begin
        worst = [
            difference(store.read(name), found)
            for store, of_store in zip(stores, naive, strict=True)
            for name, found in zip(layers, of_store, strict=True)
        ]
        found: dict[str, dict[str, float]] = {}
        results.add(gradients=max(worst), loop_samples_per_s=sum(len(store) for store in stores) / loop, methods=found)
        for method in methods:
            with progress.step(method):
                matrix = inf.influence(stores[0], stores[1], method)
                expected = [influence(method, g, v) for g, v in zip(naive[0], naive[1], strict=True)]
                pairs = zip(layers, expected, strict=True)
                found[method] = {"influence": max(difference(matrix.layer(name), e) for name, e in pairs)}
                for name in ("mean", "rank", "vote"):
                    ours = inf.aggregate(matrix, name, fraction=FRACTION)
                    found[method][name] = difference(ours, aggregate(name, expected))
            worst += found[method].values()
            results.add(methods=found)
    protocol.show(results.document, as_json, show)
    sys.exit(int(max(worst) > TOLERANCE))


def show(document: dict[str, Any]) -> None:
    click.echo(f"gradients: {document['gradients']:.1e} (the loop: {document['loop_samples_per_s']:.1f} samples/s)")
    for method, found in document["methods"].items():
        click.echo(f"{method}: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))


if __name__ == "__main__":
    main()
