"""The tasks of the paper's protocol: their samples, what ranks them, and what a run of them is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_fast.data import label_noise as noises

CLASSIFICATION = {"sst2": ("sentence",), "cola": ("sentence",), "mrpc": ("sentence1", "sentence2")}
GENERATIVE = {"grammars": "answer", "math_with_reason": "reason"}
# With two classes both labels' gradients of a sample are parallel: contrast-cosine is cosine, contrast-trackstar trackstar.
METHODS = (
    "dot", "cosine", "datainf", "trak", "trackstar", "ekfac", "contrast-dot", "contrast-datainf", "contrast-trak",
    "outlier", "repsim", "we", "we_topk", "neighbours", "fitted-trackstar", "pool",
)  # fmt: skip
AGGREGATIONS = ("mean", "rank-c", "vote-c")
# An audit's default; judged beside the baselines, never chosen by the noise.
DEFAULT = ("pool", "all", "mean")
# Fixed before any full run but for the pool, whose estimates were chosen on seed 0 of each task with the mask in view: those
# runs are no test of it. The first two are the paper's plain TracIn and its recommendation; pool is an audit's default.
ARMS = {
    "dot all mean": ("dot", "all", "mean"),
    "datainf middle vote-c": ("datainf", "attention middle", "vote-c"),
    "cosine all rank-c": ("cosine", "all", "rank-c"),
    "cosine+loss all rank-c": ("cosine+loss", "all", "rank-c"),
    "pool": DEFAULT,
    "trackstar middle mean": ("trackstar", "attention middle", "mean"),
    "loss": ("loss", "", ""),
}
DROP = 0.3
USUAL = {"lr": 3e-4, "flip": 0.2}


def run_name(task: str, seed: int, settings: dict[str, Any]) -> str:
    """Settings that are not the default show in the name, so runs of other sizes are never taken for these."""
    if task in GENERATIVE:
        return f"{task}-e{settings['epochs']}-seed{seed}"
    parts = [task, f"n{settings['samples']}", f"e{settings['epochs']}", settings["kind"], *unusual(settings)]
    return "-".join([*parts, f"seed{seed}"])


def unusual(settings: dict[str, Any]) -> list[str]:
    """Settings beside samples, epochs and noise that are not the protocol's, such as ``lr0.001``."""
    return [f"{name}{settings[name]:g}" for name, usual in USUAL.items() if settings[name] != usual]


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


def encoded(folder: str, part: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(*zip(*(row["text"] for row in part), strict=True), truncation=True, max_length=128)
    keys = [key for key in ("input_ids", "token_type_ids") if key in found]
    return [{**{key: found[key][i] for key in keys}, "labels": row["label"]} for i, row in enumerate(part)]


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


def prompted(tokenizer: Any, prompt: str, answer: str) -> dict[str, Any]:
    head, tail = [1, *tokenizer.encode(prompt).ids], [*tokenizer.encode(answer).ids, 2]
    return {"input_ids": head + tail, "labels": [-100] * len(head) + tail}
