"""An audit from nothing: makes a data set, flips labels, trains a small transformer, finds the flips. Offline."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import influence_fast as inf
from influence_fast._files import atomic_write
from influence_fast.errors import InputError

if TYPE_CHECKING:
    from influence_fast.auditing.result import AuditResult

FLIPPED = 0.2
_QUERIES = 240

_LIKED = ["lovely", "superb", "moving", "witty", "bright", "tender", "clever", "honest", "fresh", "charming"]
_DISLIKED = ["dull", "clumsy", "stale", "shallow", "noisy", "tedious", "hollow", "lazy", "grating", "bland"]
_PARTS = ["film", "plot", "cast", "script", "score", "scene", "ending", "story", "pace", "camera", "hero", "music"]
_JOINS = ["and", "but", "while", "though", "because"]
_FILLERS = ["the", "a", "its", "this", "really", "rather", "quite", "somehow", "often", "mostly", "perhaps", "again"]
_WORDS = ["[PAD]", "[CLS]", *_LIKED, *_DISLIKED, *_PARTS, *_JOINS, *_FILLERS, "not"]


def sentences(count: int, generator: torch.Generator) -> tuple[list[str], list[int]]:
    """Reviews of two or three clauses; the label is the majority's, and "not" turns a word's sentiment round."""

    def draw(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    def chance(probability: float) -> bool:
        return bool(torch.rand((), generator=generator) < probability)

    texts, labels = [], []
    for _ in range(count):
        label = int(chance(0.5))
        clauses = []
        sentiments = [label, label, 1 - label] if chance(0.4) else [label, label]
        for place in torch.randperm(len(sentiments), generator=generator).tolist():
            negated = chance(0.2)
            word = draw(_LIKED if sentiments[place] != negated else _DISLIKED)
            clauses.append(" ".join([draw(_FILLERS), draw(_PARTS), *(["not"] if negated else []), word]))
        texts.append(f" {draw(_JOINS)} ".join(clauses))
        labels.append(label)
    return texts, labels


def run_demo(out: str | Path, *, samples: int = 1200, seed: int = 0, progress: bool = True) -> AuditResult:
    """Train on ``samples`` sentences of which a fifth have a flipped label, and audit them.

    Everything is real and follows from ``seed``: data, flips, training, gradients. Writes the report to ``out``, beside the
    model, ``train.jsonl``, ``trusted.jsonl`` and a ``config.json`` that replays the audit.

    Raises:
        InputError: too few samples; a folder that holds something else than this very demo.
    """
    if samples < 50:
        raise InputError(f"samples: expected at least 50, got {samples}")
    folder = Path(out)
    generator = torch.Generator().manual_seed(seed)
    texts, labels = sentences(samples + _QUERIES, generator)
    noise = torch.zeros(samples, dtype=torch.bool)
    noise[torch.randperm(samples, generator=generator)[: round(FLIPPED * samples)]] = True
    rows: list[dict[str, Any]] = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    train = [
        {"text": row["text"], "label": row["label"] ^ int(bad), "noise": bad}
        for row, bad in zip(rows, noise.tolist(), strict=False)
    ]
    files = {"train.jsonl": train, "trusted.jsonl": rows[samples:]}
    _write_data(folder, {folder / name: _json_lines(part) for name, part in files.items()})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model()
        _fit(model, train, progress)
    # By hand: save_pretrained draws a progress bar whoever reads.
    model.config.save_pretrained(folder / "model")
    save_file(model.state_dict(), folder / "model" / "model.safetensors", {"format": "pt"})
    _tokenizer().save_pretrained(folder / "model")
    return inf.audit(
        str(folder / "model"),
        str(folder / "train.jsonl"),
        str(folder / "trusted.jsonl"),
        out=folder,
        noise_column="noise",
        layers="embedding,attention,mlp,head",
        projection="rademacher:16x16",
        seed=seed,
        progress=progress,
    )


def next_commands(out: str | Path) -> list[str]:
    """What to try on the folder of a demo: commands for a shell, in the folder that the demo was run in."""
    folder = Path(out)
    at = {
        name: shlex.quote(str(folder / name))
        for name in ("stores/train", "model", "config.json", "again", "cleaned.jsonl")
    }
    return [
        f"influence-fast search {at['stores/train']} --model {at['model']} --text 'the plot not dull' --label 1 -k 5",
        f"influence-fast clean {shlex.quote(str(folder))} --drop 20% --out {at['cleaned.jsonl']}",
        f"influence-fast audit --config {at['config.json']} --out {at['again']}",
    ]


def _write_data(folder: Path, files: dict[Path, bytes]) -> None:
    """Write the data, unless another demo or something else is there."""
    there = [path for path in files if path.exists()]
    if any(path.read_bytes() != files[path] for path in there):
        raise InputError(f"out: {folder} holds another demo; choose a new folder")
    if not there and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"out: {folder} holds something else than a demo; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        atomic_write(path, content)


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _tokenizer() -> Any:
    """A token for each word, after one that begins the sentence."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(_WORDS)}, "[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", unk_token="[PAD]")


def _model() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=len(_WORDS),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        pad_token_id=0,
        architectures=["BertForSequenceClassification"],
    )
    return BertForSequenceClassification(config)


def _fit(model: nn.Module, rows: list[dict[str, Any]], progress: bool, epochs: int = 8, batch: int = 32) -> None:
    ids = _tokenizer()([row["text"] for row in rows], padding=True, return_tensors="pt")["input_ids"]
    labels = torch.tensor([row["label"] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    steps = epochs * -(-len(rows) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=steps, pct_start=0.1)
    model.train()
    with tqdm(total=steps, desc="training", delay=2, disable=None if progress else True) as bar:
        for _ in range(epochs):
            for part in torch.randperm(len(rows)).split(batch):
                loss = nn.functional.cross_entropy(_logits(model, ids[part]), labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=(ids != 0).long()).logits
