"""The paper's protocol on real data, resumable: flips, fine-tuning, every ranking, filter and retrain (arXiv 2511.04715).

One run is one task and one seed. A text-classification run flips a share of the training labels, trains LoRA matrices and
the head of a pretrained encoder, takes gradients at the epoch that a held-out split likes best, ranks the samples by every
layer group, method and aggregation, drops the lowest 30 % and trains again from the same start. The arms' epochs are chosen
on that split too; the accuracy reported is of a third. A generative run trains a small causal model from nothing and asks
whether influence finds training samples of a query's class::

    python -m benchmarks.paper --task sst2 --seeds 3 --model MODEL_DIR --data DATA_DIR
    python -m benchmarks.paper --tables

Every step is kept in ``--work``; ``--seconds`` stops before a step that would pass it, and the same command goes on
there. A finished run is one JSON file in ``--out``; ``--tables`` makes ``README.md`` and the plots there from those alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import influence_fast as inf
from influence_fast import ops
from influence_fast.attribution.method_inputs import Sources
from influence_fast.auditing.run import AuditConfig, default_layers, groups_of
from influence_fast.data import label_noise as noises
from influence_fast.data.batching import collate
from influence_fast.data.samples import Samples
from influence_fast.evaluation.comparison import aggregated, baselines, filter_and_retrain

CLASSIFICATION = {"sst2": ("sentence",), "cola": ("sentence",), "mrpc": ("sentence1", "sentence2")}
GENERATIVE = {"grammars": "answer", "math_with_reason": "reason"}
# With two classes both labels' gradients of a sample are parallel: contrast-cosine is cosine, contrast-trackstar trackstar.
METHODS = (
    "dot", "cosine", "datainf", "trak", "trackstar", "ekfac", "contrast-dot", "contrast-datainf", "contrast-trak",
    "outlier", "repsim", "we", "we_topk", "neighbours", "fitted-trackstar", "pool",
)  # fmt: skip
AGGREGATIONS = ("mean", "rank-c", "vote-c")
# Fixed before any full run but for the pool, whose opinions were chosen on seed 0 of each task with the mask in view: those
# runs are no test of it. The first two are the paper's plain TracIn and its recommendation; pool is an audit's default.
ARMS = {
    "dot all mean": ("dot", "all", "mean"),
    "datainf middle vote-c": ("datainf", "attention middle", "vote-c"),
    "cosine all rank-c": ("cosine", "all", "rank-c"),
    "cosine+loss all rank-c": ("cosine+loss", "all", "rank-c"),
    "pool": ("pool", "all", "mean"),
    "trackstar middle mean": ("trackstar", "attention middle", "mean"),
    "loss": ("loss", "", ""),
}
BATCH, DROP = 32, 0.3
USUAL = {"lr": 3e-4, "flip": 0.2}
# Fixed, so that a run goes on after the default has changed.
_SHARD_ROWS = 1024


class OutOfTime(Exception):
    """The next step would pass the budget."""


class Clock:
    """Refuses steps that would pass ``seconds``, judging by how long such a step took before."""

    def __init__(self, seconds: float) -> None:
        self.begin, self.seconds = time.monotonic(), seconds
        self.took: dict[str, float] = {}

    def step(self, kind: str) -> None:
        if time.monotonic() - self.begin + self.took.get(kind, 0.0) * 1.1 > self.seconds:
            raise OutOfTime(kind)

    def done(self, kind: str, since: float) -> None:
        self.took[kind] = time.monotonic() - since


@click.command()
@click.option("--task", type=click.Choice([*CLASSIFICATION, *GENERATIVE]))
@click.option("--seeds", default=1, help="Number of runs, one seed each.")
@click.option(
    "--first-seed", default=0, show_default=True, help="Seed of the first run: several machines share the work."
)
@click.option("--model", help="Folder of the pretrained encoder (classification).")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of the data sets, one folder each.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("paper-runs"), help="Steps of unfinished runs.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "paper")
@click.option("--samples", default=4500)
@click.option("--query-samples", default=500)
@click.option("--flip", default=USUAL["flip"])
@click.option("--noise", "kind", default="uniform", type=click.Choice([k for k in noises.KINDS if k != "answers"]))
@click.option("--epochs", default=3)
@click.option("--lr", default=USUAL["lr"])
@click.option("--arms", default=",".join(ARMS), help="Rankings to retrain after, joined by commas.")
@click.option("--checkpoints/--no-checkpoints", default=True, help="TracInCP over all epochs.")
@click.option("--seconds", default=math.inf, help="Stop before a step that would take longer; run again to go on.")
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
        from benchmarks.paper_tables import write_tables

        click.echo("\n".join(f"wrote {path}" for path in write_tables(out)))
        return
    if task is None or settings["data"] is None:
        raise click.UsageError("--task and --data are needed (or --tables).")
    if task in CLASSIFICATION and settings["model"] is None:
        raise click.UsageError("--model is needed for a classification task.")
    clock = Clock(seconds)
    for seed in range(first_seed, first_seed + seeds):
        name = run_name(task, seed, settings)
        target = out / f"{name}.json"
        if target.exists():
            click.echo(f"{target} is there")
            continue
        run = classification_run if task in CLASSIFICATION else generative_run
        try:
            document = run(task, seed, work / name, clock, settings)
        except OutOfTime as error:
            click.echo(f"{name}: out of time before the next {error}; the same command goes on")
            raise SystemExit(3) from None
        out.mkdir(parents=True, exist_ok=True)
        _write(target, json.dumps(document, indent=1) + "\n")
        click.echo(f"wrote {target}")


def run_name(task: str, seed: int, settings: dict[str, Any]) -> str:
    """Settings that are not the default show in the name, so runs of other sizes are never taken for these."""
    if task in GENERATIVE:
        return f"{task}-e{settings['epochs']}-seed{seed}"
    parts = [task, f"n{settings['samples']}", f"e{settings['epochs']}", settings["kind"], *unusual(settings)]
    return "-".join([*parts, f"seed{seed}"])


def unusual(settings: dict[str, Any]) -> list[str]:
    """Settings beside samples, epochs and noise that are not the protocol's, such as ``lr0.001``."""
    return [f"{name}{settings[name]:g}" for name, usual in USUAL.items() if settings[name] != usual]


