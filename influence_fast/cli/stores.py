"""``build``, ``index`` and ``search``."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from influence_fast.cli.options import (
    DATA,
    Command,
    chosen_loss,
    example,
    json_option,
    model_options,
    names,
    print_document,
    print_table,
    read_samples,
    say,
    token_count,
    verify_option,
)
from influence_fast.errors import InputError

HELD_OUT = "held-out"


class Damping(click.ParamType):
    """A number, or ``held-out``."""

    name = "float or held-out"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        return value if value == HELD_OUT else click.FLOAT.convert(value, param, ctx)


@click.command(
    cls=Command,
    epilog=example(
        "influence-fast build --model my-model --data train.jsonl --projection rademacher:16x16 --out store"
    ),
)
@click.option("--model", required=True, help="Folder of a model or a PEFT adapter, or a hub name.")
@click.option("--data", required=True, multiple=True, help=DATA)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the store.")
@model_options
@click.option("--strict", is_flag=True, help="Refuse where a layer needs a slower way to be captured rightly.")
@click.option("--dry-run", is_flag=True, help="Run a few batches and say what the build would take; write nothing.")
@click.option(
    "--adam",
    type=click.Path(path_type=Path),
    help="Checkpoint folder of a Trainer, with optimizer.pt: keep Adam's updates, the training gradients of LESS.",
)
@click.option(
    "--factors", type=int, help="Keep each layer's gradient as so many outer products, which takes less space."
)
@click.option("--append", is_flag=True, help="Add the rows behind those of the store, with its layers and projection.")
@verify_option
@json_option
def build(
    model: str,
    data: tuple[str, ...],
    out: Path,
    dry_run: bool,
    append: bool,
    adam: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write per-sample gradients of a data set to a store; goes on where it stopped.

    Runs on the GPU if there is one. Several processes share the work, on folders that all of them see:
    torchrun --nproc-per-node 2 -m influence_fast build ...
    """
    from influence_fast import _distributed as processes
    from influence_fast.data.remembered import remember
    from influence_fast.gradients.build import append_store, build_store
    from influence_fast.gradients.default_projection import default_projection
    from influence_fast.gradients.estimate import estimate_build
    from influence_fast.gradients.layers import default_layers, select_layers

    if append:
        _check_append(dry_run)
    if dry_run and options["factors"] is not None:
        raise click.UsageError("--factors: not with --dry-run, which estimates stores of whole rows.")
    network, samples, settings, tokenizer = read_samples("data", data, model, options)
    options |= {"truncate": settings.truncate, "loss": chosen_loss(options, samples.task)}
    if append:
        with processes.joined() as device:
            rank, _ = processes.here()
            network.to(device)
            given = {name: options[name] for name in ("loss", "strict")}
            tokens = token_count(options["batch_tokens"])
            names = samples.ids
            store = append_store(
                out, network, samples.rows, ids=names, tokenizer=tokenizer, batch_tokens=tokens, **given
            )
        if rank == 0:
            _show_store(store, out, as_json)
        return
    options["layers"] = select_layers(network, options["layers"] or default_layers(network))
    if options["projection"] == "auto":
        options["projection"] = default_projection(network, options["layers"])
    options["batch_tokens"] = token_count(options["batch_tokens"])
    states = None
    if adam is not None:
        from influence_fast.training.adam import read_adam

        states = read_adam(adam, network, options["layers"])
    with processes.joined() as device:
        rank, world = processes.here()
        network.to(device)
        if dry_run:
            for name in ("strict", "factors"):
                options.pop(name)
            found = estimate_build(network, samples.rows, ids=samples.ids, **options)
            if rank == 0:
                print_document(dataclasses.asdict(found), as_json, lambda: _show_estimate(found, world))
            return
        store = build_store(out, network, samples.rows, ids=samples.ids, tokenizer=tokenizer, adam=states, **options)
    if rank == 0:
        remember(out, data, settings, samples.task)
        _show_store(store, out, as_json)


def _show_store(store: Any, out: Path, as_json: bool) -> None:
    size = sum(shard["bytes"] for shard in store.meta["shards"])
    document = {"path": str(out), "rows": len(store), "layers": store.layers, "dims": store.dims, "bytes": size}
    print_document(document, as_json, lambda: say(f"{store}\n{size / 2**20:.1f} MiB in {out}"))


