"""Models, adapters and tokenizers from folders or the hub."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import nn

from influence_fast._json import read_object
from influence_fast.data.model_files import check_adapter, check_files, check_size
from influence_fast.data.tasks import head_named
from influence_fast.errors import InputError

_AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "preference": "AutoModelForCausalLM",
}
# By the task types of PEFT.
_ADAPTERS = {
    "SEQ_CLS": _AUTO["classification"],
    "CAUSAL_LM": _AUTO["causal-lm"],
    "TOKEN_CLS": _AUTO["token-classification"],
    "QUESTION_ANS": _AUTO["question-answering"],
    "SEQ_2_SEQ_LM": _AUTO["seq2seq"],
}


def load_model(path: str, task: str = "auto", allow_new_weights: bool = False) -> tuple[nn.Module, Any]:
    """A model and its tokenizer from a folder of a model or an adapter, or from the hub.

    Raises:
        InputError: what cannot be loaded; weights that the model needs and the files lack, or the other way round, which
            is how a head drawn at random comes about, unless ``allow_new_weights``.
    """
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
    check_files(folder)
    try:
        if adapter.exists():
            return _load_adapter(folder, read_object(adapter, "model"), task, allow_new_weights)
        kind = _architecture(hf.AutoConfig.from_pretrained(path, trust_remote_code=False), task)
        model, unmatched = _load(path, kind)
        if not allow_new_weights:
            _refuse(path, type(model).__name__, unmatched)
        return model, _load_tokenizer(path)
    except InputError:
        raise
    except _failures() as error:
        if isinstance(error, UnpicklingError):
            raise InputError(
                f"model: the weights of {path!r} are a pickle of more than tensors, which could run code and is refused; "
                "save them as safetensors"
            ) from error
        if type(error).__module__.startswith("huggingface_hub"):
            raise InputError(f"model: {folder / 'config.json'}: {_first_line(error)}") from error
        raise InputError(f"model: cannot load {path!r} ({_first_line(error)})") from error


def _failures() -> tuple[type[Exception], ...]:
    """What libraries raise over files of wrong types, unknown kinds or cut short; our own mistakes are among them, and the
    cause is kept."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    own = (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError, AssertionError)
    return (*own, ImportError, EOFError, UnpicklingError, SafetensorError, StrictDataclassError)


def _first_line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    return text if len(text) <= 300 else f"{text[:297]}..."


def _load(path: str, kind: str, **settings: Any) -> tuple[nn.Module, dict[str, list[str]]]:
    """A model by one of transformers' Auto classes, and names of the weights that its files lack or have too many."""
    import transformers as hf

    if Path(path).is_dir():
        config = hf.AutoConfig.from_pretrained(path, trust_remote_code=False, **settings)
        check_size(Path(path), config, lambda: getattr(hf, kind).from_config(config, trust_remote_code=False))
    model, info = getattr(hf, kind).from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **settings
    )
    # A weight of another size comes with both sizes.
    other_size = [name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]]
    return model, {
        "missing": sorted(set(info["missing_keys"]) - set(other_size)),
        "of another size": sorted(other_size),
        "unexpected": sorted(info["unexpected_keys"]),
    }


def _refuse(path: str, kind: str, unmatched: dict[str, list[str]]) -> None:
    found = [
        f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in unmatched.items()
        if names
    ]
    if found:
        raise InputError(
            f"model: {path!r} holds other weights than a {kind} has ({'; '.join(found)}); missing ones would be drawn at "
            "random. Load the task that it was trained for, or say allow_new_weights (--allow-new-weights)"
        )


def _load_adapter(folder: Path, adapter: dict[str, Any], task: str, allow_new_weights: bool) -> tuple[nn.Module, Any]:
    import transformers as hf
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    check_adapter(folder, adapter)
    base = str(adapter.get("base_model_name_or_path"))
    if not Path(base).is_dir() and (folder / base).is_dir():
        base = str(folder / base)
    kind = _ADAPTERS.get(str(adapter.get("task_type")))
    kind = kind or _architecture(hf.AutoConfig.from_pretrained(base, trust_remote_code=False), task)
    settings = {}
    weights = folder / "adapter_model.safetensors"
    shapes: dict[str, list[int]] = {}
    if weights.exists():
        with safe_open(weights, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if kind == _ADAPTERS["SEQ_CLS"]:
        heads = [shape[0] for name, shape in shapes.items() if name.endswith("weight") and ".lora_" not in name]
        settings = {"num_labels": min(heads)} if heads else {}
    network, unmatched = _load(base, kind, **settings)
    own = (folder / "tokenizer_config.json").exists()
    tokenizer = _load_tokenizer(str(folder) if own else base)
    _add_tokens(str(folder), network, shapes, tokenizer, allow_new_weights)
    # Trainable, so that its parameters tell what training changed.
    model = PeftModel.from_pretrained(network, str(folder), is_trainable=True).eval()
    if shapes and not allow_new_weights:
        # What the base lacks, such as a head, the adapter may bring; what else the base has, such as another, is unused.
        lacking = [
            name
            for name in [*unmatched["missing"], *unmatched["of another size"]]
            if not any(given == name or given.endswith(f".{name}") for given in shapes)
        ]
        needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        _refuse(
            str(folder),
            type(network).__name__,
            {
                "missing": [*lacking, *sorted(needed - set(shapes))],
                "unexpected": sorted(set(shapes) - needed - set(model.state_dict())),
            },
        )
    return model, tokenizer


def _add_tokens(
    path: str, network: nn.Module, shapes: dict[str, list[int]], tokenizer: Any, allow_new_weights: bool
) -> None:
    """Give the base as many word vectors as the adapter has, which was trained with tokens that the base lacks."""
    try:
        words, head = network.get_input_embeddings(), network.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    there = getattr(words, "num_embeddings", None)
    if there is None:
        return
    names = [f"{name}.weight" for name, module in network.named_modules() if module is words or module is head]
    tables = [shape[0] for given, shape in shapes.items() if any(given.endswith(name) for name in names)]
    saved = max(tables, default=None)
    if saved is not None and saved != there:
        network.resize_token_embeddings(saved, mean_resizing=False)  # type: ignore[operator]
    elif saved is None and tokenizer is not None and len(tokenizer) > there:
        if not allow_new_weights:
            raise InputError(
                f"model: the tokenizer of {path!r} has {len(tokenizer)} tokens, its base {there} word vectors, and the "
                "adapter brings none for the others; they would be drawn at random. Save it with its embeddings, or say "
                "allow_new_weights (--allow-new-weights)"
            )
        network.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # type: ignore[operator]


def _architecture(config: Any, task: str) -> str:
    """The Auto class of a task; ``auto`` is the one that the config says it was saved as, or else a classifier."""
    if task != "auto":
        return _AUTO.get(task, _AUTO["classification"])
    names = " ".join(getattr(config, "architectures", None) or [])
    return _AUTO.get(head_named(names, config) or "classification", _AUTO["classification"])


def _load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None
