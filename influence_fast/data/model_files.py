"""Folders of models and adapters, looked through before a library loads them: JSON, weights and what configs ask for.

A folder may come from a stranger. Libraries refuse its code and its pickles; what they take on trust is checked here: names
of other files, modules to import, sizes that no file bears out, and types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from influence_fast._json import check_types, read_object
from influence_fast.errors import InputError

_DOCUMENTS = ("config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json")
# What libraries do not check themselves.
_CONFIG = {
    "model_type": str,
    "architectures": list[str] | None,
    "id2label": dict | None,
    "label2id": dict | None,
    "num_labels": int,
    "problem_type": str | None,
    "auto_map": dict | None,
}
# Numbers of a model for each byte of its files: 4-bit weights have two, and half as many are tied to others.
_NUMBERS_PER_BYTE, _FREE_NUMBERS = 4, 1 << 24


def check_files(folder: Path) -> None:
    """Raise InputError for a file of a model's folder that is damaged, or that names others outside of it."""
    if not folder.is_dir():
        return
    for path in [*(folder / name for name in _DOCUMENTS), *folder.glob("*.index.json")]:
        if path.exists():
            document = read_object(path, "model")
            if path.name.endswith(".index.json"):
                _check_index(path, document)
    headers = {path: _header(path) for path in sorted(folder.glob("*.safetensors"))}
    config = folder / "config.json"
    if config.exists():
        given = read_object(config, "model")
        check_types(given, _CONFIG, f"model: {config}: ")
        if headers:
            _check_depth(config, given, sum(map(len, headers.values())))


def check_adapter(folder: Path, adapter: Mapping[str, Any]) -> None:
    """Raise InputError for entries of an adapter's config of wrong types, or that would import a module of their choice."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    path = folder / "adapter_config.json"
    check_types(
        adapter, {"peft_type": str, "base_model_name_or_path": str, "task_type": str | None}, f"model: {path}: "
    )
    if "base_model_name_or_path" not in adapter:
        raise InputError(f"model: {path}: 'base_model_name_or_path' is missing")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(adapter.get("peft_type"))
    if kind is None:
        raise InputError(f"model: {path}: peft_type: no adapter is called {adapter.get('peft_type')!r}")
    if adapter.get("megatron_config") is not None:
        raise InputError(f"model: {path}: megatron_config: it names a module to import, which is refused")
    hints = {name: _as_json(hint) for name, hint in get_type_hints(kind).items()}
    check_types(adapter, hints, f"model: {path}: ")


def check_size(folder: Path, config: Any, make: Callable[[], nn.Module]) -> None:
    """Raise InputError where a model of this config is larger than the files of its folder can be, before it is made.

    ``make`` makes the model; it is called on the meta device, where nothing takes memory, and only where the two largest
    numbers of the config could mean more than there is.
    """
    held = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    most = _NUMBERS_PER_BYTE * held + _FREE_NUMBERS
    sizes = sorted(_sizes(config.to_dict()))[-2:]
    if not held or math.prod(sizes) <= most:
        return
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in make().parameters())
    if numbers > most:
        path = folder / "config.json"
        raise InputError(f"model: {path}: describes {numbers:,} numbers, and the weights have {held:,} bytes")


def _sizes(document: Mapping[str, Any]) -> Iterator[int]:
    for value in document.values():
        if isinstance(value, Mapping):
            yield from _sizes(value)
        elif isinstance(value, int) and value > 1:
            yield value


def _check_index(path: Path, document: Mapping[str, Any]) -> None:
    files = document.get("weight_map")
    if not isinstance(files, dict):
        raise InputError(f"model: {path}: weight_map: expected an object, got {files!r:.80}")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(
                f"model: {path}: weight_map: expected a file of this folder for {name!r}, got {file!r:.80}"
            )


def _header(path: Path) -> list[list[int]]:
    """Shapes of the tensors in a safetensors file; its header is checked against its size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"model: {path}: damaged, or no safetensors file ({error})") from None


def _check_depth(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """A model of more layers than there are tensors would be made layer by layer before anything is missed."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_depth(path, value, tensors)
        deep = "layers" in name or name in ("n_layer", "depth", "num_blocks", "num_experts", "num_local_experts")
        if deep and isinstance(value, int) and value > max(64, 16 * tensors):
            raise InputError(f"model: {path}: {name}: {value} of them, and the weights hold {tensors} tensors")


def _as_json(hint: Any) -> Any:
    """A config's type hint as JSON bears it: an int may be written as a float, a set as a list, an enum as a text."""
    return float if hint is int else hint