def classification_run(task: str, seed: int, work: Path, clock: Clock, settings: dict[str, Any]) -> dict[str, Any]:
    """One task and seed from raw text to a JSON document."""
    work.mkdir(parents=True, exist_ok=True)
    split = _cached(work / "split.pt", lambda: make_split(task, seed, settings))
    make = lambda: encoder(settings["model"], seed)  # noqa: E731
    rows = {name: encoded(settings["model"], part) for name, part in split.items()}
    noise = torch.tensor([row["noise"] for row in split["train"]])
    fit = lambda arm, chosen: train_epochs(make, rows, chosen, work / f"fit-{arm}.pt", clock, seed, settings)  # noqa: E731
    base = fit("all", list(range(len(noise))))
    best = max(range(len(base["epochs"])), key=lambda epoch: base["epochs"][epoch]["selection"])
    model = make()
    scores, cancellation, seconds = rankings(model, base, best, rows, work, clock, seed, settings)
    cells = inf.compare(scores, noise)
    accuracy: dict[str, dict[str, Any]] = {"all": arm_of(base["epochs"], len(noise))}
    wanted = {name: scores[ARMS[name]] for name in settings["arms"].split(",") if name and ARMS[name] in scores}
    for name, kept in (kept_rows(wanted, noise, seed) if wanted else {}).items():
        accuracy[name] = arm_of(fit(name.replace(" ", "-"), kept)["epochs"], len(kept))
        accuracy[name]["noise_left"] = float(noise[kept].double().mean())
    return {
        "task": task,
        "seed": seed,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()
                     if key not in ("model", "data")},
        "sizes": {name: len(part) for name, part in rows.items()},
        "noisy": int(noise.sum()),
        "chosen_epoch": best,
        "random_auc_ndr": (len(noise) + 1) / (2 * len(noise) - int(noise.sum())),
        "rows": cells.rows,
        "cancellation": cancellation,
        "arms": accuracy,
        "seconds": {**seconds, **{k: v for k, v in base.items() if k == "seconds"}},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": inf.__version__,
    }  # fmt: skip


