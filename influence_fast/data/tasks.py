"""What a model was made for: the loss that its head, its config and a row's labels call for, and what its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from influence_fast.errors import InputError

# Label of a token that is no target.
IGNORED = -100
LOSSES = (
    "auto",
    "classification",
    "causal-lm",
    "causal-lm-sum",
    "masked-lm",
    "token-classification",
    "question-answering",
    "multi-label",
    "regression",
    "seq2seq",
    "multiple-choice",
    "preference",
)
CLASS_LOSSES = ("classification", "multiple-choice")
"""Losses of logits ``(N, classes)`` and one class a row."""
TOKEN_LOSSES = ("causal-lm", "causal-lm-sum", "masked-lm", "token-classification")
"""Losses with a label for each input token."""
VOCABULARY_LOSSES = ("causal-lm", "causal-lm-sum", "masked-lm", "seq2seq", "preference")
"""Losses whose targets are token ids."""
SPAN = ("start_positions", "end_positions")
TARGETS = ("labels", *SPAN)
"""Columns that the loss reads, not the forward."""
# Parts of class names, the first that fits; what is no head of one task is not here.
_HEADS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForMultipleChoice": "multiple-choice",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "masked-lm",
    "WithLMHead": "masked-lm",
    "XLNetLMHead": "masked-lm",
    "ForCausalLM": "causal-lm",
    "BertGenerationDecoder": "causal-lm",
    "LMHead": "causal-lm",
}
# Heads of encoder-decoders, whose config says whether there is an encoder.
_SEQ2SEQ = ("ForConditionalGeneration", "EncoderDecoderModel", "MarianMTModel", "ForTextToText")
# Causal models whose own loss takes each label at its own place, not one token later: decoders of encoder-decoders.
_UNSHIFTED = ("Bart", "Pegasus", "Blenderbot", "BlenderbotSmall", "Marian", "Mvp", "TrOCR", "Whisper", "CpmAnt")
_PROBLEMS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multi-label",
}
# Parameters of a forward that are no data of a row.
_NO_DATA = {"self", "return_dict", "use_cache", "cache", "past_key_values", "cache_position", "logits_to_keep"}
# Taken where a forward's parameters cannot be known.
_USUAL = ("input_ids", "token_type_ids", "position_ids", "attention_mask")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model with a config inside PEFT, ``torch.compile`` and wrappers that add no parameter (DDP, Lightning)."""
    while True:
        if callable(base := getattr(model, "get_base_model", None)):
            inner = base()
        elif hasattr(model, "config") and not hasattr(model, "_orig_mod"):
            return model
        else:
            inner = next((part for part in model.modules() if part is not model and hasattr(part, "config")), None)
        # A PEFT model has all its parameters in its base.
        if inner is None or inner is model or _has_beside(model, inner):
            return model
        model = inner


def _has_beside(model: nn.Module, part: nn.Module) -> bool:
    """Whether a model has parameters that its part has not; asked at every batch, so the part is not walked through."""
    left, seen, found = [model], {id(part)}, []
    while left:
        module = left.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found += [parameter for parameter in module._parameters.values() if parameter is not None]
            left += [child for child in module._modules.values() if child is not None]
    known = {id(parameter) for parameter in part.parameters()} if found else set()
    return any(id(parameter) not in known for parameter in found)


def config_of(model: nn.Module) -> Any:
    """The config of the text model: its own, of what it wraps, or of its only part that has one; None without any."""
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    if config is None:
        # Parts share the config of the whole that they belong to, which comes first.
        config = next((found for part in inner.modules() if (found := getattr(part, "config", None)) is not None), None)
    text = getattr(config, "text_config", None)
    return config if text is None else text


def head_config(model: nn.Module) -> Any:
    """The config that counts the head's labels: the model's own, not that of its text model; None without any."""
    own = getattr(unwrapped(model), "config", None)
    return config_of(model) if own is None else own


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def inputs_of(model: nn.Module) -> frozenset[str]:
    """Names that the model's forward gives to its inputs, those of the loss and of the call's options left out."""
    named: set[str] = set()
    for module in (model, unwrapped(model)):
        parameters = inspect.signature(module.forward).parameters.values()
        named |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            return frozenset(named - {*TARGETS, *_NO_DATA})
    # A forward of keywords alone says nothing about them.
    return frozenset(named - {*TARGETS, *_NO_DATA}) if "input_ids" in named else frozenset(_USUAL)


def takes_mask(model: nn.Module) -> bool:
    """Whether the forward can be called with an ``attention_mask``."""
    parameters = inspect.signature(model.forward).parameters
    return "attention_mask" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def head_of(model: nn.Module) -> str | None:
    """The loss that the class of the model's head names; None where it names none. A sequence classifier's is
    ``classification``, whatever its ``problem_type``."""
    inner = unwrapped(model)
    name = type(inner).__name__
    if any(f"{part}ForCausalLM" in name for part in _UNSHIFTED):
        return "masked-lm"
    return head_named(name, getattr(inner, "config", None))


def head_named(name: str, config: Any) -> str | None:
    """The loss of a head by its class's name and the model's config."""
    if any(part in name for part in _SEQ2SEQ):
        return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm"
    return next((kind for part, kind in _HEADS.items() if part in name), None)


def loss_of(model: nn.Module, row: Mapping[str, Any]) -> str:
    """``auto`` made definite, by the head's class, the config's ``problem_type`` and the labels of the first row."""
    head, labels = head_of(model), row.get("labels")
    if labels is None and all(row.get(name) is not None for name in SPAN):
        return "question-answering"
    if head == "classification":
        config = head_config(model)
        given = getattr(config, "problem_type", None)
        if given is not None:
            return _PROBLEMS[given]
        if getattr(config, "num_labels", None) == 1:
            return "regression"
        if isinstance(labels, list):
            if labels and all(isinstance(label, float) for label in labels):
                return "multi-label"
            raise _untold(model, labels)
        return head
    if head == "causal-lm" and isinstance(labels, list) and labels and isinstance(labels[0], list) and len(labels) == 2:
        return "preference"
    if head is not None:
        return head
    if isinstance(labels, float):
        return "regression"
    if isinstance(labels, int):
        return "classification"
    raise _untold(model, labels)


def begins(positions: Sequence[int]) -> list[int]:
    """Where the texts of a block begin, by its ``position_ids``."""
    return [place for place, position in enumerate(positions) if position == 0]


def is_packed(row: Mapping[str, Any]) -> bool:
    """Whether a row holds more than one text: its positions begin anew."""
    positions = row.get("position_ids")
    return isinstance(positions, list) and len(begins(positions)) > 1


def longest_row(model: nn.Module) -> int | None:
    """Tokens that a row may have at most; None where the model does not say."""
    config = getattr(model, "config", None)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name.rsplit(".")[-1]:
            # RoBERTa numbers positions from behind the padding index.
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _untold(model: nn.Module, labels: Any) -> InputError:
    shown = repr(labels) if len(repr(labels)) < 60 else repr(labels)[:57] + "..."
    return InputError(
        f"loss: 'auto' cannot tell the loss of a {type(unwrapped(model)).__name__} from labels such as {shown}; "
        f"name one of {', '.join(LOSSES[1:])}, or give a callable"
    )
