"""Linear datamodeling scores of our methods, resumable: do they foresee what retraining on a part of the rows does?

Three tasks: a network of one hidden layer on scikit-learn's digits, a small GPT-2 on grammars, LoRA matrices of a pretrained
encoder on mrpc. A run trains models on all rows, takes gradients of their layers in whole, scores by every method at one
model, at five epochs of its training and at five models of other seeds, and retrains on random halves of the rows::

    python -m benchmarks.lds --task digits
    python -m benchmarks.lds --task gpt --data DATA_DIR --seconds 600
    python -m benchmarks.lds --task mrpc --data DATA_DIR --model MODEL_DIR
    python -m benchmarks.lds --tables

Scores of other libraries on the same rows and queries join by ``--others FILE.safetensors``, ``{name: (queries, rows)}``,
positive = helpful; ``benchmarks.lds_peers`` makes such a file from ``models.pt`` in ``--work``. The result has the table of
the subsets so far after every 16 of them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from benchmarks.paper_tasks import bpe, encoded, prompted
from benchmarks.training import encoder, load_weights
from influence_fast.data.batching import collate
from influence_fast.gradients import losses as sample_losses

METHODS = ("dot", "cosine", "datainf", "trak", "trackstar", "ekfac")
DAMPED = ("trak", "trackstar", "ekfac")
HELD_OUT, EQUAL = "ekfac (held-out damping)", "ekfac (held-out damping, equal layers)"
# Words in the names of other libraries' methods that do the same.
KINDS = {
    "ekfac": ("ek-fac",),
    HELD_OUT: ("ek-fac",),
    EQUAL: ("ek-fac",),
    "trak": ("trak", "trackstar"),
    "trackstar": ("trak", "trackstar"),
    "datainf": ("datainf",),
}
BATCH, MODELS, STEP = 32, 5, 16
Rows = list[dict[str, Any]]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """Rows, queries, what to train and for how long. ``layers`` are those that influence is taken of."""

    kind: str
    rows: Rows
    queries: Rows
    make: Callable[[], nn.Module]
    layers: str | list[str]
    epochs: int
    lr: float


class Digits(nn.Module):
    """64 intensities from 0 to 16 to ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.hidden(input_ids.to(self.head.weight.dtype) / 16).relu()))


def digits(settings: dict[str, Any]) -> Task:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": pixels[i].astype(int).tolist(), "labels": int(labels[i])} for i in order]
    n, m = settings["samples"] or 400, settings["query_samples"] or 100
    return Task("classification", rows[:n], rows[n : n + m], Digits, ["hidden", "head"], settings["epochs"] or 30, 3e-3)


def gpt(settings: dict[str, Any]) -> Task:
    raw = {name: _read(settings, "grammars", name) for name in ("train", "test")}
    random = torch.Generator().manual_seed(0)
    counts = {"train": settings["samples"] or 500, "test": settings["query_samples"] or 60}
    for name, part in raw.items():
        raw[name] = [part[i] for i in torch.randperm(len(part), generator=random).tolist()[: counts[name]]]
    tokenizer = bpe([f"{row['prompt']}{row['answer']}" for row in raw["train"]], 1000)
    found = {name: [prompted(tokenizer, row["prompt"], row["answer"]) for row in part] for name, part in raw.items()}
    longest = max(len(row["input_ids"]) for part in found.values() for row in part)

    def make() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=tokenizer.get_vocab_size(), n_positions=longest, n_embd=48, n_layer=2, n_head=4,
                bos_token_id=1, eos_token_id=2, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip

    return Task("causal-lm", found["train"], found["test"], make, "attention,mlp", settings["epochs"] or 8, 3e-3)


def mrpc(settings: dict[str, Any]) -> Task:
    if settings["model"] is None:
        raise click.UsageError("--model is needed for mrpc.")
    random = torch.Generator().manual_seed(0)
    parts = []
    for name, count in (("train", settings["samples"] or 1000), ("validation", settings["query_samples"] or 100)):
        raw = _read(settings, "mrpc", name)
        chosen = [raw[i] for i in torch.randperm(len(raw), generator=random).tolist()[:count]]
        texts = [{"text": [row["sentence1"], row["sentence2"]], "label": row["label"]} for row in chosen]
        parts.append(encoded(settings["model"], texts))
    # What a training closes over is part of what it is: other settings, such as the number of subsets, are none of it.
    folder = settings["model"]

    def make() -> nn.Module:
        return encoder(folder, int(torch.randint(2**31, (1,))))

    return Task("classification", parts[0], parts[1], make, "lora,head", settings["epochs"] or 5, 1e-3)