def make_split(task: str, seed: int, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """``train`` (noisy), ``selection`` (clean, of the training file), ``queries`` and ``test`` (of the validation file)."""
    random = torch.Generator().manual_seed(seed)
    folder, columns = Path(settings["data"]) / task, CLASSIFICATION[task]

    def read(name: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        order = torch.randperm(len(rows), generator=random).tolist()
        return [{"text": [rows[i][c] for c in columns], "label": rows[i]["label"]} for i in order]

    pool, held_out = read("train"), read("validation")
    count = min(settings["samples"], len(pool) - 500)
    queries = min(settings["query_samples"], len(held_out) // 2)
    chosen = pool[:count]
    labels, mask = [row["label"] for row in chosen], torch.zeros(count, dtype=torch.bool)
    texts = [row["text"] for row in chosen]
    kind, share = settings["kind"], settings["flip"]
    if kind == "uniform":
        labels, mask = noises.uniform(labels, share, 2, seed)
    elif kind == "by-class":
        labels, mask = noises.by_class(labels, share, 2, [3.0, 1.0], seed)
    elif kind == "boundary":
        labels, mask = noises.boundary(labels, bag_of_words([" ".join(text) for text in texts], labels), share)
    else:
        last = [text[-1] for text in texts]
        if kind == "duplicates":
            last, labels, mask = noises.duplicates(last, labels, share, 2, seed)
            order = torch.arange(count)
            copied = [next(i for i in order.tolist() if _near(last[i], text)) for text in last[count:]]
            texts += [texts[i] for i in copied]
        else:
            last, labels, mask = noises.backdoor(last, labels, share, 1, "cf mn", seed)
        texts = [[*text[:-1], tail] for text, tail in zip(texts, last, strict=True)]
    train = [{"text": t, "label": y, "noise": bad} for t, y, bad in zip(texts, labels, mask.tolist(), strict=True)]
    return {
        "train": train,
        "selection": pool[count : count + 500],
        "queries": held_out[:queries],
        "test": held_out[queries : queries + 500],
    }


def _near(original: str, copy: str) -> bool:
    return len(original.split()) - len(copy.split()) in (0, 1) and set(copy.split()) <= set(original.split())


def bag_of_words(texts: list[str], labels: list[int]) -> Tensor:
    """Out-of-fold class probabilities by logistic regression on word counts: what lies near the boundary."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    return torch.from_numpy(cross_val_predict(model, texts, labels, cv=5, method="predict_proba"))


def encoder(folder: str, seed: int) -> nn.Module:
    """The pretrained encoder with fresh LoRA matrices on query and value and a fresh head, the same for every arm."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    settings = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=4, lora_dropout=0.05, target_modules=["query", "value"])
    return get_peft_model(model, settings)


def encoded(folder: str, part: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(*zip(*(row["text"] for row in part), strict=True), truncation=True, max_length=128)
    keys = [key for key in ("input_ids", "token_type_ids") if key in found]
    return [{**{key: found[key][i] for key in keys}, "labels": row["label"]} for i, row in enumerate(part)]


def train_epochs(
    make: Callable[[], nn.Module],
    rows: dict[str, list[dict[str, Any]]],
    chosen: list[int],
    path: Path,
    clock: Clock,
    seed: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Trained weights and accuracies of every epoch; an epoch is the unit that is kept."""
    from transformers import get_cosine_schedule_with_warmup

    state: dict[str, Any] = (
        torch.load(path, weights_only=False) if path.exists() else {"epochs": [], "weights": [], "seconds": 0.0}
    )
    if len(state["epochs"]) == settings["epochs"]:
        return state
    model = make()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings["lr"])
    steps = settings["epochs"] * -(-len(chosen) // BATCH)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    if state["weights"]:
        _load(model, state["weights"][-1])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for epoch in range(len(state["epochs"]), settings["epochs"]):
        clock.step("epoch")
        begin = time.monotonic()
        torch.manual_seed(1000 * seed + epoch)
        model.train()
        for part in tqdm(
            length_batches(rows["train"], chosen), desc=f"{path.stem} epoch {epoch + 1}", delay=2, disable=None
        ):
            batch = collate([rows["train"][i] for i in part], model)
            loss = nn.functional.cross_entropy(_logits(model, batch), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        state["epochs"].append({name: accuracy(model, rows[name]) for name in ("selection", "test")})
        state["weights"].append({name: p.detach().clone() for name, p in trained.items()})
        state["optimizer"], state["schedule"] = optimizer.state_dict(), schedule.state_dict()
        state["seconds"] += time.monotonic() - begin
        clock.done("epoch", begin)
        _save(path, state)
    return state


def length_batches(rows: list[dict[str, Any]], chosen: list[int]) -> list[list[int]]:
    """Random batches of samples of like length: sorted within pools of 16 batches, so that little is padding."""
    order = [chosen[i] for i in torch.randperm(len(chosen)).tolist()]
    pools = [
        sorted(order[i : i + 16 * BATCH], key=lambda j: len(rows[j]["input_ids"]))
        for i in range(0, len(order), 16 * BATCH)
    ]
    batches = [pool[i : i + BATCH] for pool in pools for i in range(0, len(pool), BATCH)]
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def accuracy(model: nn.Module, rows: list[dict[str, Any]]) -> float:
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    right = 0
    with torch.no_grad():
        for begin in range(0, len(order), 64):
            batch = collate([rows[i] for i in order[begin : begin + 64]], model)
            right += int((_logits(model, batch).argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def rankings(
    model: nn.Module,
    base: dict[str, Any],
    best: int,
    rows: dict[str, list[dict[str, Any]]],
    work: Path,
    clock: Clock,
    seed: int,
    settings: dict[str, Any],
) -> tuple[dict[tuple[str, str, str], Tensor], dict[str, float], dict[str, float]]:
    """``{(method, group, aggregation): scores}``, cancellation of each group, and seconds by step."""
    _load(model, base["weights"][best])
    layers = inf.select_layers(model, default_layers(model))
    middle = [name for name in inf.select_layers(model, "attention[middle]") if name in set(layers)]
    groups = {**groups_of(model, layers), "attention middle": middle}
    seconds: dict[str, float] = {}
    stores = _stores(work / "stores", model, rows, layers, clock, seconds)
    samples, trusted = (Samples(rows[name], None, None, None, None) for name in ("train", "queries"))
    sources = Sources(
        model, samples, trusted, stores[0], stores[1], work, AuditConfig("", "", ""), "classification", True
    )
    scores = {(name, "", ""): values for name, values in baselines(stores[0], seed).items()}

    def scored(matrix: Any) -> dict[tuple[str, str], Tensor]:
        return {(g, a): values for g, a, values in aggregated(matrix, AGGREGATIONS, groups, 0.2)}

    for method in METHODS:
        begin = time.monotonic()
        found = _cached(work / f"scores-{method}.pt", lambda m=method: scored(sources.matrix(m)), clock)  # type: ignore[misc]
        seconds.setdefault(method, time.monotonic() - begin)
        scores |= {(method, *cell): values for cell, values in found.items()}
    if settings["checkpoints"]:
        matrices = []
        for epoch, weights in enumerate(base["weights"]):
            _load(model, weights)
            at = stores if epoch == best else _stores(work / f"stores-{epoch}", model, rows, layers, clock, seconds)
            matrices.append(inf.influence(at[0], at[1], "dot"))
        found = _cached(work / "scores-tracincp.pt", lambda: scored(inf.Checkpoints(matrices)), clock)
        scores |= {("tracincp", *cell): values for cell, values in found.items()}
    for method in ("cosine", "trackstar", "contrast-dot"):
        for group in groups:
            for aggregation in AGGREGATIONS:
                voters = torch.stack([scores[method, group, aggregation], scores["loss", "", ""]])
                scores[f"{method}+loss", group, aggregation] = ops.rank(voters.float()).double().mean(0)
    by_layer = inf.cancellation(stores[0])
    return scores, {g: float(np.mean([by_layer[n] for n in names])) for g, names in groups.items()}, seconds


def _stores(
    folder: Path, model: nn.Module, rows: dict[str, Any], layers: list[str], clock: Clock, seconds: dict[str, float]
) -> list[inf.GradientStore]:
    out = []
    for name in ("train", "queries"):
        clock.step("capture")
        begin = time.monotonic()
        out.append(inf.build_store(folder / name, model, rows[name], layers, "identity", shard_rows=_SHARD_ROWS))
        clock.done("capture", begin)
        seconds.setdefault(f"gradients of {name}", time.monotonic() - begin)
    return out


def kept_rows(scores: dict[str, Tensor], noise: Tensor, seed: int) -> dict[str, list[int]]:
    """What each arm trains on: all but its lowest 30 %; ``random`` and ``oracle`` beside."""
    kept: dict[str, list[int]] = {}

    def train(rows: Tensor) -> list[tuple[float, float]]:
        kept[str(len(kept))] = rows.tolist()
        return [(0.0, 0.0)]

    arms = filter_and_retrain(train, scores, noise, drop=DROP, seed=seed)
    return {name: arm.rows.tolist() for name, arm in arms.items() if name != "all"}


def arm_of(epochs: list[dict[str, float]], rows: int) -> dict[str, Any]:
    best = max(range(len(epochs)), key=lambda epoch: epochs[epoch]["selection"])
    return {"rows": rows, "epoch": best, "accuracy": epochs[best]["test"], "epochs": epochs}


def generative_run(task: str, seed: int, work: Path, clock: Clock, settings: dict[str, Any]) -> dict[str, Any]:
    """ROC-AUC and recall@90 of finding training samples of a query's class, by layer, on a small model trained here."""
    work.mkdir(parents=True, exist_ok=True)
    folder, answer = Path(settings["data"]) / task, GENERATIVE[task]
    raw = {
        side: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for side, name in (("train", "train"), ("queries", "test"))
    }
    tokenizer = bpe([f"{row['prompt']}{row[answer]}" for row in raw["train"]])
    rows = {side: [_prompted(tokenizer, row["prompt"], str(row[answer])) for row in part] for side, part in raw.items()}
    classes = {side: torch.tensor([row["class_id"] for row in part]) for side, part in raw.items()}
    model, history = causal_model(tokenizer.get_vocab_size(), rows["train"], work / "model.pt", clock, seed, settings)
    layers = inf.select_layers(model, "embedding,attention,mlp,head")
    projection = "rademacher:16x16"
    stores = []
    for name in ("train", "queries"):
        clock.step("capture")
        stores.append(inf.build_store(work / name, model, rows[name], layers, projection))
    same = classes["queries"][:, None] == classes["train"][None]
    table = []
    for method in ("dot", "cosine", "datainf", "trackstar", "repsim"):
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
        for name, value in values.items():
            table.append({"method": method, "layer": name, **relevance(value, same)})
    return {
        "task": task,
        "seed": seed,
        "settings": {"epochs": len(history), "projection": projection},
        "sizes": {name: len(part) for name, part in rows.items()},
        "model": {"weights": sum(p.numel() for p in model.parameters()), "vocabulary": tokenizer.get_vocab_size()},
        "loss": history,
        "relevance": table,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": inf.__version__,
    }


def relevance(influence: Tensor, same: Tensor, k: int = 90) -> dict[str, float]:
    """Mean over queries of ROC-AUC and of recall among the ``k`` most helpful, a sample of the query's class being right."""
    aucs = [inf.roc_auc(-values, right) for values, right in zip(influence, same, strict=True)]
    top = influence.topk(min(k, influence.shape[1]), dim=1).indices
    recall = same.gather(1, top).sum(1).double() / same.sum(1)
    return {"roc_auc": float(np.mean(aucs)), f"recall@{k}": float(recall.mean()), "sd_roc_auc": float(np.std(aucs))}


def bpe(texts: list[str], size: int = 2000) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _prompted(tokenizer: Any, prompt: str, answer: str) -> dict[str, Any]:
    head, tail = [1, *tokenizer.encode(prompt).ids], [*tokenizer.encode(answer).ids, 2]
    return {"input_ids": head + tail, "labels": [-100] * len(head) + tail}


def causal_model(
    vocabulary: int, rows: list[dict[str, Any]], path: Path, clock: Clock, seed: int, settings: dict[str, Any]
) -> tuple[nn.Module, list[float]]:
    """A Llama of four blocks trained from nothing on prompts and answers; the loss of each epoch. An epoch is kept."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    state: dict[str, Any] = torch.load(path, weights_only=False) if path.exists() else {"loss": []}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if state["loss"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(len(state["loss"]), settings["epochs"]):
        clock.step("epoch")
        begin = time.monotonic()
        torch.manual_seed(1000 * seed + epoch)
        model.train()
        total = 0.0
        for part in tqdm(
            length_batches(rows, list(range(len(rows)))), desc=f"epoch {epoch + 1}", delay=2, disable=None
        ):
            batch = collate([rows[i] for i in part], model)
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(part)
        state = {
            "loss": [*state["loss"], total / len(rows)],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        clock.done("epoch", begin)
        _save(path, state)
    return model.eval(), state["loss"]


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def _cached(path: Path, make: Callable[[], Any], clock: Clock | None = None) -> Any:
    """``make()``, once: its result is kept in ``path``."""
    if not path.exists():
        begin = time.monotonic()
        if clock is not None:
            clock.step("scores")
        _save(path, make())
        if clock is not None:
            clock.done("scores", begin)
    return torch.load(path, weights_only=False)


def _save(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(value, part)
    part.rename(path)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.rename(path)


if __name__ == "__main__":
    main()
