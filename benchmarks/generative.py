"""Wrong answers in the training set of a causal model: which ranking finds them, and which layers find a query's class.

A small Llama is trained on the rows of one data set (the base model) and then fine-tuned on those of the other, where a
share of the answers is spoilt, each kind of fault alike: the answer of another row, the reasoning of another row, a
truncated answer, a wrong final number, another format. ``chats`` are conversations of two turns, one from each data set,
written by a chat template; one answer of a spoilt one is spoilt, and the base model is trained on other conversations.
Ranked are the loss, the loss under the base model and over it, the worst token, the answer against answers of other rows,
influence on clean queries by every method, layer group and aggregation, and means of ranks of two or three of those named
``VOTERS``. What is chosen on the other tasks is reported on each::

    python -m benchmarks.generative --data DATA_DIR --seeds 3
    python -m benchmarks.generative --page docs/quality.md

Each step is kept in ``--work``; the same command goes on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from benchmarks.paper import relevance
from benchmarks.paper_tables import interval, verdict
from benchmarks.paper_tasks import bpe, prompted
from benchmarks.training import causal_model
from influence_fast import ops
from influence_fast.attribution.aggregation import aggregated
from influence_fast.auditing.run import groups_of
from influence_fast.data.batching import collate
from influence_fast.data.chat import ChatEncoder

SETS = ("grammars", "math_with_reason")
CHATS = "chats"
TASKS = (*SETS, CHATS)
KINDS = {
    "grammars": ("answer of another row", "truncated", "other format"),
    "math_with_reason": (
        "answer of another row", "reasoning of another row", "truncated", "wrong final number", "other format",
    ),
}  # fmt: skip
KINDS[CHATS] = KINDS["math_with_reason"]
REASONED = ("reasoning of another row", "wrong final number")
TEMPLATE = (
    "<s>{% for message in messages %}{{ '<' + message.role + '>\\n' + message.content }}"
    "{{ '</s>' if message.role == 'assistant' else '\\n' }}{% endfor %}"
    "{{ '<assistant>\\n' if add_generation_prompt else '' }}"
)
Row = dict[str, Any]
METHODS, AGGREGATIONS = ("dot", "cosine", "datainf", "trackstar"), ("mean", "rank", "vote")
LAYERS, PROJECTION = "embedding,attention,mlp,head", "rademacher:16x16"
SIGNALS = (
    "random",
    "loss",
    "loss of the base model",
    "loss over the base model",
    "worst token",
    "against other answers",
)
DEFAULT = "cosine all rank"
# Fixed before any run.
VOTERS = (*SIGNALS[1:], "dot all rank", DEFAULT, "trackstar all rank")
ALTERNATIVES = 4
# The paper's claims, of which the middle ones are the blocks of the second and third quarter.
MIDDLE, FIRST, LAST = ("block 1", "block 2"), "embedding", "head"


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of the data sets, one folder each.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("generative-runs"), help="Steps of unfinished runs."
)
@protocol.out_option("A finished run in it stays as it is, others are added.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=240, show_default=True, help="Training rows, of which a share is spoilt.")
@click.option("--base-epochs", default=3, show_default=True)
@click.option("--epochs", default=6, show_default=True)
@click.option("--share", default=0.2, show_default=True, help="Share of spoilt answers.")
@protocol.seconds_option
@protocol.page_option
@protocol.threads_option
def main(
    data: Path | None,
    work: Path,
    out: Path | None,
    seeds: int,
    seconds: float,
    page: Path | None,
    threads: int,
    **settings: Any,
) -> None:
    """Spoil answers, fine-tune, rank."""
    torch.set_num_threads(threads)
    if page is not None:
        protocol.write_table(page, out, "generative", "runs", table_of)
        return
    if data is None:
        raise click.UsageError("--data is needed (or --page).")
    file, document = protocol.begun(out, "generative", "runs", settings)
    done = {(run["task"], run["seed"]) for run in document["runs"]}
    rows = {task: read(data, task) for task in SETS}
    tokenizer = bpe([row["prompt"] + row["target"] for task in SETS for row in rows[task]["train"]])
    rows[CHATS] = {side: chats(*(rows[task][side] for task in SETS)) for side in ("train", "test")}
    with protocol.Results(file, document) as results, protocol.Progress(seconds=seconds) as progress:
        try:
            for seed, task in itertools.product(range(seeds), TASKS):
                if (task, seed) not in done:
                    found = one_run(task, seed, rows, tokenizer, work / f"{task}-seed{seed}", progress, settings)
                    document["runs"].append(found)
                    results.add()
        except protocol.OutOfTime as error:
            click.echo(f"out of time before the next {error}; the same command goes on")
            raise SystemExit(3) from None
    click.echo(f"wrote {file}")


def read(data: Path, task: str) -> dict[str, list[dict[str, Any]]]:
    """Rows with ``prompt``, ``target``, ``class_id``, and of the target ``reason`` and ``number`` where it has them."""
    out = {}
    for side in ("train", "test"):
        found = [json.loads(line) for line in (data / task / f"{side}.jsonl").read_text().splitlines()]
        out[side] = [
            {"prompt": row["prompt"], "class_id": row["class_id"], **parts_of(row.get("reason"), str(row["answer"]))}
            for row in found
        ]
    return out


def parts_of(reason: str | None, answer: str) -> dict[str, Any]:
    return {"reason": reason, "answer": answer, "target": answer if reason is None else f"{reason} Answer: {answer}"}


def chats(*sets: list[Row]) -> list[Row]:
    """Conversations with a turn from each data set, whose order changes from one to the next."""
    return [{"turns": list(parts[:: 1 - 2 * (i % 2)])} for i, parts in enumerate(zip(*sets, strict=True))]


def turns_of(row: Row) -> list[Row]:
    """Questions with their answers: of a row that is no conversation the one that it is."""
    return row.get("turns", [row])


def spoil(rows: list[Row], task: str, share: float, seed: int) -> tuple[list[Row], list[str | None]]:
    """Rows of which ``round(share * n)`` have a wrong target, each kind of fault as often, and the fault of each row."""
    random = np.random.default_rng([seed, 7])
    kinds, count = KINDS[task], round(share * len(rows))
    places = random.permutation(len(rows))[:count].tolist()
    out = list(rows)
    faults: list[str | None] = [None] * len(rows)
    for number, i in enumerate(places):
        kind, turns = kinds[number % len(kinds)], turns_of(rows[i])
        possible = [t for t, turn in enumerate(turns) if turn["reason"] is not None or kind not in REASONED]
        at = possible[int(random.integers(len(possible)))]
        wrong = {**turns[at], "target": spoilt(kind, turns[at], another(rows, turns[at], random), random)}
        out[i] = {"turns": [*turns[:at], wrong, *turns[at + 1 :]]} if "turns" in rows[i] else wrong
        faults[i] = kind
    return out, faults


def another(rows: list[Row], turn: Row, random: np.random.Generator) -> Row:
    """A turn from the same data set with another target, and with other reasoning where it has some."""
    reasoned = turn["reason"] is not None
    others = [
        other
        for row in rows
        for other in turns_of(row)
        if (other["reason"] is not None) == reasoned
        and other["target"] != turn["target"]
        and not (reasoned and other["reason"] == turn["reason"])
    ]
    return others[int(random.integers(len(others)))]


def encoder(tokenizer: Any) -> Callable[[Row], dict[str, Any]]:
    """Tokens and labels of a row: prompt and target, or a conversation of which the assistant's turns are learnt."""
    from transformers import PreTrainedTokenizerFast

    chat = ChatEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer), TEMPLATE)

    def encode(row: Row) -> dict[str, Any]:
        if "turns" not in row:
            return prompted(tokenizer, row["prompt"], row["target"])
        said = [(turn["prompt"], turn["target"]) for turn in row["turns"]]
        ids, learnt = chat(
            [
                {"role": role, "content": text}
                for pair in said
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
        )
        return {"input_ids": ids, "labels": [i if own else -100 for i, own in zip(ids, learnt, strict=True)]}

    return encode


def spoilt(kind: str, row: dict[str, Any], other: dict[str, Any], random: np.random.Generator) -> str:
    """The target of a row with one kind of fault."""
    target = str(row["target"])
    if kind == "answer of another row":
        return str(other["target"])
    if kind == "reasoning of another row":
        return str(parts_of(other["reason"], row["answer"])["target"])
    if kind == "truncated":
        words = target.split(" ")
        return " ".join(words[: len(words) // 2]) if len(words) > 1 else target[: len(target) // 2]
    if kind == "wrong final number":
        shift = int(random.integers(1, 10)) * (1 if random.integers(2) else -1)
        return str(parts_of(row["reason"], f"{float(row['answer']) + shift:g}")["target"])
    return f"<answer>{target.upper()}</answer>"


def one_run(
    task: str,
    seed: int,
    rows: dict[str, dict[str, list[Row]]],
    tokenizer: Any,
    work: Path,
    progress: protocol.Progress,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Base model, fine-tuning, every ranking and the relevance of layers, of one data set and seed."""
    work.mkdir(parents=True, exist_ok=True)
    order = torch.randperm(len(rows[task]["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
    clean = [rows[task]["train"][i] for i in order[: settings["samples"]]]
    train, faults = spoil(clean, task, settings["share"], seed)
    noise = torch.tensor([fault is not None for fault in faults])

    encode = encoder(tokenizer)

    def tokens(part: list[Row]) -> list[dict[str, Any]]:
        return [encode(row) for row in part]

    vocabulary, given = tokenizer.get_vocab_size(), tokens(train)
    if task == CHATS:
        general = tokens([rows[task]["train"][i] for i in order[settings["samples"] :]])
    else:
        other = rows[next(name for name in SETS if name != task)]["train"]
        drawn = torch.randperm(len(other), generator=torch.Generator().manual_seed(seed)).tolist()
        general = tokens([other[i] for i in drawn[: settings["samples"]]])
    epochs = {"epochs": settings["base_epochs"]}
    base, _ = causal_model(vocabulary, general, work / "base.pt", progress, seed, epochs)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    tuned = {"epochs": settings["epochs"]}
    model, history = causal_model(vocabulary, given, work / "model.pt", progress, seed, tuned, start)
    queries = tokens(rows[task]["test"])

    scores: dict[str, Tensor] = {"random": torch.rand(len(noise), generator=torch.Generator().manual_seed(seed))}
    with progress.step(f"{task}, seed {seed}: losses", "losses"):
        own, before = token_losses(model, given), token_losses(base, given)
        loss, reference = (torch.stack([row.mean() for row in found]) for found in (own, before))
        scores["loss"], scores["loss of the base model"] = -loss, -reference
        scores["loss over the base model"] = reference - loss
        scores["worst token"] = -torch.stack([row.max() for row in own])
        scores["against other answers"] = against_others(model, train, encode, seed) - loss
    layers = inf.select_layers(model, LAYERS)
    stores = []
    for name, part in (("train", given), ("queries", queries)):
        with progress.step(f"{task}, seed {seed}: gradients of {name}", "capture"):
            stores.append(inf.build_store(work / name, model, part, layers, PROJECTION))
    groups = groups_of(model, list(layers))
    right = ~noise
    if task != CHATS:
        classes = [torch.tensor([row["class_id"] for row in part]) for part in (clean, rows[task]["test"])]
        same = classes[1][:, None] == classes[0][None]
    found_relevance = []
    for method in METHODS:
        with progress.step(f"{task}, seed {seed}: {method}", "scores"):
            matrix = inf.influence(stores[0], stores[1], method)
            for group, aggregation, values in aggregated(matrix, AGGREGATIONS, groups, 0.2):
                scores[f"{method} {group} {aggregation}"] = values
            # Spoilt rows are of no class, and conversations of two.
            for name in matrix.layers if task != CHATS else []:
                found = relevance(matrix.layer(name)[:, right], same[:, right])
                found_relevance.append({"method": method, "layer": name, **found})
    scores |= pools(scores)
    return {
        "task": task, "seed": seed, "sizes": {"train": len(train), "queries": len(queries)},
        "faults": {kind: faults.count(kind) for kind in KINDS[task]}, "loss": history,
        "query_loss": float(np.mean([float(row.mean()) for row in token_losses(model, queries)])),
        "scores": {name: judged(values, noise, faults) for name, values in scores.items()},
        "relevance": found_relevance,
    }  # fmt: skip


def token_losses(model: nn.Module, rows: list[dict[str, Any]], size: int = 32) -> list[Tensor]:
    """Cross-entropy of each target token of each row."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    with torch.no_grad():
        for begin in range(0, len(order), size):
            part = order[begin : begin + size]
            batch = collate([rows[i] for i in part], model)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            found = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
            for i, row, kept in zip(part, found, labels != -100, strict=True):
                out[i] = row[kept].double()
    return out


def against_others(model: nn.Module, rows: list[Row], encode: Callable[[Row], dict[str, Any]], seed: int) -> Tensor:
    """The lowest mean loss of other rows' targets after a row's own prompts, as of ``ALTERNATIVES`` drawn ones."""
    random = np.random.default_rng([seed, 11])
    asked = []
    for i, row in enumerate(rows):
        others = random.choice([j for j in range(len(rows)) if j != i], ALTERNATIVES, replace=False)
        asked += [encode(with_targets(row, rows[j])) for j in others.tolist()]
    losses = torch.stack([found.mean() for found in token_losses(model, asked)])
    return losses.view(len(rows), ALTERNATIVES).min(1).values


def with_targets(row: Row, other: Row) -> Row:
    """A row with the targets of another, in a conversation those from the same data set."""
    if "turns" not in row:
        return {**row, "target": other["target"]}
    by_kind = {turn["reason"] is None: turn["target"] for turn in other["turns"]}
    return {"turns": [{**turn, "target": by_kind[turn["reason"] is None]} for turn in row["turns"]]}


def pools(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean ranks of every two and three of ``VOTERS``."""
    ranks = {name: ops.rank(scores[name][None].float())[0].double() for name in VOTERS}
    return {
        " + ".join(some): torch.stack([ranks[name] for name in some]).mean(0)
        for size in (2, 3)
        for some in itertools.combinations(VOTERS, size)
    }


def judged(scores: Tensor, noise: Tensor, faults: list[str | None]) -> dict[str, float]:
    """AUC_NDR and NDR@30 of all faults; ROC-AUC of each kind among rows without a fault."""
    out = {"auc_ndr": inf.ndr_auc(scores, noise), "ndr@30": inf.ndr(scores, noise, 0.3)}
    for kind in dict.fromkeys(fault for fault in faults if fault is not None):
        kept = torch.tensor([fault in (None, kind) for fault in faults])
        out[kind] = inf.roc_auc(scores[kept], noise[kept])
    return out


def auc(run: dict[str, Any], name: str) -> float:
    return float(run["scores"][name]["auc_ndr"])


def best_of(runs: list[dict[str, Any]], names: Iterable[str]) -> str:
    return max(names, key=lambda name: float(np.mean([auc(run, name) for run in runs])))


def table_of(runs: list[dict[str, Any]]) -> list[str]:
    """Signals by task; what was chosen on the others on each; claims on layers and aggregations."""
    by = {task: [run for run in runs if run["task"] == task] for task in TASKS}
    every = list(runs[0]["scores"])
    influence = [name for name in every if name.split(" ")[0] in METHODS and "+" not in name]
    together = [name for name in every if "+" in name]
    lines: list[str] = []
    for task, some in by.items():
        names = [*SIGNALS, DEFAULT, best_of(some, influence), best_of(some, together)]
        kinds = list(some[0]["faults"])
        fitted = float(np.mean([run["loss"][-1] for run in some]))
        unseen = float(np.mean([run["query_loss"] for run in some]))
        lines += [
            f"`{task}`, {len(some)} seeds, {some[0]['sizes']['train']} rows of which {sum(some[0]['faults'].values())} are "
            f"spoilt (loss a token after training {fitted:.2f}, of clean queries {unseen:.2f}), the best first:",
            "",
        ]
        lines += ["| ranking | AUC_NDR | 95 % interval | NDR@30 | " + " | ".join(f"ROC-AUC: {k}" for k in kinds) + " |"]
        lines += ["|" + "---|" * (4 + len(kinds))]
        for name in sorted(dict.fromkeys(names), key=lambda n: -float(np.mean([auc(run, n) for run in some]))):
            mean, low, high = interval(auc(run, name) for run in some)
            figures = [float(np.mean([run["scores"][name][m] for run in some])) for m in ("ndr@30", *kinds)]
            note = " (best cell, seen only afterwards)" if name == names[-2] and name != DEFAULT else ""
            note = " (best pool, seen only afterwards)" if name == names[-1] else note
            note = " (default)" if name == DEFAULT else note
            lines.append(
                f"| {name}{note} | {mean:.3f} | {low:.3f} to {high:.3f} | "
                + " | ".join(f"{v:.3f}" for v in figures)
                + " |"
            )
        lines.append("")
    lines += ["Chosen on the other tasks and reported on each, over the loss and over the default cell there:", ""]
    lines += ["| reported on | of | choice | AUC_NDR | over loss | 95 % interval | over default | 95 % interval |"]
    lines += ["|" + "---|" * 8]
    above: list[str] = []
    for there in by:
        others = [run for task, some in by.items() if task != there for run in some]
        for what, names in (("influence", influence), ("signals", list(SIGNALS[1:])), ("pools", together)):
            choice = best_of(others, names)
            row = [there, what, choice, f"{np.mean([auc(run, choice) for run in by[there]]):.3f}"]
            for rival in ("loss", DEFAULT):
                mean, low, high = interval(auc(run, choice) - auc(run, rival) for run in by[there])
                row += [f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}"]
                above += [f"{choice} on {there}"] * (rival == DEFAULT and low > 0)
            lines.append("| " + " | ".join(row) + " |")
    verdict_on = (
        f"Clearly above the default cell on the task that did not choose it: {', '.join(above)}."
        if above
        else f"No choice is clearly above {DEFAULT}, today's default, on the task that did not choose it: these runs "
        "support no other default."
    )
    lines += ["", verdict_on]
    lines += [
        "",
        f"The paper's claims, over all {len(runs)} runs (a query's class among the rows that are not spoilt):",
        "",
        *claims(runs),
    ]
    return lines


def claims(runs: list[dict[str, Any]]) -> list[str]:
    """Differences over runs with Student intervals: of finding faults, and of finding a query's class."""

    def ndr(run: dict[str, Any], groups: Iterable[str], aggregations: Iterable[str] = AGGREGATIONS) -> float:
        return float(np.mean([auc(run, f"{m} {g} {a}") for m in METHODS for g in groups for a in aggregations]))

    def found(run: dict[str, Any], metric: str, wanted: str) -> float:
        rows = [row for row in run["relevance"] if place_of(row["layer"]) == wanted]
        return float(np.mean([row[metric] for row in rows]))

    wide = ("all", FIRST, *MIDDLE, LAST)
    figures: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("faults: middle blocks over the head (AUC_NDR)", lambda run: ndr(run, MIDDLE) - ndr(run, [LAST])),
        ("faults: middle blocks over the embedding (AUC_NDR)", lambda run: ndr(run, MIDDLE) - ndr(run, [FIRST])),
        ("faults: rank over mean (AUC_NDR)", lambda run: ndr(run, wide, ["rank"]) - ndr(run, wide, ["mean"])),
        ("faults: vote over mean (AUC_NDR)", lambda run: ndr(run, wide, ["vote"]) - ndr(run, wide, ["mean"])),
        ("faults: the default cell over the loss (AUC_NDR)", lambda run: auc(run, DEFAULT) - auc(run, "loss")),
    ]

    def over(metric: str, rival: str) -> Callable[[dict[str, Any]], float]:
        return lambda run: found(run, metric, "middle") - found(run, metric, rival)

    for metric, rival in itertools.product(("roc_auc", "recall@90"), (FIRST, LAST)):
        figures.append((f"a query's class: middle blocks over the {rival} ({metric})", over(metric, rival)))
    lines = ["| claim | mean | 95 % interval | verdict |", "|---|---|---|---|"]
    for text, figure in figures:
        # Of conversations no class was sought.
        mean, low, high = interval(figure(run) for run in runs if run["relevance"] or "class" not in text)
        lines.append(f"| {text} | {mean:+.3f} | {low:+.3f} to {high:+.3f} | {verdict(low, high)} |")
    return lines


def place_of(layer: str) -> str:
    """``embedding``, ``head``, ``middle``, or the layer's own name."""
    if "embed" in layer:
        return FIRST
    if "lm_head" in layer:
        return LAST
    return "middle" if any(f"layers.{name.split()[1]}." in layer for name in MIDDLE) else layer


if __name__ == "__main__":
    main()
