"""A tiny model, adapter and data on disk, and the command line run on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import models
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from influence_fast.cli import main

WORDS = [f"w{i}" for i in range(models.VOCAB - 2)]


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def sentences(count: int, seed: int) -> list[dict]:
    random = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(3, 9, (), generator=random))
        words = [WORDS[int(w)] for w in torch.randint(len(WORDS), (length,), generator=random)]
        rows.append({"text": " ".join(words), "label": i % 3, "noise": i % 5 == 0})
    return rows


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def options(folder: Path, **changes: object) -> list[object]:
    given = {"model": folder / "model", "train": folder / "train.jsonl", "queries": folder / "queries.jsonl", **changes}
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
