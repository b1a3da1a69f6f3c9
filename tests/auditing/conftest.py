"""A tiny model, its adapter and data on disk, made once: no test writes there."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from audits import sentences, tokenizer, write_rows


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it, a causal model, and data."""
    path = tmp_path_factory.mktemp("audit")
    torch.manual_seed(0)
    models.make("bert").save_pretrained(path / "model")
    adapted = models.make("bert", lora=True)
    adapted.peft_config["default"].base_model_name_or_path = str(path / "model")
    adapted.save_pretrained(path / "adapter")
    models.make("llama", "causal").save_pretrained(path / "causal")
    for name in ("model", "causal"):
        tokenizer().save_pretrained(path / name)
    write_rows(path / "train.jsonl", sentences(20, 1))
    write_rows(path / "queries.jsonl", sentences(9, 2))
    return path
