"""Every tuner that the installed peft has, on a tiny Llama, GPT-2 and BERT."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from .cases import SQUARE, settled, task_rows
from .check import Case
from .configs import make_model, stir

# Base model -> task, peft's name of it, modules that adapters go on.
BASES: dict[str, tuple[str, str, list[str]]] = {
    "llama": ("causal", "CAUSAL_LM", ["q_proj", "v_proj", "down_proj"]),
    "gpt2": ("causal", "CAUSAL_LM", ["c_attn", "c_fc"]),
    "bert": ("sequence", "SEQ_CLS", ["query", "value"]),
    "mixtral": ("causal", "CAUSAL_LM", ["q_proj", "v_proj"]),
}
_PROMPT = {"num_virtual_tokens": 3}
# Tuner or variant -> settings. Names are peft's own types in lower case; variants have "lora " before them.
_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "lora rslora": {"r": 2, "use_rslora": True},
    "lora dora": {"r": 2, "use_dora": True},
    "lora bias": {"r": 2, "bias": "all"},
    "lora dropout": {"r": 2, "lora_dropout": 0.3},
    "lora own bias": {"r": 2, "lora_bias": True},
    "lora all-linear": {"r": 2, "target_modules": "all-linear"},
    "lora pissa": {"r": 2, "init_lora_weights": "pissa"},
    "lora olora": {"r": 2, "init_lora_weights": "olora"},
    "lora embeddings": {"r": 2},
    "lora modules_to_save": {"r": 2},
    "lora trainable tokens": {"r": 2, "trainable_token_indices": [7, 8, 9]},
    "lora expert parameters": {"r": 2},
    "lora layer_replication": {"r": 2, "layer_replication": [[0, 2], [1, 2]]},
    "adalora": {"init_r": 3, "target_r": 2, "total_step": 10, "orth_reg_weight": 1e-12},
    "adamss": {"r": 4, "num_subspaces": 2, "subspace_rank": 1},
    "adaption_prompt": {"adapter_len": 3, "adapter_layers": 1, "target_modules": None},
    "beft": {},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 8},
    "cartridge": {**_PROMPT, "num_frozen_tokens": 1},
    "cpt": {"cpt_token_ids": [7, 8, 9], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "deft": {"r": 2},
    "delora": {"r": 2},
    "fourierft": {"n_frequency": 10},
    "frod": {},
    "glora": {"r": 2},
    "gralora": {"r": 4, "alpha": 4, "gralora_k": 2},
    "hira": {"r": 2},
    "hra": {"r": 2},
    "ia3": {},
    "lily": {"r": 2},
    "ln_tuning": {"target_modules": None},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "miss": {"r": 2},
    "multitask_prompt_tuning": {**_PROMPT, "num_tasks": 2, "num_ranks": 2},
    "oft": {"oft_block_size": 4},
    "osf": {"effective_rank": 4},
    "p_tuning": {**_PROMPT, "encoder_hidden_size": 8},
    "peanut": {"r": 2},
    "poly": {"r": 2, "n_tasks": 2, "n_skills": 2},
    "prefix_tuning": dict(_PROMPT),
    "prompt_tuning": dict(_PROMPT),
    "psoft": {"r": 4},
    "pvera": {"r": 4},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "shadow": {"r": 2, "target_modules": r".*\.layers\.\d+", "auxiliary_loss_weight": 0.0},
    "shira": {"r": 2},
    "supertuning": {},
    "tinylora": {"r": 2, "u": 4},
    "trainable_tokens": {"token_indices": [7, 8, 9], "target_modules": None},
    "unilora": {"r": 2, "theta_d_length": 16},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 8},
    "vera": {"r": 4},
    "waveft": {"n_frequency": 10},
    "xlora": {},
}
_PROMPTS = ("cartridge", "cpt", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning")
_WITHOUT_TARGETS = (*_PROMPTS, "adaption_prompt", "ln_tuning", "trainable_tokens", "xlora")
_EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}
# Tuners that refuse GPT-2's Conv1D, or adapt nothing there.
_LINEAR_ALONE = (
    *(
        "adamss",
        "beft",
        "boft",
        "c3a",
        "delora",
        "glora",
        "hra",
        "lily",
        "loha",
        "lokr",
        "miss",
        "oft",
        "osf",
        "peanut",
    ),
    *("poly", "psoft", "road", "shira", "supertuning"),
)
_WITH_TASKS = ("multitask_prompt_tuning", "poly")


def _tuners() -> list[str]:
    """All types that peft knows, and variants of LoRA; a type without settings here gets none."""
    known = [str(getattr(kind, "value", kind)).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    return sorted({*known, *_SETTINGS})


TUNERS = _tuners()


def bases_of(tuner: str) -> tuple[str, ...]:
    if tuner == "lora expert parameters":
        return ("mixtral",)
    if tuner in ("adaption_prompt", "cpt", "cartridge", "lora layer_replication", "shadow", "xlora"):
        return ("llama",)
    if tuner in _LINEAR_ALONE:
        return ("llama", "bert")
    return ("llama", "gpt2", "bert")


def adapter_case(tuner: str, base: str) -> Case:
    """The base frozen, the adapter and what it trains beside stirred, so that no trained number is zero."""
    task, kind, targets = BASES[base]
    # Some tuners begin with a decomposition that they do in float32 alone.
    model = make_model(base, task).float()
    settings: dict[str, Any] = dict(_SETTINGS.get(tuner, {}))
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[_type(tuner)]
    if tuner not in _WITHOUT_TARGETS:
        settings.setdefault("target_modules", targets)
    if tuner == "lora embeddings":
        settings["target_modules"] = [*targets, _EMBEDDINGS[base]]
    if tuner == "lora modules_to_save":
        settings["modules_to_save"] = [_EMBEDDINGS[base]]
    if tuner == "lora expert parameters":
        settings["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if tuner == "ln_tuning" and base == "bert":
        settings["target_modules"] = ["LayerNorm"]
    if tuner == "ia3":
        settings["feedforward_modules"] = [name for name in targets if name in ("down_proj", "c_fc")]
    if base == "gpt2" and "fan_in_fan_out" in config_class.__dataclass_fields__:
        settings["fan_in_fan_out"] = True
    settings = {name: value for name, value in settings.items() if value is not None}
    if tuner == "xlora":
        adapted = _experts_of_lora(model, kind, targets)
    else:
        adapted = peft.get_peft_model(model, config_class(task_type=kind, **settings))
    trained = nn.ParameterList([p for p in adapted.parameters() if p.requires_grad])
    stir(trained)
    rows, square = task_rows(task), task_rows(task, lengths=SQUARE, seed=2)
    if tuner in _WITH_TASKS:
        for i, row in enumerate([*rows, *square]):
            row["task_ids"] = i % 2
    return settled(Case(adapted.double().eval(), rows, square=square, layers=("trained",)))


def _type(tuner: str) -> Any:
    name = tuner.split()[0].upper()
    return next(kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if str(getattr(kind, "value", kind)) == name)


def _experts_of_lora(model: nn.Module, kind: str, targets: list[str]) -> nn.Module:
    """X-LoRA mixes adapters that were trained before."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for number in range(2):
            torch.manual_seed(number)
            adapter = peft.get_peft_model(model, peft.LoraConfig(task_type=kind, r=2, target_modules=targets))
            stir(nn.ParameterList([p for n, p in adapter.named_parameters() if "lora_" in n]), number)
            paths[str(number)] = str(Path(folder) / str(number))
            adapter.save_pretrained(paths[str(number)])
            model = adapter.unload()
        config = peft.XLoraConfig(task_type=kind, hidden_size=model.config.hidden_size, xlora_size=8, adapters=paths)
        return peft.get_peft_model(model, config)