def _read(settings: dict[str, Any], folder: str, name: str) -> Rows:
    lines = (settings["data"] / folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


TASKS = {"digits": digits, "gpt": gpt, "mrpc": mrpc}


@click.command()
@click.option("--task", type=click.Choice(list(TASKS)))
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of the data sets (gpt, mrpc).")
@click.option("--model", help="Folder of the pretrained encoder (mrpc).")
@click.option("--subsets", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Models for each subset.")
@click.option("--samples", type=int, help="Training rows; 400, 500, 1000 by task.")
@click.option("--query-samples", type=int, help="Queries; 100, 60, 100 by task.")
@click.option("--epochs", type=int, help="30, 8, 5 by task.")
@click.option("--dampings", default="0.01,1", show_default=True, help="Tried beside the default of 0.1.")
@click.option("--processes", default=1, show_default=True)
@click.option("--others", type=click.Path(path_type=Path, exists=True), help="Scores of other libraries.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("lds-runs"), help="Steps of unfinished runs.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=protocol.RESULTS / "lds",
    help="Folder of the results; a run there goes on, others stay.",
)
@protocol.seconds_option
@click.option("--tables", is_flag=True, help="Make README.md in --out of the results there are.")
def main(task: str | None, work: Path, out: Path, seconds: float, tables: bool, **settings: Any) -> None:
    """Measure one task, or make the tables of what was measured."""
    if tables:
        write_tables(out)
        return
    if task is None:
        raise click.UsageError("--task is needed (or --tables).")
    if task != "digits" and settings["data"] is None:
        raise click.UsageError("--data is needed for this task.")
    target = protocol.result_file(out, task)
    protocol.previous(target, "lds")
    with protocol.Progress(seconds=seconds) as progress:
        try:
            with protocol.Results(target, protocol.header("lds") | {"task": task}) as results:
                measure(TASKS[task](settings), work / task, progress, settings, results)
        except protocol.OutOfTime as error:
            click.echo(f"{task}: out of time before the next {error}; the same command goes on")
            raise SystemExit(3) from None
    click.echo(f"wrote {target}")


def measure(
    task: Task, work: Path, progress: protocol.Progress, settings: dict[str, Any], results: protocol.Results
) -> None:
    """Scores from models of all rows, then models of random halves; the table grows with them."""
    work.mkdir(parents=True, exist_ok=True)
    sizes = {"rows": len(task.rows), "queries": len(task.queries)}
    training = {"epochs": task.epochs, "lr": task.lr, "batch": BATCH, "repeats": settings["repeats"], "fraction": 0.5}
    results.add(sizes=sizes, training=training, subsets=0)
    scores = all_scores(task, work, progress, settings)
    others: dict[str, Tensor] = {}
    if settings["others"] is not None:
        from safetensors import safe_open

        with safe_open(settings["others"], "pt") as file:
            others = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = file.metadata() or {}
        scores |= others
        results.add(others={name: json.loads(said[name]) for name in ("versions", "not_run") if name in said})
    train, loss = trainer(task), query_losses(task)

    def score(chosen: dict[str, Tensor], subsets: int) -> inf.LDS:
        return inf.lds(
            train, loss, chosen, subsets=subsets, repeats=settings["repeats"], folder=work / "subsets",
            processes=settings["processes"], progress=len(chosen) > 2,
            depends_on={"training": training, "fit": fit, "rows": task.rows, "queries": task.queries},
        )  # fmt: skip

    for subsets in sorted({*range(STEP, settings["subsets"], STEP), settings["subsets"]}):
        with progress.step(f"{subsets} subsets", "subsets"):
            found = score(scores, subsets)
        table = found.table.reset_index().rename(columns={"scores": "name"}).to_dict("records")
        left_out = {name: len(some) for name, some in found.left_out.items() if some}
        results.add(subsets=subsets, table=table, left_out=left_out)
    if others:
        with progress.step("beside other libraries"):
            results.add(pairs=beside(scores, set(others), table, lambda pair: score(pair, settings["subsets"]).table))


def beside(
    scores: dict[str, Tensor],
    others: set[str],
    table: list[dict[Any, Any]],
    measure: Callable[[dict[str, Tensor]], Any],
) -> list[dict[str, Any]]:
    """Ours by their defaults less the best of other libraries, and of those of its own kind, on the same checkpoints."""
    reached = {row["name"]: row["lds"] for row in table}
    out = []
    for name in scores:
        method, _, where = name.rpartition(", ")
        kinds = KINDS.get(method)
        if kinds is None:
            continue
        for kind, part in (("any", ("",)), ("its own", kinds)):
            there = [o for o in others if o.endswith(f", {where}") and any(word in o.lower() for word in part)]
            if there:
                best = max(there, key=lambda other: reached[other])
                # Of two the error of the difference stands in the lesser one's line.
                error = float(measure({name: scores[name], best: scores[best]})["se_best"].max())
                difference = reached[name] - reached[best]
                out.append({"ours": name, "kind": kind, "theirs": best, "difference": difference, "se": error})
    return out


def trainer(task: Task) -> Callable[[Tensor], nn.Module]:
    """``train(rows)`` of a task."""

    def train(rows: Tensor) -> nn.Module:
        return fit(task, rows)[0]

    return train


def query_losses(task: Task) -> Callable[[nn.Module], Tensor]:
    """``losses(model)`` of a task's queries, in evaluation mode."""

    def losses(model: nn.Module) -> Tensor:
        model.eval()
        each = sample_losses.named(task.kind)
        with torch.no_grad():
            parts = [task.queries[i : i + 64] for i in range(0, len(task.queries), 64)]
            return torch.cat([each(model, collate(part, model)) for part in parts])

    return losses


def fit(task: Task, rows: Tensor) -> tuple[nn.Module, list[Weights]]:
    """A model trained on some rows from a fresh start, and its trained weights after each epoch."""
    model = task.make()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=task.lr, weight_decay=0.01)
    steps = task.epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=steps, pct_start=0.1)
    each = sample_losses.named(task.kind)
    history = []
    for _ in range(task.epochs):
        model.train()
        for part in rows[torch.randperm(len(rows))].split(BATCH):
            optimizer.zero_grad()
            each(model, collate([task.rows[i] for i in part.tolist()], model)).mean().backward()
            optimizer.step()
            schedule.step()
        history.append({name: p.detach().clone() for name, p in trained.items()})
    return model.eval(), history


