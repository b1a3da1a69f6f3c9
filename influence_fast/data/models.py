"""Models, adapters and tokenizers from folders or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from influence_fast.errors import InputError


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
    return PeftModel.from_pretrained(network, str(folder), is_trainable=True).eval(), _load_tokenizer(
        str(folder) if own else base
    )


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
