"""Models and data from files: what is loaded, tokenised and checked before the first forward."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.errors import InputError
from influence_fast.gradients.losses import IGNORED

TASKS = ("auto", "classification", "causal-lm")


@dataclass
class Samples:
    """Rows for the model, and what is shown of them."""

    rows: list[dict[str, Any]]
    texts: list[str] | None
    labels: list[Any] | None
    noise: Tensor | None
    ids: list[int | str] | None


def load_model(path: str, task: str = "auto") -> tuple[nn.Module, Any]:
    """A model and its tokenizer from a folder of a model or an adapter, or from the hub."""
    import transformers as hf

    folder = Path(path)
    looks_local = folder.is_absolute() or path.startswith(".") or path.count("/") != 1
    if not folder.is_dir() and looks_local:
        raise InputError(f"model: no folder {path!r}")
    adapter = folder / "adapter_config.json"
    if folder.is_dir() and not adapter.exists() and not (folder / "config.json").exists():
        raise InputError(f"model: {path!r} has neither config.json nor adapter_config.json")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    try:
        if adapter.exists():
            return _load_adapter(folder, json.loads(adapter.read_text()), task)
        kind = _architecture(hf.AutoConfig.from_pretrained(path), task)
        return getattr(hf, kind).from_pretrained(path), _load_tokenizer(path)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model: cannot load {path!r} ({str(error).strip().splitlines()[0]})") from error


def _load_adapter(folder: Path, adapter: dict[str, Any], task: str) -> tuple[nn.Module, Any]:
    import transformers as hf
    from peft import PeftModel
    from safetensors import safe_open

    base = str(adapter.get("base_model_name_or_path"))
    if not Path(base).is_dir() and (folder / base).is_dir():
        base = str(folder / base)
    kinds = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}
    kind = kinds.get(str(adapter.get("task_type"))) or _architecture(hf.AutoConfig.from_pretrained(base), task)
    settings = {}
    weights = folder / "adapter_model.safetensors"
    if kind == kinds["SEQ_CLS"] and weights.exists():
        with safe_open(weights, "pt") as file:
            heads = [
                file.get_slice(name).get_shape()[0]
                for name in file.keys()  # noqa: SIM118 (not a mapping)
                if name.endswith("weight") and ".lora_" not in name
            ]
        settings = {"num_labels": min(heads)} if heads else {}
    network = getattr(hf, kind).from_pretrained(base, **settings)
    own = (folder / "tokenizer_config.json").exists()
    return PeftModel.from_pretrained(network, str(folder)), _load_tokenizer(str(folder) if own else base)


def _architecture(config: Any, task: str) -> str:
    names = " ".join(getattr(config, "architectures", None) or [])
    if task == "auto":
        task = "causal-lm" if "ForCausalLM" in names or "LMHead" in names else "classification"
    return "AutoModelForCausalLM" if task == "causal-lm" else "AutoModelForSequenceClassification"


def _load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_table(argument: str, path: str) -> Any:
    """Rows of a JSONL, CSV or Parquet file, a saved data set, or a hub name: a ``datasets.Dataset``."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    file = Path(path)
    readers = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
    if file.is_dir():
        try:
            found = datasets.load_from_disk(path, keep_in_memory=True)
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"{argument}: {path!r} is no folder of a saved data set ({error})") from None
        return found["train"] if isinstance(found, datasets.DatasetDict) else found
    if not file.exists():
        if file.suffix or path.count("/") > 1:
            raise InputError(f"{argument}: no file {path!r}")
        name, _, split = path.partition(":")
        try:
            return datasets.load_dataset(name, split=split or "train")
        except Exception as error:
            raise InputError(f"{argument}: {path!r} is no file, and no data set on the hub ({error})") from None
    if file.suffix not in readers:
        raise InputError(f"{argument}: expected a file ending in {', '.join(readers)}, got {path!r}")
    if file.stat().st_size == 0:
        raise InputError(f"{argument}: {path!r} is empty")
    with tempfile.TemporaryDirectory() as cache:
        extra = {"sep": "\t"} if file.suffix == ".tsv" else {}
        try:
            return datasets.load_dataset(
                readers[file.suffix], data_files=path, split="train", cache_dir=cache, keep_in_memory=True, **extra
            )
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            reason = error.__cause__ or error
            raise InputError(f"{argument}: cannot read {path!r} ({str(reason).strip().splitlines()[0]})") from None