def all_scores(task: Task, work: Path, progress: protocol.Progress, settings: dict[str, Any]) -> dict[str, Tensor]:
    """``{"method, from": (queries, rows)}``, summed over layers: of one model, five epochs of it, and five models."""

    def models() -> list[list[Weights]]:
        out = []
        for seed in range(MODELS):
            torch.manual_seed(seed)
            history = fit(task, torch.arange(len(task.rows)))[1]
            # Of the first model five epochs, evenly spread, the last among them; of the others the last.
            places = [round((i + 1) * len(history) / MODELS) - 1 for i in range(MODELS)] if seed == 0 else [-1]
            out.append([history[place] for place in places])
        return out

    with progress.step("models of all rows", "models"):
        kept = protocol.kept(work / "models.pt", models)
    dampings = [None, *(float(part) for part in settings["dampings"].split(",") if part)]
    by_model: dict[tuple[int, int], dict[str, Tensor]] = {}
    for seed, epochs in enumerate(kept):
        for place, weights in enumerate(epochs):
            with progress.step(f"scores of model {seed + 1}, checkpoint {place + 1}", "scores"):
                make = partial(scores_of, task, seed, weights, dampings)
                by_model[seed, place] = protocol.kept(work / f"scores-{seed}-{place}.pt", make)
        with progress.step(f"held-out damping of model {seed + 1}", "held-out"):
            chosen = protocol.kept(work / f"held-out-{seed}.pt", partial(held_out, task, seed, epochs))
            for place, scores in enumerate(chosen):
                by_model[seed, place] |= scores
    of = checkpoints_of(kept)
    names = list(by_model[0, 0])
    out = {
        f"{n}, {what}": torch.stack([by_model[key][n] for key in keys]).mean(0)
        for n in names
        for what, keys in of.items()
    }
    out["random"] = torch.randn(len(task.queries), len(task.rows), generator=torch.Generator().manual_seed(0))
    if task.kind == "classification":
        # What a score has to beat that says of a row more than its label.
        queries, rows = (torch.tensor([row["labels"] for row in part]) for part in (task.queries, task.rows))
        out["same class"] = (queries[:, None] == rows).float()
    return out


def checkpoints_of(kept: list[list[Weights]]) -> dict[str, list[tuple[int, int]]]:
    """The sets of checkpoints (model, place) that scores are averaged over."""
    last = len(kept[0]) - 1
    return {
        "1 model": [(0, last)],
        f"{len(kept[0])} epochs": [(0, place) for place in range(len(kept[0]))],
        f"{len(kept)} models": [(0, last), *((seed, 0) for seed in range(1, len(kept)))],
    }


def model_at(task: Task, seed: int, weights: Weights) -> nn.Module:
    """The model of a checkpoint, in evaluation mode."""
    torch.manual_seed(seed)
    model = task.make()
    load_weights(model, weights)
    return model.eval()


