"""What a store keeps of a gradient in so many bytes: how close inner products come to the exact ones.

An encoder is fine-tuned, all of it, on labels of which a fifth are flipped; or a small Llama on word problems with their
reasons. The exact influence of the samples on the queries is taken from whole gradients that are never formed, and the same
from what stores of several kinds keep::

    python -m benchmarks.factors encoder --model MODEL_DIR --train sst2/train.jsonl --queries sst2/validation.jsonl
    python -m benchmarks.factors causal --data DATA_DIR
    python -m benchmarks.factors search --model MODEL_DIR --train sst2/train.jsonl --queries sst2/validation.jsonl

Kinds stand in groups of about equal bytes a row and layer: sketches and two-sided projections, as float32 or rounded,
and factors of larger ones. Of each it prints the correlation of all inner products with the exact ones and the share of
the exact best 10 of a query that are found (recall@10), mean over layers and lowest of a layer. Queries are projected
and not factored or rounded, as a search has them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from benchmarks.default_projection import encoder_options, trained
from benchmarks.generative import read
from benchmarks.paper_tasks import bpe, prompted
from benchmarks.training import causal_model
from influence_fast.gradients.block_scales import BITS, packed, unpacked
from influence_fast.gradients.factored_layers import factored_layers
from influence_fast.gradients.job import prepare_job
from influence_fast.gradients.model_state import as_evaluated
from influence_fast.gradients.row_factors import as_factors, products
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.shard import DTYPES, row_bytes
from influence_fast.gradients.store_writer import StoreWriter, scaled

BEST = 10
TASK = "math_with_reason"


@dataclass(frozen=True)
class Kind:
    """A projection, how many factors are kept of it, and as what numbers."""

    group: int
    projection: str
    factors: int | None = None
    dtype: str = "float32"


def _kinds() -> list[Kind]:
    found = []
    for group, sides, narrow, quarter, factors in (
        (128, "4x8", "8x16", "16x16", (("16x16", 1, "float32"), ("64x64", 1, "int8_block"), ("64x64", 2, "int4"))),
        (512, "8x16", "16x32", "32x32", (("64x64", 1, "float32"), ("64x64", 4, "int8_block"), ("64x64", 8, "int4"))),
        (2048, "16x32", "32x64", "64x64", (("64x64", 4, "float32"), ("64x64", 16, "int8_block"))),
    ):
        found += [Kind(group, f"rademacher:{size}", count, dtype) for size, count, dtype in factors]
        for kind in ("rademacher", "sjlt"):
            for size, dtype in ((sides, "float32"), (narrow, "int8"), (narrow, "int8_block"), (quarter, "int4")):
                out, in_ = map(int, size.split("x"))
                found.append(Kind(group, f"{kind}:{size if kind == 'rademacher' else out * in_}", None, dtype))
    return found


# Gradients of a small model's layers need no projection before they are factored.
UNPROJECTED = [
    Kind(128, "identity", 1, "int4"),
    Kind(512, "identity", 1, "int8_block"),
    Kind(512, "identity", 3, "int4"),
]
UNPROJECTED += [Kind(2048, "identity", 1), Kind(2048, "identity", 5, "int8_block"), Kind(2048, "identity", 10, "int4")]
# Nor do those of an encoder's attention, whose factors are larger.
WIDER = [
    Kind(512, "identity", 1, "int4"),
    Kind(2048, "identity", 2, "int8_block"),
    Kind(2048, "identity", 4, "int4"),
    Kind(16384, "identity", 16, "int8_block"),
    Kind(16384, "identity", 32, "int4"),
    Kind(16384, "sjlt:16384", None, "int8"),
]


@click.group()
def main() -> None:
    """Measure what stores keep of gradients."""


@main.command()
@encoder_options(48)
@click.option("--layers", default="attention", show_default=True, help="Layers whose gradients are kept.")
@click.option(
    "--groups", default="128,512,2048,16384", show_default=True, help="Bytes a row and layer, joined by commas."
)
@protocol.threads_option
@protocol.out_option("An earlier result there is replaced.")
@protocol.json_option
def encoder(
    model: str,
    train: str,
    queries: str,
    samples: int,
    query_samples: int,
    epochs: int,
    layers: str,
    seed: int,
    groups: str,
    threads: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Of a fully trained encoder."""
    torch.set_num_threads(threads)
    header = protocol.header("factors")
    header |= {"model": Path(model).name, "samples": samples, "queries": query_samples, "epochs": epochs, "seed": seed}
    chosen = [kind for kind in [*WIDER, *_kinds()] if str(kind.group) in groups.split(",")]
    with _results(out, header, "encoder") as results, protocol.Progress() as progress:
        given = (train, samples), (queries, query_samples)
        network, rows, trusted, _ = trained(model, *given, epochs, 0.2, seed, progress)
        measure(network, rows.rows, trusted.rows, inf.select_layers(network, layers), chosen, results, progress)
    protocol.show(results.document, as_json, show)