def task_of(task: str, model: nn.Module, rows: Any) -> str:
    """``auto`` made definite, by the labels of rows that are tokenised already or by the model's class."""
    if task != "auto":
        return task
    if "input_ids" in rows[0] and "labels" in rows[0]:
        return "causal-lm" if isinstance(rows[0]["labels"], list) else "classification"
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__  # type: ignore[operator]
    return "causal-lm" if "CausalLM" in name or "LMHead" in name else "classification"


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. ``text`` may name several, joined by commas: a text pair."""

    text: str = "text"
    label: str = "label"
    answer: str | None = None
    noise: str | None = None


def prepare(argument: str, rows: Any, columns: Columns, task: str, model: nn.Module, tokenizer: Any) -> Samples:
    """Rows for the model. Rows that hold ``input_ids`` and ``labels`` pass as they are; errors name ``argument``."""
    there = list(rows[0])
    ids = [row["id"] for row in rows] if "id" in there else None
    noise = _flags(argument, columns.noise, _column(argument, rows, columns.noise)) if columns.noise else None
    if "input_ids" in there and "labels" in there:
        kept = [dict(row) for row in rows]
        said = [str(row["text"]) for row in rows] if "text" in there else None
        return Samples(kept, said, [row["labels"] for row in kept] if task == "classification" else None, noise, ids)
    if tokenizer is None:
        raise InputError(f"tokenizer: none is given, and {argument} has no 'input_ids' and 'labels' columns")
    parts = [_column(argument, rows, name) for name in columns.text.split(",")]
    texts = list(zip(*parts, strict=True))
    for row, text in enumerate(texts):
        if not all(isinstance(part, str) for part in text):
            raise InputError(f"{argument}: row {row} has no text in {columns.text!r}")
    shown = [" | ".join(text) for text in texts]
    if task == "classification":
        labels = _labels(argument, columns.label, _column(argument, rows, columns.label), model)
        encoded = tokenizer(*parts, verbose=False)
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
        prepared = [{**{key: encoded[key][i] for key in keys}, "labels": label} for i, label in enumerate(labels)]
        return Samples(prepared, shown, labels, noise, ids)
    if columns.answer is None:
        return Samples([_causal(tokenizer, text, None) for text in shown], shown, None, noise, ids)
    answers = _column(argument, rows, columns.answer)
    prepared = [_causal(tokenizer, text, answer) for text, answer in zip(shown, answers, strict=True)]
    return Samples(prepared, [f"{text}{answer}" for text, answer in zip(shown, answers, strict=True)], None, noise, ids)


def _causal(tokenizer: Any, text: str, answer: str | None) -> dict[str, Any]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    if answer is None:
        return {"input_ids": ids, "labels": ids}
    tail = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    tail = [*tail, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else tail
    return {"input_ids": ids + tail, "labels": [IGNORED] * len(ids) + tail}


def _column(argument: str, rows: Any, name: str) -> list[Any]:
    if name not in rows[0]:
        raise InputError(f"{argument}: has no column {name!r}; there are {', '.join(rows[0])}")
    return [row[name] for row in rows]


def _labels(argument: str, column: str, values: list[Any], model: nn.Module) -> list[int]:
    known = getattr(getattr(model, "config", None), "label2id", None) or {}
    out = []
    for row, value in enumerate(values):
        if isinstance(value, str):
            if value not in known:
                raise InputError(
                    f"{argument}: row {row} has {column} {value!r}, the model knows {', '.join(map(str, known))}"
                )
            value = known[value]
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{argument}: row {row} has {column} {value!r}, expected an int or a class name")
        out.append(value)
    return out


def _flags(argument: str, column: str | None, values: list[Any]) -> Tensor:
    bad = [row for row, value in enumerate(values) if value not in (0, 1, True, False)]
    if bad:
        raise InputError(f"{argument}: row {bad[0]} has {column} {values[bad[0]]!r}, expected true or false")
    flags = torch.tensor([bool(value) for value in values])
    if flags.all() or not flags.any():
        raise InputError(
            f"{argument}: {column!r} marks {int(flags.sum())} of {len(flags)} samples; nothing to tell apart"
        )
    return flags