def _check_append(dry_run: bool) -> None:
    """UsageError for what a store has settled."""
    context = click.get_current_context()
    own = ("adam", "factors", "layers", "projection", "dtype", "precision", "truncate")
    given = [
        f"--{name}" for name in own if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given or dry_run:
        raise click.UsageError(f"{given[0] if given else '--dry-run'}: not with --append, the store has settled that.")


def _show_estimate(found: Any, world: int) -> None:
    rows = [
        ["rows", f"{found.rows:,} in {found.batches:,} batches"],
        ["samples/s", f"{found.samples_per_s:,.1f}" + (f" by each of {world} processes" if world > 1 else "")],
        ["time", f"{found.seconds / world:,.0f} s"],
        ["disk", f"{found.disk_bytes / 2**20:,.1f} MiB"],
        ["memory", f"{found.memory_bytes / 2**20:,.0f} MiB" + (" in each process" if world > 1 else "")],
    ]
    if found.device_bytes:
        rows.append(["GPU memory", f"{found.device_bytes / 2**20:,.0f} MiB"])
    print_table(["what", "estimate"], rows)


@click.command(cls=Command, epilog=example("influence-fast index store --metric cosine --out store.index"))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the index.")
@click.option("--factory", default="auto", help="Flat (exact), auto, or a FAISS factory string such as IVF256,SQ8.")
@click.option("--metric", default="dot", help="Which influence it serves: dot or cosine.")
@click.option("--layers", help="Names of layers joined by commas; all by default.")
@click.option("--recall", default=0.95, help="Share of the best 10 that an approximate index is to find.")
@click.option("--memory", help="Memory that the index may take, such as 512MiB.")
@click.option("--rows", help="Rows to index, such as 0:500000, for one of several machines.")
@click.option("--update", is_flag=True, help="Bring the index that is there up to date with its store.")
@click.option("--methods", help="Keep what searches by these need: datainf,trak,trackstar,ekfac.")
@click.option(
    "--damping",
    type=Damping(),
    default=0.1,
    help="With --methods: share of the curvature's mean eigenvalue added to each; held-out has rows held out choose that of "
    "each layer for ekfac, and 0.1 for the others.",
)
@click.option("--rank", type=int, help="With --methods: eigenvalues kept of a layer, fewer than its numbers.")
@click.option("--model", help="For ekfac: the model of the store.")
@click.option("--data", multiple=True, help="For ekfac: the training data; by default where they were.")
@verify_option
@json_option
def index(
    store: Path,
    out: Path,
    factory: str,
    metric: str,
    layers: str | None,
    recall: float,
    memory: str | None,
    rows: str | None,
    update: bool,
    methods: str | None,
    damping: float | str,
    rank: int | None,
    model: str | None,
    data: tuple[str, ...],
    as_json: bool,
) -> None:
    """Build an index over a store: exact, or by FAISS; with --update, follow rows that were appended or deleted.

    With --methods the rows are read once more for each, so that search --method reads none of them.
    """
    from influence_fast.gradients.store import GradientStore
    from influence_fast.search.influence_index import InfluenceIndex

    opened = GradientStore.open(store)
    share = None
    if rows is not None:
        ends = rows.split(":")
        if len(ends) != 2 or not all(end.isdigit() for end in ends):
            raise InputError(f"rows: expected a range such as 0:500000, got {rows!r}")
        share = range(int(ends[0]), int(ends[1]))
    if update:
        built = InfluenceIndex.updated(out, opened)
    else:
        built = InfluenceIndex.build(
            opened, factory, metric, names(layers), recall=recall, memory=memory, rows=share, path=out
        )
    for method in names(methods) or []:
        given: dict[str, Any] = {} if damping == HELD_OUT else {"damping": damping}
        if method == "ekfac":
            from influence_fast.attribution.held_out_damping import held_out_damping
            from influence_fast.attribution.model_passes import kronecker_factors

            network, samples = _model_and_rows(built, store, model, data)
            given["factors"] = kronecker_factors(network, samples, built.layers)
            if damping == HELD_OUT:
                given["damping"] = held_out_damping(network, samples, opened, built.layers)
                say("damping: " + ", ".join(f"{name} {share:g}" for name, share in given["damping"].items()), err=True)
        built.add_curvature(method, rank=rank, **given)
    if methods:
        built.save(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    document = {
        "path": str(out),
        "factory": built.factory,
        "metric": built.metric,
        "rows": len(built),
        "recall": built.recall,
        "curvature": built.curvature,
        "bytes": size,
    }
    lines = [str(built)]
    lines += [f"{method}: {_share(built, method)}" for method in built.curvature]
    lines += [f"{size / 2**20:.1f} MiB in {out}"]
    print_document(document, as_json, lambda: say("\n".join(lines)))


def _share(index: Any, method: str) -> str:
    """How much of the curvature an index keeps for a method."""
    kept = index.curvature.get(method) or index.curvature.get("trackstar" if method == "trak" else "", {})
    least = min(kept.values(), default=1.0)
    if least == 1:
        return "the whole curvature"
    return f"{100 * least:.1f} % of the curvature's trace, in the layer with the least"


def _model_and_rows(index: Any, store: Path, model: str | None, data: tuple[str, ...]) -> tuple[Any, Any]:
    from influence_fast.data.loading import read_table
    from influence_fast.data.models import load_model
    from influence_fast.data.remembered import remembered
    from influence_fast.data.samples import prepare, task_of
    from influence_fast.data.settings import DataSettings
    from influence_fast.errors import StoreError
    from influence_fast.gradients.model_state import fingerprint

    known = remembered(store)
    if model is None or (not data and known is None):
        raise click.UsageError("ekfac needs --model, and --data where the store does not remember its data.")
    settings = DataSettings() if known is None else known.settings
    network, tokenizer = load_model(model, "auto" if known is None else known.task)
    if fingerprint(network) != index.meta["model"]:
        raise StoreError(f"model: {model} is another than the index was made with")
    source = list(data) or known.data  # type: ignore[union-attr]
    table = read_table("data", source, settings.split, settings.limit, settings.skip_bad)
    samples = prepare("data", table, settings, task_of("auto", network, table), network, tokenizer)
    return network, samples.rows


@click.command(cls=Command, epilog=example("influence-fast search store.index --queries query-store -k 5 --harmful"))
@click.argument("index", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--queries",
    type=click.Path(path_type=Path),
    help="A store of query gradients; with --model, a file of rows or chats.",
)
@click.option("--model", help="With --text, or --queries of a file: the model of the store.")
@click.option("--text", help="One query text; with --label its class, with --answer the text to predict.")
@click.option("--label", help="Class of --text: a number, or a name that the model knows.")
@click.option("--answer", help="For causal models: what follows --text.")
@click.option("-k", default=10, help="Rows for each query.")
@click.option("--harmful", is_flag=True, help="The most harmful rows instead of the most helpful.")
@click.option(
    "--method",
    type=click.Choice(["dot", "cosine", "datainf", "trak", "trackstar", "ekfac"]),
    help="Which influence, by a Flat index: by default the index's metric. See index --methods.",
)
@click.option("--layers", help="Search by these layers alone, each with a weight if wanted: NAME,NAME=2.")
@click.option("--where", help="Search among rows whose column has a value, such as prediction=1.")
@click.option("--data", multiple=True, help="The training data, whose texts are printed; by default where they were.")
@click.option("--interactive", is_flag=True, help="Ask one question after another, with --model.")
@verify_option
@json_option
def search(
    index: tuple[Path, ...],
    queries: Path | None,
    model: str | None,
    text: str | None,
    label: str | None,
    answer: str | None,
    k: int,
    harmful: bool,
    method: str | None,
    layers: str | None,
    where: str | None,
    data: tuple[str, ...],
    interactive: bool,
    as_json: bool,
) -> None:
    """Find the training samples with the most influence on each query, with their texts and labels.

    INDEX is an index, or a store that is searched as it is.

    Under torchrun each process takes one of as many indexes, and the first prints what all of them found together.
    """
    from influence_fast.data.remembered import remembered
    from influence_fast.data.settings import DataSettings
    from influence_fast.gradients.store import GradientStore
    from influence_fast.serving.lookup import open_index

    if interactive:
        if model is None or len(index) != 1 or any((text, label, answer, as_json, layers, where, harmful)):
            raise click.UsageError(
                "--interactive takes one INDEX and --model, and of the others --queries, --data, -k, --method."
            )
        from influence_fast.cli.questions import ask_on_terminal
        from influence_fast.serving.lookup import Lookup

        ask_on_terminal(Lookup.open(index[0], model, data, None if queries is None else str(queries)), k, method)
        return
    # What is missing is said below, after a missing index.
    stored = queries is not None and not queries.is_file()
    if (queries is None) == (text is None) or (model is None and not stored):
        raise click.UsageError("Give --queries, with --model where they are no store, or --text with --model.")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if len(index) != world:
        raise click.UsageError(f"Give one index for each process: {len(index)} for {world}.")
    loaded, store = open_index(index[rank])
    known = None if store is None or world > 1 else remembered(store)
    gradients: Any
    if stored:
        gradients = GradientStore.open(str(queries))
        names = list(gradients.ids)
    elif queries is not None:
        settings = DataSettings() if known is None else replace(known.settings, noise=None, limit=None, split=None)
        gradients, names = _row_gradients(loaded, str(model), str(queries), settings)
    else:
        gradients, names = _text_gradient(loaded, str(model), str(text), label, answer), [str(text)]
    only = None if where is None else _rows_where(loaded, where)
    options = {"layers": _weighted(layers), "only": only, "method": method}
    if world > 1:
        import torch.distributed as dist

        from influence_fast.search.distributed import search_all

        dist.init_process_group("gloo")
        try:
            scores, found = search_all(loaded, gradients, k, harmful, **options)
        finally:
            dist.destroy_process_group()
        if rank:
            return
    else:
        scores, found = loaded.search(gradients, k, harmful, **options)
    ids = found if isinstance(found, list) else found.tolist()
    shown = _shown(data, known)
    document = []
    for query, row, values in zip(names, ids, scores.tolist(), strict=True):
        effects = ["helpful" if value > 0 else "harmful" if value < 0 else "none" for value in values]
        entry = {"query": query, "ids": row, "scores": values, "effects": effects, "recall": loaded.recall}
        if method is not None:
            entry["method"] = method
        if shown:
            found_texts, found_labels = zip(*(shown.get(str(name), ("", "")) for name in row), strict=True)
            entry |= {"texts": list(found_texts), "labels": list(found_labels)}
        document.append(entry)
    more = ["labels", "texts"] if shown else []
    rows = [
        [
            entry["query"],
            place,
            entry["ids"][place],
            f"{entry['scores'][place]:.6g}",
            entry["effects"][place],
            *(entry[what][place] for what in more),
        ]
        for entry in document
        for place in range(len(entry["ids"]))
    ]
    columns = ["query", "place", "id", "influence", "effect", *(what.removesuffix("s") for what in more)]
    how = "exact" if loaded.factory == "Flat" else f"{loaded.factory}: recall@10 {loaded.recall:.3f} when it was built"
    if method is not None:
        how = f"{method}, {how}" + (f" by {_share(loaded, method)}" if method not in ("dot", "cosine") else "")
    print_document(document, as_json, lambda: print_table(columns, rows, how))


def _shown(data: tuple[str, ...], known: Any) -> dict[str, tuple[str, str]]:
    """Text and label by id: of the data given, or else of those that the store remembers, where they still are."""
    from influence_fast.data.remembered import shown_rows

    if data:
        return shown_rows(list(data), known)
    if known is None:
        return {}
    try:
        return shown_rows(known.data, known)
    except InputError as error:
        say(f"texts are left out: {error} (--data FILE says where the data are)", err=True)
        return {}


def _weighted(layers: str | None) -> Any:
    if not layers or "=" not in layers:
        return names(layers)
    try:
        pairs = [part.rsplit("=", 1) if "=" in part else (part, "1") for part in names(layers) or []]
        return {name: float(weight) for name, weight in pairs}
    except ValueError:
        raise InputError(f"layers: expected NAME or NAME=WEIGHT, joined by commas, got {layers!r}") from None


def _rows_where(index: Any, where: str) -> Any:
    name, _, value = where.partition("=")
    values = index.column(name)
    try:
        wanted = {"true": 1.0, "false": 0.0}.get(value.lower())
        return values == (float(value) if wanted is None else wanted)
    except ValueError:
        raise InputError(f"where: expected COLUMN=NUMBER, got {where!r}") from None


def _text_gradient(index: Any, model: str, text: str, label: str | None, answer: str | None) -> Any:
    """Gradients of one text in the index's layers and projection."""
    from influence_fast.data.settings import DataSettings

    row: dict[str, Any] = {"text": text}
    if label is not None:
        row["label"] = int(label) if label.lstrip("-").isdigit() else label
    if answer is not None:
        row["answer"] = answer
    given = DataSettings(answer=None if answer is None else "answer")
    return _row_gradients(index, model, [row], given, "text")[0]


def _row_gradients(index: Any, model: str, source: Any, given: Any, argument: str = "queries") -> tuple[Any, list[Any]]:
    """Gradients of rows in the index's layers and projection, and the rows' names."""
    from influence_fast.data.loading import read_table
    from influence_fast.data.models import load_model
    from influence_fast.data.samples import prepare, task_of
    from influence_fast.errors import StoreError
    from influence_fast.gradients.build import gradients_of
    from influence_fast.gradients.differences import other_space
    from influence_fast.gradients.identity import identity_of
    from influence_fast.gradients.model_state import fingerprint

    network, tokenizer = load_model(model, "auto")
    if fingerprint(network) != index.meta["model"]:
        raise StoreError(f"model: {model} is another than the index was made with")
    if other := other_space(index.identity, identity_of(network, None, tokenizer)):
        raise StoreError(f"model: {model} computes something else than the index was made with ({other})")
    rows = read_table(argument, source, skip_bad=given.skip_bad)
    samples = prepare(argument, rows, given, task_of("auto", network, rows), network, tokenizer)
    gradients = gradients_of(network, samples.rows, index.layers, index.meta["projection"])
    return gradients, list(range(len(samples)) if samples.ids is None else samples.ids)