@main.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help=f"Folder that holds {TASK}/.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("factors-runs"), help="Epochs of the training.")
@click.option("--samples", default=300, show_default=True, help="Training rows whose gradients are kept.")
@click.option("--query-samples", default=48, show_default=True, help="Queries.")
@click.option("--epochs", default=4, show_default=True, help="Epochs of the training, on all rows of the data set.")
@click.option("--seed", default=0, show_default=True, help="Seed of the model and of the draws.")
@click.option("--layers", default="attention,mlp", show_default=True, help="Layers whose gradients are kept.")
@click.option("--groups", default="128,512,2048", show_default=True, help="Bytes a row and layer, joined by commas.")
@protocol.threads_option
@protocol.out_option("An earlier result there is replaced.")
@protocol.json_option
def causal(
    data: Path,
    work: Path,
    samples: int,
    query_samples: int,
    epochs: int,
    seed: int,
    layers: str,
    groups: str,
    threads: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Of a small Llama that is trained from nothing."""
    torch.set_num_threads(threads)
    header = protocol.header("factors")
    header |= {"model": "llama", "samples": samples, "queries": query_samples, "epochs": epochs, "seed": seed}
    chosen = [kind for kind in [*UNPROJECTED, *_kinds()] if str(kind.group) in groups.split(",")]
    with _results(out, header, "llama") as results, protocol.Progress() as progress:
        tables = read(data, TASK)
        tokenizer = bpe([row["prompt"] + row["target"] for row in tables["train"]])
        every, asked = ([prompted(tokenizer, row["prompt"], row["target"]) for row in side] for side in tables.values())
        work.mkdir(parents=True, exist_ok=True)
        settings = {"epochs": epochs}
        file = work / f"llama-seed{seed}.pt"
        network, losses = causal_model(tokenizer.get_vocab_size(), every, file, progress, seed, settings)
        results.add(loss=losses)
        random = torch.Generator().manual_seed(seed)
        parts = [
            [side[i] for i in torch.randperm(len(side), generator=random)[:count].tolist()]
            for side, count in ((every, samples), (asked, query_samples))
        ]
        measure(network, parts[0], parts[1], inf.select_layers(network, layers), chosen, results, progress)
    protocol.show(results.document, as_json, show)


@main.command()
@encoder_options(16)
@click.option("--layers", default="attention", show_default=True, help="Layers whose gradients are kept.")
@click.option("--projection", default="rademacher:64x64", show_default=True)
@protocol.threads_option
@protocol.out_option("An earlier result there is replaced.")
@protocol.json_option
def search(
    model: str,
    train: str,
    queries: str,
    samples: int,
    query_samples: int,
    epochs: int,
    layers: str,
    projection: str,
    seed: int,
    threads: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Exact search over factors of an encoder: what the bound leaves unread, beside an index of what they stand for."""
    torch.set_num_threads(threads)
    header = protocol.header("factors")
    header |= {"model": Path(model).name, "samples": samples, "queries": query_samples, "epochs": epochs, "seed": seed}
    with (
        _results(out, header | {"projection": projection}, "search") as results,
        protocol.Progress() as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        given = (train, samples), (queries, query_samples)
        network, rows, trusted, _ = trained(model, *given, epochs, 0.2, seed, progress)
        names = inf.select_layers(network, layers)
        with progress.step("gradients"):
            asked = gradients(network, trusted.rows, names, projection)
            whole = inf.build_store(
                Path(folder) / "whole", network, rows.rows, names, projection, verify=False, progress=False
            )
        found: list[dict[str, Any]] = []
        results.add(layers=names, searches=found)
        for factors, dtype in ((1, "float32"), (None, "float32"), (2, "int8_block"), (2, "int4")):
            with progress.step(f"factors={factors} {dtype}"):
                store = _as_kept(Path(folder) / f"{factors}-{dtype}", whole, factors, dtype)
                for metric in ("dot", "cosine"):
                    one = searched(store, asked, metric)
                    found.append({"factors": factors, "dtype": dtype, "metric": metric, **one})
                results.add(searches=found)
    protocol.show(results.document, as_json, show_searches)


def _as_kept(place: Path, whole: inf.GradientStore, factors: int | None, dtype: str) -> inf.GradientStore:
    """The rows of a store of whole gradients, kept in another way."""
    outs = factored_layers(whole.meta["projection"], whole.shapes, whole.dims, factors) if factors else {}
    told = {**whole._described(), "dtype": dtype, "factors": factors, "outs": outs}
    with StoreWriter.create(place, **told) as writer:
        for shard in writer.missing:
            span = writer.span(shard)
            writer.write(shard, {name: whole.read(name, slice(span.start, span.stop)) for name in whole.layers}, {})
    return inf.GradientStore.open(place)


def searched(store: inf.GradientStore, queries: Mapping[str, Tensor], metric: str) -> dict[str, Any]:
    """The best rows by an exact index, held against float64 sums over all rows."""
    index = inf.InfluenceIndex.build(store, "Flat", metric)
    scored: list[int] = []
    rows, check = index._rows, index._rows.check

    def counted(layers: Sequence[str], numbers: Any) -> None:
        scored.append(len(numbers))
        check(layers, numbers)

    rows.check = counted  # type: ignore[method-assign]
    found: Any = index.search(queries, BEST)[1]
    scores_read = sum(scored)
    rows.check = check  # type: ignore[method-assign]
    one = {name: part[:1] for name, part in queries.items()}
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        index.search(one, BEST)
        seconds.append(time.perf_counter() - begin)
    exact = torch.zeros(len(found), len(store), dtype=torch.float64)
    lengths = torch.zeros(len(store), dtype=torch.float64)
    for name in store.layers:
        values = store.read(name).double()
        exact += queries[name].double() @ values.T
        lengths += values.square().sum(1)
    if metric == "cosine":
        exact /= lengths.sqrt()
    best = exact.topk(BEST).indices
    return {
        "index_bytes_a_row": index.nbytes / len(store),
        "scored_share": scores_read / (len(found) * len(store)),
        "same_ids": float((found == best).double().mean()),
        "one_query_seconds": min(seconds),
    }


def show_searches(document: Mapping[str, Any]) -> None:
    """The table on standard output."""
    click.echo(
        f"{'factors':>7} {'dtype':<11} {'metric':<7} {'bytes a row':>12} {'rows scored':>12} {'same ids':>9} {'ms':>8}"
    )
    for one in document["searches"]:
        click.echo(
            f"{one['factors'] or '-':>7} {one['dtype']:<11} {one['metric']:<7} {one['index_bytes_a_row']:>12,.0f} "
            f"{one['scored_share']:>12.2%} {one['same_ids']:>9.3f} {1000 * one['one_query_seconds']:>8.1f}"
        )


def _results(out: Path | None, header: dict[str, Any], name: str) -> protocol.Results:
    file = protocol.result_file(out, protocol.dated_name(header, "factors", name, f"seed{header['seed']}"))
    protocol.previous(file, "factors")
    return protocol.Results(file, header)


def measure(
    network: nn.Module,
    rows: Sequence[Any],
    queries: Sequence[Any],
    names: list[str],
    kinds: Sequence[Kind],
    results: protocol.Results,
    progress: protocol.Progress,
) -> None:
    """All kinds, those of one projection from one pass over the model."""
    with progress.step("exact influence"):
        exact = inf.exact_influence(network, rows, queries, names, ["dot"], progress=False)["dot"]
    found: list[dict[str, Any]] = []
    results.add(layers=names, kinds=found)
    for projection in dict.fromkeys(kind.projection for kind in kinds):
        mine = [kind for kind in kinds if kind.projection == projection]
        with progress.step(projection):
            begin = time.perf_counter()
            asked, given = (gradients(network, part, names, projection) for part in (queries, rows))
            captured = time.perf_counter() - begin
            weights: dict[str, Any] = {name: network.get_submodule(name).weight for name in names}
            shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
            most = max((kind.factors or 0 for kind in mine), default=0)
            outs = factored_layers(projection, shapes, {n: g.shape[1] for n, g in given.items()}, 1) if most else {}
            begin = time.perf_counter()
            factored = {name: as_factors(given[name], outs[name], most) for name in outs}
            decomposed = time.perf_counter() - begin
            for kind in mine:
                layers = {}
                sizes = []
                for name in names:
                    read_back, size = kept(given[name], factored.get(name), outs.get(name, 0), most, kind)
                    layers[name] = compared(asked[name] @ read_back.T, exact[name])
                    sizes.append(size)
                found.append(
                    {
                        **vars(kind),
                        "bytes": sum(sizes) / len(sizes),
                        "capture_seconds": captured,
                        "factor_seconds": decomposed if kind.factors else 0.0,
                        **{key: summed([one[key] for one in layers.values()]) for key in ("correlation", "recall")},
                        "layers": layers,
                    }
                )
        found.sort(key=lambda one: one["group"])
        results.add(kinds=found)


def gradients(network: nn.Module, rows: Sequence[Any], names: list[str], projection: str) -> dict[str, Tensor]:
    """What a store would be given, of rows whose capture was not verified."""
    settings = BuildSettings(names, inf.Projection.parse(projection), verify=False)
    job = prepare_job(network, rows, settings)
    with as_evaluated(network), job.capture:
        return job.compute(range(len(rows))).gradients


def kept(values: Tensor, factored: Tensor | None, out: int, most: int, kind: Kind) -> tuple[Tensor, int]:
    """What a store of this kind reads of gradients ``values``, and the bytes of a row, its squared length aside.

    ``factored`` holds their ``most`` factors, with ``out`` numbers of the outputs' side.
    """
    stored = values
    if kind.factors is not None and factored is not None:
        left, right = factored.split([most * out, factored.shape[1] - most * out], 1)
        inner = right.shape[1] // most
        stored = torch.cat([left[:, : kind.factors * out], right[:, : kind.factors * inner]], 1)
    numbers = stored.shape[1]
    if kind.dtype in BITS:
        stored = unpacked(*packed(stored, BITS[kind.dtype]), numbers, BITS[kind.dtype])
    elif kind.dtype == "int8":
        scale, codes = scaled(stored, DTYPES["int8"])
        stored = codes.float() * scale[:, None]
    if kind.factors is not None:
        stored = products(stored, out, kind.factors)
    return stored, row_bytes(kind.dtype, numbers) - 8


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


def show(document: Mapping[str, Any]) -> None:
    """The table on standard output."""
    click.echo(
        f"{'bytes':>6} {'projection':<20} {'factors':>7} {'dtype':<11} {'correlation':>12} {'lowest':>7} "
        f"{'recall@10':>10} {'lowest':>7}"
    )
    for one in document["kinds"]:
        click.echo(
            f"{one['bytes']:>6.0f} {one['projection']:<20} {one['factors'] or '-':>7} {one['dtype']:<11} "
            f"{one['correlation']['mean']:>12.3f} {one['correlation']['lowest']:>7.3f} {one['recall']['mean']:>10.3f} "
            f"{one['recall']['lowest']:>7.3f}"
        )


if __name__ == "__main__":
    main()
