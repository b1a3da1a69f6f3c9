"""A model's folder from a stranger: one sentence for what is damaged or asks for too much, and no code runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from influence_fast import InputError
from influence_fast.data.models import load_model


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    for name in ("model", "adapter"):
        shutil.copytree(folder / name, tmp_path / name)
    return tmp_path


def changed(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **entries}), encoding="utf-8")


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": 3}, "config.json: model_type: expected a text, got 3"),
        ({"id2label": True}, "config.json: id2label: expected an object or null, got True"),
        ({"architectures": "Bert"}, "config.json: architectures: expected a list of texts or null, got 'Bert'"),
        # By transformers 5, or by torch.
        (
            {"hidden_size": "16"},
            r"config.json: .*'hidden_size' expected int, got str|must be tuple of ints, ?but got str",
        ),
        ({"hidden_size": 10**9}, r"config.json: describes [\d,]+ numbers, and the weights have [\d,]+ bytes"),
        ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers: 1000000000 of them, and the weights hold"),
        ({"vocab_size": 10**30}, "cannot load"),
        ({"model_type": "nothing"}, "cannot load"),
    ],
)
def test_config(copied: Path, entries: dict[str, Any], message: str) -> None:
    changed(copied / "model" / "config.json", **entries)
    refused(copied / "model", message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"r": "4"}, "adapter_config.json: r: expected a number, got '4'"),
        (
            {"target_modules": 7},
            "adapter_config.json: target_modules: expected a list of texts or a text or null, got 7",
        ),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: expected a text, got None"),
        ({"peft_type": "NOTHING"}, "peft_type: no adapter is called 'NOTHING'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config: it names a module to import"),
        ({"r": -1}, "cannot load"),
    ],
)
def test_adapter_config(copied: Path, entries: dict[str, Any], message: str) -> None:
    changed(copied / "adapter" / "adapter_config.json", **entries)
    refused(copied / "adapter", message)


@pytest.mark.parametrize("name", ["model/config.json", "adapter/adapter_config.json", "model/tokenizer_config.json"])
def test_documents_that_are_none(copied: Path, name: str) -> None:
    for text in ("", "[]", "[" * 100_000, '{"a": '):
        (copied / name).write_text(text, encoding="utf-8")
        refused((copied / name).parent, f"cannot read .*{Path(name).name}")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_weights_that_are_cut_short(copied: Path, length: int) -> None:
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        data = (copied / name).read_bytes()
        (copied / name).write_bytes(data[:length])
        refused((copied / name).parent, f"{Path(name).name}: damaged, or no safetensors file")
        (copied / name).write_bytes(data)


def test_an_index_names_files_of_its_folder(copied: Path) -> None:
    index = copied / "model" / "model.safetensors.index.json"
    for given, message in (
        ({"a": "../adapter/adapter_model.safetensors"}, "expected a file of this folder for 'a', got '../adapter"),
        ({"a": "/etc/passwd"}, "expected a file of this folder"),
        ({"a": 3}, "expected a file of this folder for 'a', got 3"),
        ([], r"weight_map: expected an object, got \[\]"),
    ):
        index.write_text(json.dumps({"weight_map": given}), encoding="utf-8")
        refused(copied / "model", message)


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_code_runs(copied: Path) -> None:
    """Neither from pickles nor from modules that a config names."""
    ran = copied / "ran"
    (copied / "model" / "model.safetensors").unlink()
    for write in (
        lambda path: path.write_bytes(pickle.dumps({"a": Runs(ran)})),
        lambda path: torch.save({"a": Runs(ran)}, path),
    ):
        write(copied / "model" / "pytorch_model.bin")
        refused(copied / "model", "are a pickle of more than tensors, which could run code and is refused")
    (copied / "model" / "own.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n", encoding="utf-8")
    changed(
        copied / "model" / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"},
    )
    refused(copied / "model", "cannot load")
    changed(
        copied / "adapter" / "adapter_config.json", auto_mapping={"base_model_class": "Model", "parent_library": "own"}
    )
    changed(copied / "adapter" / "adapter_config.json", base_model_name_or_path=str(copied / "model"))
    refused(copied / "adapter", "cannot load")
    assert not ran.exists()
