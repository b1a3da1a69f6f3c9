"""The paper's protocol on real data, resumable: flips, fine-tuning, every ranking, filter and retrain (arXiv 2511.04715).

One run is one task and one seed. A text-classification run flips a share of the training labels, trains LoRA matrices and
the head of a pretrained encoder, takes gradients at the epoch that a held-out split likes best, ranks the samples by every
layer group, method and aggregation, drops the lowest 30 % and trains again from the same start. The arms' epochs are chosen
on that split too; the accuracy reported is of a third. A generative run trains a small causal model from nothing and asks
whether influence finds training samples of a query's class::

    python -m benchmarks.paper --task sst2 --seeds 3 --model MODEL_DIR --data DATA_DIR
    python -m benchmarks.paper --tables

Every step is kept in ``--work``; ``--seconds`` stops before a step that would pass it, and the same command goes on
there. A run is one JSON file in ``--out``, which grows with every ranking and arm and is marked partial until the last;
``--tables`` makes ``README.md`` and the plots there from the finished ones alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from benchmarks.paper_tables import write_tables
from benchmarks.paper_tasks import (
    AGGREGATIONS,
    ARMS,
    CLASSIFICATION,
    DROP,
    GENERATIVE,
    METHODS,
    USUAL,
    bpe,
    encoded,
    make_split,
    prompted,
    run_name,
)
from benchmarks.training import causal_model, encoder, load_weights, train_epochs
from influence_fast import ops
from influence_fast.attribution.aggregation import aggregated
from influence_fast.attribution.model_passes import layers_with_factors
from influence_fast.attribution.representations import neighbour_count
from influence_fast.auditing.findings.duplicates import copies_among
from influence_fast.auditing.run import default_layers, groups_of, method_inputs
from influence_fast.data import label_noise as noises
from influence_fast.data.samples import Samples
from influence_fast.evaluation.rankings import baselines
from influence_fast.evaluation.rivals import FOLDS, label_quality, label_rivals, out_of_fold
from influence_fast.training.recorded import RecordedTraining

Scores = dict[tuple[str, str, str], Tensor]
LOSS = ("loss", "", "")
# Fixed, so that a run goes on after the default has changed.
_SHARD_ROWS = 1024


@click.command()
@click.option("--task", type=click.Choice([*CLASSIFICATION, *GENERATIVE]))
@click.option("--seeds", default=1, help="Number of runs, one seed each.")
@click.option(
    "--first-seed", default=0, show_default=True, help="Seed of the first run: several machines share the work."
)
@click.option("--model", help="Folder of the pretrained encoder (classification).")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of the data sets, one folder each.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("paper-runs"), help="Steps of unfinished runs.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=protocol.RESULTS / "paper",
    help="Folder of the runs' JSON files, or the file of one run. A finished run is left as it is, a partial one goes on.",
)
@click.option("--samples", default=4500)
@click.option("--query-samples", default=500)
@click.option("--flip", default=USUAL["flip"])
@click.option("--noise", "kind", default="uniform", type=click.Choice([k for k in noises.KINDS if k != "answers"]))
@click.option("--epochs", default=3)
@click.option("--lr", default=USUAL["lr"])
@click.option("--arms", default=",".join(ARMS), help="Rankings to retrain after, joined by commas.")
@click.option("--folds", default=0, help="Models to fine-tune for cleanlab's probabilities out of fold; 0 for none.")
@click.option("--checkpoints/--no-checkpoints", default=True, help="TracInCP over all epochs.")
@protocol.seconds_option
@click.option("--tables", is_flag=True, help="Make tables and plots of the results there are.")
def main(
    task: str | None,
    seeds: int,
    first_seed: int,
    work: Path,
    out: Path,
    seconds: float,
    tables: bool,
    **settings: Any,
) -> None:
    """Run the protocol for a task, or make the tables of what was run."""
    if tables:
        write_tables(out)
        return
    if task is None or settings["data"] is None:
        raise click.UsageError("--task and --data are needed (or --tables).")
    if task in CLASSIFICATION and settings["model"] is None:
        raise click.UsageError("--model is needed for a classification task.")
    if seeds > 1 and (out.is_file() or out.suffix == ".json"):
        raise click.UsageError(f"--out: {out} holds one run; expected a folder for --seeds {seeds}")
    run = classification_run if task in CLASSIFICATION else generative_run
    with protocol.Progress(seconds=seconds) as progress:
        for seed in range(first_seed, first_seed + seeds):
            name = run_name(task, seed, settings)
            target = protocol.result_file(out, name)
            there = protocol.previous(target, "paper")
            if there and run_name(there["task"], there["seed"], there["settings"]) != name:
                raise click.UsageError(f"--out: {target} holds another run than {name}")
            if there and "partial" not in there:
                click.echo(f"{target} is there")
                continue
            try:
                with protocol.Results(target, _header(task, seed, settings)) as results:
                    run(task, seed, work / name, progress, settings, results)
            except protocol.OutOfTime as error:
                click.echo(f"{name}: out of time before the next {error}; the same command goes on")
                raise SystemExit(3) from None
            click.echo(f"wrote {target}")


def _header(task: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    given = ("epochs",) if task in GENERATIVE else [name for name in settings if name not in ("model", "data")]
    return {
        "benchmark": "paper",
        "task": task,
        "seed": seed,
        "settings": {name: settings[name] for name in given},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": inf.__version__,
    }


def classification_run(
    task: str,
    seed: int,
    work: Path,
    progress: protocol.Progress,
    settings: dict[str, Any],
    results: protocol.Results,
) -> None:
    """One task and seed from raw text to rankings and the accuracy without their lowest."""
    work.mkdir(parents=True, exist_ok=True)
    split = protocol.kept(work / "split.pt", lambda: make_split(task, seed, settings))
    make = lambda: encoder(settings["model"], seed)  # noqa: E731
    rows = {name: encoded(settings["model"], part) for name, part in split.items()}
    # As an audit does: of a copy of a training row everything knows the label from there.
    flat = {name: [row["input_ids"] for row in rows[name]] for name in ("train", "queries")}
    copies = set(copies_among(flat["queries"], flat["train"]))
    rows["queries"] = [row for i, row in enumerate(rows["queries"]) if i not in copies]
    noise = torch.tensor([row["noise"] for row in split["train"]])
    fit = lambda arm, chosen: train_epochs(make, rows, chosen, work / f"fit-{arm}.pt", progress, seed, settings)  # noqa: E731
    base = fit("all", list(range(len(noise))))
    best = max(range(len(base["epochs"])), key=lambda epoch: base["epochs"][epoch]["selection"])
    arms: dict[str, dict[str, Any]] = {"all": arm_of(base["epochs"], len(noise))}
    results.add(
        sizes={name: len(part) for name, part in rows.items()},
        noisy=int(noise.sum()),
        chosen_epoch=best,
        random_auc_ndr=(len(noise) + 1) / (2 * len(noise) - int(noise.sum())),
        arms=arms,
    )
    model = make()
    load_weights(model, base["weights"][best])
    layers = layers_with_factors(model, inf.select_layers(model, default_layers(model)))
    middle = [name for name in inf.select_layers(model, "attention[middle]") if name in set(layers)]
    groups = {**groups_of(model, layers), "attention middle": middle}
    seconds: dict[str, float] = {"seconds": base["seconds"]}
    stores = _stores(work / "stores", model, rows, layers, progress, seconds)
    by_layer = inf.cancellation(stores[0])
    cancellation = {group: float(np.mean([by_layer[name] for name in names])) for group, names in groups.items()}
    results.add(cancellation=cancellation, seconds=seconds)

    scores: Scores = {}
    table: list[dict[str, Any]] = []
    losses, margins = torch.stack(base["seen"], 1)
    recorded = RecordedTraining(losses, margins, torch.full((len(losses),), torch.nan))
    for found in rankings(
        model, base["weights"], best, recorded, rows, stores, groups, work, progress, seed, settings, seconds
    ):
        scores |= found
        # Every call draws the same resamples, so a row is what it would be were all rankings compared at once.
        table += inf.compare({**found, LOSS: scores[LOSS]}, noise).rows[: len(found)]
        results.add(rows=table)

    wanted = {name: scores[ARMS[name]] for name in settings["arms"].split(",") if name and ARMS[name] in scores}
    for name, kept in (kept_rows(wanted, noise, seed) if wanted else {}).items():
        arms[name] = arm_of(fit(name.replace(" ", "-"), kept)["epochs"], len(kept))
        arms[name]["noise_left"] = float(noise[kept].double().mean())
        results.add(arms=arms)


def rankings(
    model: nn.Module,
    weights: list[dict[str, Tensor]],
    best: int,
    recorded: RecordedTraining,
    rows: dict[str, list[dict[str, Any]]],
    stores: list[inf.GradientStore],
    groups: dict[str, list[str]],
    work: Path,
    progress: protocol.Progress,
    seed: int,
    settings: dict[str, Any],
    seconds: dict[str, float],
) -> Iterator[Scores]:
    """``{(method, group, aggregation): scores}``, the baselines first, then by method; ``seconds`` learns what each took."""
    samples, trusted = (Samples(rows[name], None, None, None, None) for name in ("train", "queries"))
    build = inf.BuildSettings(stores[0].layers, inf.Projection("identity"), "classification")
    inputs = method_inputs(model, samples, trusted, stores[0], stores[1], work, build, METHODS)
    scores: Scores = {
        (name, "", ""): values for name, values in (baselines(stores[0], seed) | recorded.scores()).items()
    }
    labels = [row["labels"] for row in rows["train"]]
    states = inputs.passes.hidden_states(inputs.samples, "mean", base=True)
    every, last = torch.cat(list(states.values()), 1), list(states)[-1]
    agreement = inf.neighbours({last: states[last]}, labels, neighbour_count(len(labels)))[last][0]
    probe = inf.probe_estimate(every, labels, every[:1])[0]
    scores |= {(name, "", ""): values for name, values in label_rivals(labels, agreement, probe).items()}
    if settings.get("folds"):
        probabilities = protocol.kept(work / "folds.pt", lambda: folded(rows, work, progress, seed, settings))
        scores[(FOLDS, "", "")] = label_quality(labels, probabilities)
    yield dict(scores)

    def scored(method: str, matrix: Any) -> Scores:
        path = work / f"scores-{method}.pt"
        if not path.exists():
            with progress.step(f"scores of {method}", "scores"):
                protocol.save(
                    path, {(g, a): values for g, a, values in aggregated(matrix(), AGGREGATIONS, groups, 0.2)}
                )
        found = {(method, *cell): values for cell, values in protocol.load(path).items()}
        scores.update(found)
        return found

    for method in METHODS:
        begin = time.monotonic()
        found = scored(method, lambda m=method: inputs.influence(m))
        seconds.setdefault(method, time.monotonic() - begin)
        yield found
    if settings["checkpoints"]:
        matrices = []
        for epoch, values in enumerate(weights):
            load_weights(model, values)
            folder = work / f"stores-{epoch}"
            at = stores if epoch == best else _stores(folder, model, rows, stores[0].layers, progress, seconds)
            matrices.append(inf.influence(at[0], at[1], "dot"))
        yield scored("tracincp", lambda: inf.Checkpoints(matrices))
    for method in ("cosine", "trackstar", "contrast-dot"):
        cells = [(group, aggregation) for group in groups for aggregation in AGGREGATIONS]
        voters = {cell: torch.stack([scores[(method, *cell)], scores[LOSS]]) for cell in cells}
        yield {(f"{method}+loss", *cell): ops.rank(two.float()).double().mean(0) for cell, two in voters.items()}


def folded(
    rows: dict[str, list[dict[str, Any]]], work: Path, progress: protocol.Progress, seed: int, settings: dict[str, Any]
) -> Tensor:
    """Log-probabilities of the training samples by models that were fine-tuned without them, each at its best epoch."""
    make, fold = lambda: encoder(settings["model"], seed), iter(range(settings["folds"]))

    def predict(learned: Tensor, left: Tensor) -> Tensor:
        state = train_epochs(make, rows, learned.tolist(), work / f"fit-fold{next(fold)}.pt", progress, seed, settings)
        best = max(range(len(state["epochs"])), key=lambda epoch: state["epochs"][epoch]["selection"])
        model = make()
        load_weights(model, state["weights"][best])
        return inf.class_log_probabilities(model, [rows["train"][i] for i in left.tolist()], progress=False)

    return out_of_fold(predict, [row["labels"] for row in rows["train"]], settings["folds"], seed)


def _stores(
    folder: Path,
    model: nn.Module,
    rows: dict[str, Any],
    layers: list[str],
    progress: protocol.Progress,
    seconds: dict[str, float],
) -> list[inf.GradientStore]:
    out = []
    for name in ("train", "queries"):
        begin = time.monotonic()
        with progress.step(f"{folder.name}: gradients of {name}", "capture"):
            out.append(inf.build_store(folder / name, model, rows[name], layers, "identity", shard_rows=_SHARD_ROWS))
        seconds.setdefault(f"gradients of {name}", time.monotonic() - begin)
    return out


def kept_rows(scores: dict[str, Tensor], noise: Tensor, seed: int) -> dict[str, list[int]]:
    """What each arm trains on: all but its lowest 30 %; ``random`` and ``oracle`` beside."""
    kept: dict[str, list[int]] = {}

    def train(rows: Tensor) -> list[tuple[float, float]]:
        kept[str(len(kept))] = rows.tolist()
        return [(0.0, 0.0)]

    arms = inf.filter_and_retrain(train, scores, noise, drop=DROP, seed=seed)
    return {name: arm.rows.tolist() for name, arm in arms.items() if name != "all"}


def arm_of(epochs: list[dict[str, float]], rows: int) -> dict[str, Any]:
    best = max(range(len(epochs)), key=lambda epoch: epochs[epoch]["selection"])
    return {"rows": rows, "epoch": best, "accuracy": epochs[best]["test"], "epochs": epochs}


def generative_run(
    task: str,
    seed: int,
    work: Path,
    progress: protocol.Progress,
    settings: dict[str, Any],
    results: protocol.Results,
) -> None:
    """ROC-AUC and recall@90 of finding training samples of a query's class, by layer, on a small model trained here."""
    work.mkdir(parents=True, exist_ok=True)
    folder, answer = Path(settings["data"]) / task, GENERATIVE[task]
    raw = {
        side: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for side, name in (("train", "train"), ("queries", "test"))
    }
    tokenizer = bpe([f"{row['prompt']}{row[answer]}" for row in raw["train"]])
    rows = {side: [prompted(tokenizer, row["prompt"], str(row[answer])) for row in part] for side, part in raw.items()}
    classes = {side: torch.tensor([row["class_id"] for row in part]) for side, part in raw.items()}
    vocabulary = tokenizer.get_vocab_size()
    model, history = causal_model(vocabulary, rows["train"], work / "model.pt", progress, seed, settings)
    layers, projection = inf.select_layers(model, "embedding,attention,mlp,head"), "rademacher:16x16"
    results.add(
        settings={"epochs": len(history), "projection": projection},
        sizes={name: len(part) for name, part in rows.items()},
        model={"weights": sum(p.numel() for p in model.parameters()), "vocabulary": vocabulary},
        loss=history,
    )
    stores = []
    for name in ("train", "queries"):
        with progress.step(f"gradients of {name}", "capture"):
            stores.append(inf.build_store(work / name, model, rows[name], layers, projection))
    same = classes["queries"][:, None] == classes["train"][None]
    table: list[dict[str, Any]] = []
    for method in ("dot", "cosine", "datainf", "trackstar", "repsim"):
        with progress.step(f"relevance by {method}", "scores"):
            if method == "repsim":
                states = [inf.hidden_states(model, rows[name], "last", progress=False) for name in ("train", "queries")]
                matrix = inf.influence(states[0], states[1], "cosine")
            else:
                matrix = inf.influence(stores[0], stores[1], method)
            values = {name: matrix.layer(name) for name in matrix.layers}
            # Layers have scales of their own: their sum over "all" is of ranks.
            values["all (ranks)"] = sum(
                (ops.rank(value) for value in values.values()), torch.zeros(len(same), same.shape[1])
            )
            table += [{"method": method, "layer": name, **relevance(value, same)} for name, value in values.items()]
        results.add(relevance=table)


def relevance(influence: Tensor, same: Tensor, k: int = 90) -> dict[str, float]:
    """Mean over queries of ROC-AUC and of recall among the ``k`` most helpful, a sample of the query's class being right."""
    right = same.numpy()
    positive, negative = right.sum(1), (~right).sum(1)
    # The Mann-Whitney count; ties share their ranks.
    ranks = (rankdata(influence.double().numpy(), axis=1) * right).sum(1)
    aucs = (ranks - positive * (positive + 1) / 2) / (positive * negative)
    top = influence.topk(min(k, influence.shape[1]), dim=1).indices
    recall = same.gather(1, top).sum(1).double() / same.sum(1)
    return {"roc_auc": float(np.mean(aucs)), f"recall@{k}": float(recall.mean()), "sd_roc_auc": float(np.std(aucs))}


if __name__ == "__main__":
    main()
