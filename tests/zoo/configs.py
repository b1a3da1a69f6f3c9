"""Tiny random models of every family, made from the family's own config class with all its sizes cut down.

Sizes go by a field's name, so that a family that comes with the next transformers is most often built without a line here;
what does not fit the rules stands in ``OVERRIDES``.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, WIDTH, HEADS, LAYERS, CLASSES, CHOICES = 64, 32, 4, 2, 3, 2
# Task -> transformers' list of the families that have a head for it.
TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "answer": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
# The first pattern that a field's whole name fits gives its size.
_SIZES: list[tuple[str, Any]] = [
    (r"pad_token_id|pad_index", 0),
    (r"(bos|cls|decoder_start)_(token_id|index)", 1),
    (r"(eos|sep|forced_eos|forced_bos)_(token_id|index)", 2),
    (r"mask_token_id|mask_index", 3),
    (r"unk_index|unk_token_id", 4),
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r".*vocab(ulary)?_size.*", VOCAB),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(encoder|decoder)_layers|layers|depth|max_window_layers", LAYERS),
    (r".*(key_value|kv)_heads|multi_query_group_num|kv_n_heads|.*num_query_groups", 2),
    (r"(.*_)?(num_)?attention_heads|n_heads?|(.*_)?num_heads|.*_n_heads|.*_num_(key|value)_heads", HEADS),
    (r"qk_rope_head_dim", 4),
    (r"(q|kv)_lora_rank|.*_lora_rank", 16),
    (r"(.*_)?head_dim|d_kv|kv_channels|dim_head|d_head|.*_head_dim", WIDTH // HEADS),
    (r"num_experts_per_tok.*|moe_topk|moe_k|moe_top_k|top_k_experts|.*experts_per_token", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|.*mamba_n_?groups|num_expert_groups", 1),
    (r".*(n_routed|num_local|num|n)_experts|moe_num_experts|zero_expert_num", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"moe_.*intermediate_size|.*expert.*intermediate_size|expert_ffn_hidden_size|expert_hidden_size", 16),
    (r".*intermediate_size|.*ffn_dim|d_ff|d_inner|ffn_hidden_size|n_inner|.*ffn_hidden_size|hidden_dim", 48),
    (r".*(hidden_size|embedding_size)|d_model|n_embd|dim|embed_dim|emb_dim|.*hidden_dim|d_embed|lru_width", WIDTH),
    (
        r"max_position_embeddings|n_positions|max_(source|target|encoder|decoder)_position.*|max_seq_len|context_length",
        96,
    ),
    (r"original_max_position_embeddings|max_2d_position_embeddings|n_ctx|max_length", 96),
    (r"rotary_dim", 4),
    (r"state_size|(mamba_)?d_state|.*ssm_state_size", 8),
    (r".*chunk_size|chunk_len", 8),
    (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_layers", 0),
    (r"sliding_window(_size)?|attention_window(_size)?|local_attention|.*index_topk", 8),
    (r"num_labels", CLASSES),
]
_LISTS = r"(mlp_)?layer_types|attention_types|layers_block_type|no_rope_layers|block_types|indexer_types"
# Fields that are sizes though they are None.
_UNSET = r"num_key_value_heads|head_dim|pad_token_id|vocab_size|n_(rout|shar)ed_experts|num_experts_per_tok"
# What the rules get wrong, by model type; a dict within goes to the config of that name.
_THREE = {"num_hidden_layers": 3}
_MAMBA_2 = {"mamba_n_heads": HEADS, "mamba_d_head": 2 * WIDTH // HEADS}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA_2 | {"attn_layer_indices": [1]},
    "bros": {"dim_bbox": 4},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deberta": _DISENTANGLED,
    "deberta-v2": _DISENTANGLED | {"share_att_key": True, "position_buckets": 4, "conv_kernel_size": 3},
    "esmc": {"num_key_value_heads": HEADS},
    "falcon_h1": _MAMBA_2 | {"mamba_d_ssm": 2 * WIDTH},
    "flaubert": {"use_lang_emb": False},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA_2 | {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32, "visual_embed": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 24, "num_attention_heads": 2},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"head_dim": 2 * WIDTH // HEADS},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "mamba_head_dim": 2 * WIDTH // HEADS},
    "neomme": {"num_attention_heads": 2, "head_dim": 16},
    "nystromformer": {"conv_kernel_size": 3},
    "perceiver": {"max_position_embeddings": 12},
    "qwen3_5_text": {"full_attention_interval": 2},
    "qwen3_next": {"full_attention_interval": 2},
    "recurrent_gemma": _THREE,
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 12],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
        "num_hashes": 1,
        "hash_seed": 0,
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "feed_forward_size": 48,
    },
    "xlstm": {"num_heads": HEADS, "mode": "inference"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# A family's uninitialised or flat weights say nothing: every parameter gets noise of this size.
_NOISE = 0.1


def families(task: str) -> dict[str, str]:
    """``{model type: class name}`` of all that transformers has for a task."""
    return dict(getattr(modeling_auto, TASKS[task]))


def tiny_config(config_class: type, model_type: str, extra: dict[str, Any] | None = None) -> Any:
    """A config of this class with every size cut down."""
    given = {**OVERRIDES.get(model_type, {}), **(extra or {})}
    settings: dict[str, Any] = {}
    default = None
    for field in dataclasses.fields(config_class):
        if not field.init or field.name.startswith("_"):
            continue
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        small = _size(field.name, value)
        if small is not None:
            settings[field.name] = small
    if "qk_rope_head_dim" in settings:
        # Latent attention has as many keys as queries.
        settings["num_key_value_heads"] = HEADS
    parts = getattr(config_class, "sub_configs", {})
    if parts:
        default = config_class()
    for name in parts:
        part = getattr(default, name, None)
        if isinstance(part, hf.PreTrainedConfig):
            inner = given.pop(name, {})
            settings[name] = tiny_config(type(part), part.model_type, inner)
    return config_class(**{**settings, **given})


def _size(name: str, value: Any) -> Any:
    """The small value of a field; None where it stays as it is."""
    if name in ("initializer_range", "init_std", "initializer_factor") and isinstance(value, float):
        return 0.2 if value < 0.2 else None
    if "dropout" in name or name.endswith(("_pdrop", "layerdrop")):
        return None
    if isinstance(value, list | tuple) and re.fullmatch(_LISTS, name) and len(value) > LAYERS:
        return list(value[:LAYERS])
    if isinstance(value, bool) or not isinstance(value, int):
        wanted = value is None and re.fullmatch(_UNSET, name)
        if not wanted:
            return None
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return size
    if isinstance(value, int) and re.search(r"token_(id|index)$", name):
        return VOCAB - 1 - sum(map(ord, name)) % 3
    return WIDTH if isinstance(value, int) and value > WIDTH and not name.startswith("max_") else None


def make_config(family: str, task: str) -> Any:
    # Some heads of a model of several parts take the config of its text model.
    config_class = getattr(hf, families(task)[family]).config_class or CONFIG_MAPPING[family]
    extra: dict[str, Any] = {"num_labels": CLASSES} if task in ("sequence", "token") else {}
    names = {field.name for field in dataclasses.fields(config_class)}
    if task == "causal" and "is_decoder" in names:
        extra["is_decoder"] = True
    config = tiny_config(config_class, config_class.model_type, extra)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.use_cache = False
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    return config


def make_model(family: str, task: str, seed: int = 0) -> nn.Module:
    """The family's model for a task, in float64 and eval mode, with noise on every parameter."""
    torch.manual_seed(seed)
    config = make_config(family, task)
    model = getattr(hf, families(task)[family])(config)
    stir(model, seed)
    return model.double().eval()


def stir(model: nn.Module, seed: int = 0, noise: float = _NOISE) -> nn.Module:
    """The model with noise on its parameters, so that nothing is zero, flat or unset."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                kept = torch.nan_to_num(parameter.float(), 0.0, 0.0, 0.0).clamp(-10, 10)
                parameter.copy_(kept + noise * torch.randn(parameter.shape, generator=random))
    return model