def scores_of(task: Task, seed: int, weights: Weights, dampings: list[float | None]) -> dict[str, Tensor]:
    """Every method at one checkpoint: float32 ``(queries, rows)``."""
    model = model_at(task, seed, weights)
    layers = layers_of(task, model)
    with tempfile.TemporaryDirectory() as folder:
        stores = stores_of(task, model, layers, Path(folder))
        factors = inf.kronecker_factors(model, task.rows, layers, progress=False)
        out = {}
        for method in METHODS:
            for damping in dampings if method in DAMPED else dampings[:1]:
                matrix = inf.influence(stores[0], stores[1], method, damping=damping or 0.1, factors=factors)
                name = method if damping is None else f"{method} (damping {damping:g})"
                out[name] = matrix.total()
    return out


def held_out(task: Task, seed: int, epochs: list[Weights]) -> list[dict[str, Tensor]]:
    """EK-FAC at checkpoints of one training, by the damping of each layer that rows held out choose at the last of them."""
    damping: dict[str, float] = {}
    out = []
    for weights in reversed(epochs):
        model = model_at(task, seed, weights)
        layers = layers_of(task, model)
        with tempfile.TemporaryDirectory() as folder:
            train, queries = stores_of(task, model, layers, Path(folder))
            damping = damping or inf.held_out_damping(model, task.rows, train, progress=False)
            factors = inf.kronecker_factors(model, task.rows, layers, progress=False)
            matrix = inf.influence(train, queries, "ekfac", damping=damping, factors=factors)
            out.append({HELD_OUT: matrix.total(), EQUAL: matrix.total(equal_layers=True)})
    return out[::-1]


def layers_of(task: Task, model: nn.Module) -> list[str]:
    """The task's layers, but those that training left as they were: a frozen pooler stands among an encoder's head."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return [layer for layer in inf.select_layers(model, task.layers) if f"{layer}.weight" in trained]


def stores_of(task: Task, model: nn.Module, layers: list[str], folder: Path) -> list[inf.GradientStore]:
    """Whole gradients of the rows and of the queries."""
    return [
        inf.build_store(folder / name, model, part, layers, "identity", loss=task.kind, progress=False)
        for name, part in (("train", task.rows), ("queries", task.queries))
    ]


def write_tables(folder: Path) -> None:
    """``README.md`` in a folder from every result there."""
    lines = [
        "# Linear datamodeling scores",
        "",
        "Made by `python -m benchmarks.lds --tables` from the files beside it. `se` joins the standard errors over "
        "queries and over subsets; `se to best` is that of the difference to the best line, on the same models. "
        "Damping beside the default of 0.1, and settings of other libraries beside their defaults, were tried with these "
        "scores in view. The held-out damping sees no retraining, but its rule is the second of two tried on digits, where "
        "it was found too that the last checkpoint of a training should choose for all. Equal layers are the best of five "
        "ways to weigh layers and checkpoints, tried on digits and gpt. mrpc had no part in either.",
    ]
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not found.get("table"):
            continue
        training, sizes = found["training"], found["sizes"]
        lines += [
            "",
            f"## {found['task']}",
            "",
            f"{sizes['rows']} rows, {sizes['queries']} queries, {found['subsets']} subsets of half the rows, "
            f"{training['repeats']} models each, {training['epochs']} epochs"
            + (" (the run is not finished)." if found.get("partial") else "."),
            "",
            "| scores | LDS | se | behind the best | se to best |",
            "| --- | --- | --- | --- | --- |",
        ]
        table = sorted(found["table"], key=lambda row: -row["lds"])
        for row in table:
            numbers = [row["lds"], row["se"], table[0]["lds"] - row["lds"], row["se_best"]]
            lines.append(f"| {row['name']} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
        lines += pair_lines(found)
    protocol.write_text(folder / "README.md", "\n".join(lines) + "\n")
    click.echo(f"wrote {folder / 'README.md'}")


def pair_lines(found: dict[str, Any]) -> list[str]:
    """Ours beside other libraries, and what of these did not run."""
    lines = []
    if found.get("pairs"):
        lines += [
            "",
            "Ours less the best of other libraries on the same checkpoints, of any method and of the same kind, with the "
            "standard error of the difference:",
            "",
            "| ours | best of any method | difference | se | best of its kind | difference | se |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name in dict.fromkeys(pair["ours"] for pair in found["pairs"]):
            cells = {pair["kind"]: pair for pair in found["pairs"] if pair["ours"] == name}
            line = f"| {name} |"
            for kind in ("any", "its own"):
                if pair := cells.get(kind):
                    theirs = pair["theirs"].rpartition(", ")[0]
                    line += f" {theirs} | {pair['difference']:+.3f} | {pair['se']:.3f} |"
                else:
                    line += " none ran | | |"
            lines.append(line)
    others = found.get("others", {})
    if others.get("versions"):
        lines += [
            "",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in others["versions"].items()) + ".",
        ]
    if others.get("not_run"):
        lines += ["", "Did not run on this model:", ""]
        lines += [f"- {name}: `{error}`" for name, error in others["not_run"].items()]
    return lines


if __name__ == "__main__":
    main()
