"""Stores of factors beside sketches of as many bytes: how close their inner products come to the exact ones.

Fine-tunes all of an encoder's weights on labels of which a fifth are flipped, takes the exact influence of the samples on
the queries from whole gradients that are never formed, and the same from stores of several kinds::

    python -m benchmarks.factors --model MODEL_DIR --train sst2/train.jsonl --queries sst2/validation.jsonl

Kinds stand in groups of equal bytes a row and layer. Of each it prints the correlation of all inner products with the exact
ones and the share of the exact best 10 of a query that are found (recall@10), mean over layers and lowest of a layer.
Queries are projected and not factored, as a search has them.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from benchmarks.default_projection import encoder_options, trained
from influence_fast.data.samples import Samples
from influence_fast.gradients.build import gradients_of

# Numbers a row and layer -> projection and factors.
KINDS: dict[int, tuple[tuple[str, int | None], ...]] = {
    32: (("rademacher:16x16", 1), ("rademacher:4x8", None), ("sjlt:32", None)),
    64: (("rademacher:32x32", 1), ("rademacher:16x16", 2), ("rademacher:8x8", None), ("sjlt:64", None)),
    128: (("rademacher:64x64", 1), ("rademacher:32x32", 2), ("rademacher:8x16", None), ("sjlt:128", None)),
    256: (("rademacher:128x128", 1), ("rademacher:64x64", 2), ("rademacher:16x16", None), ("sjlt:256", None)),
    768: (("rademacher:128x128", 3), ("rademacher:24x32", None), ("sjlt:768", None)),
}
BEST = 10


@click.command()
@encoder_options(48)
@click.option("--layers", default="attention", show_default=True, help="Layers whose gradients are kept.")
@click.option("--numbers", default=",".join(map(str, KINDS)), help="Numbers a row and layer, joined by commas.")
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
    layers: str,
    seed: int,
    numbers: str,
    threads: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure stores of factors and of sketches on a fully trained encoder."""
    torch.set_num_threads(threads)
    header = protocol.header("factors")
    header |= {"model": Path(model).name, "samples": samples, "queries": query_samples, "epochs": epochs, "seed": seed}
    file = protocol.result_file(out, protocol.dated_name(header, "factors", f"seed{seed}"))
    protocol.previous(file, "factors")
    wanted = [int(number) for number in numbers.split(",")]
    with (
        protocol.Results(file, header) as results,
        protocol.Progress(epochs + 1 + sum(len(KINDS[number]) for number in wanted)) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        given = (train, samples), (queries, query_samples)
        network, rows, trusted, _ = trained(model, *given, epochs, 0.2, seed, progress)
        names = inf.select_layers(network, layers)
        with progress.step("exact influence"):
            exact = inf.exact_influence(network, rows.rows, trusted.rows, names, ["dot"], progress=False)["dot"]
        found: list[dict[str, Any]] = []
        results.add(layers=names, kinds=found)
        for number in wanted:
            for projection, factors in KINDS[number]:
                with progress.step(f"{projection} factors={factors}"):
                    one = measured(network, rows, trusted, names, projection, factors, exact, Path(folder))
                found.append({"numbers": number, "projection": projection, "factors": factors, **one})
                results.add(kinds=found)
    protocol.show(results.document, as_json, show)


def measured(
    network: nn.Module,
    rows: Samples,
    trusted: Samples,
    names: list[str],
    projection: str,
    factors: int | None,
    exact: dict[str, Tensor],
    folder: Path,
) -> dict[str, Any]:
    """One kind of store, layer by layer."""
    place = folder / f"{projection.replace(':', '-')}-{factors}"
    begin = time.perf_counter()
    store = inf.build_store(place, network, rows.rows, names, projection, factors=factors, verify=False, progress=False)
    seconds = time.perf_counter() - begin
    asked = gradients_of(network, trusted.rows, names, projection)
    matrix = inf.influence(store, asked, "dot")
    layers = {name: compared(matrix.layer(name), exact[name]) for name in names}
    kept = store.factors * (store.outs[names[0]] + store.dims[names[0]] // store.outs[names[0]]) if factors else 0
    return {
        "bytes": 4 * (kept or store.dims[names[0]]),
        "seconds": seconds,
        **{key: summed([one[key] for one in layers.values()]) for key in ("correlation", "recall")},
        "layers": layers,
    }


def summed(values: list[float]) -> dict[str, float]:
    """Over layers."""
    return {"mean": sum(values) / len(values), "lowest": min(values)}


def compared(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Correlation of all inner products, and the share of each query's best that is found."""
    pair = torch.stack([found.double().flatten(), exact.double().flatten()])
    hits = [
        len(set(mine.tolist()) & set(true.tolist())) / BEST
        for mine, true in zip(found.topk(BEST).indices, exact.topk(BEST).indices, strict=True)
    ]
    return {"correlation": float(torch.corrcoef(pair)[0, 1]), "recall": sum(hits) / len(hits)}


def show(document: dict[str, Any]) -> None:
    """The table on standard output."""
    click.echo(
        f"{'bytes':>6} {'projection':<20} {'factors':>7} {'correlation':>12} {'lowest':>7} {'recall@10':>10} {'lowest':>7}"
    )
    for one in document["kinds"]:
        click.echo(
            f"{one['bytes']:>6} {one['projection']:<20} {one['factors'] or '-':>7} {one['correlation']['mean']:>12.3f} "
            f"{one['correlation']['lowest']:>7.3f} {one['recall']['mean']:>10.3f} {one['recall']['lowest']:>7.3f}"
        )


if __name__ == "__main__":
    main()
