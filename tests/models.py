"""Tiny random Hugging Face models and batches, and the one-sample float64 loop that every gradient is held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from influence_fast.gradients.layers import named_layers

VOCAB = 37
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 2,
    "n_positions": 40,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_ENCODER)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_ENCODER)),
    "gpt2": lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**_GPT2)),
    "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_DECODER)),
    "qwen2": lambda: hf.Qwen2ForSequenceClassification(hf.Qwen2Config(**_DECODER)),
    "mistral": lambda: hf.MistralForSequenceClassification(hf.MistralConfig(**_DECODER)),
}
CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_DECODER)),
}
_LORA_TARGETS = {"bert": ["query", "value"], "roberta": ["query", "value"], "gpt2": ["c_attn"]}


def make(name: str, task: str = "classification", lora: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = (CLASSIFIERS if task == "classification" else CAUSAL)[name]()
    if lora:
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="SEQ_CLS" if task == "classification" else "CAUSAL_LM",
                r=3,
                lora_alpha=3,
                lora_dropout=0.05,
                target_modules=_LORA_TARGETS.get(name, ["q_proj", "v_proj"]),
                fan_in_fan_out=name == "gpt2",
            ),
        )
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def rows(task: str = "classification", count: int = 5, seed: int = 1, longest: int = 9) -> list[dict]:
    """Samples of ragged lengths. Causal labels hide a prompt of two tokens."""
    random = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(4, longest + 1, (), generator=random))
        ids = torch.randint(3, VOCAB, (length,), generator=random).tolist()
        labels = i % 3 if task == "classification" else [-100, -100, *ids[2:]]
        out.append({"input_ids": ids, "labels": labels})
    return out


def collate(samples: list[dict], side: str = "right") -> dict[str, Tensor]:
    """A padded batch; left padding comes with the position ids that make it mean the same."""
    width = max(len(s["input_ids"]) for s in samples)

    def pad(values: list[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(values))
        return gap + values if side == "left" else values + gap

    mask = torch.tensor([pad([1] * len(s["input_ids"]), 0) for s in samples])
    batch = {"input_ids": torch.tensor([pad(s["input_ids"], 0) for s in samples]), "attention_mask": mask}
    if side == "left":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if isinstance(samples[0]["labels"], list):
        batch["labels"] = torch.tensor([pad(s["labels"], -100) for s in samples])
    else:
        batch["labels"] = torch.tensor([s["labels"] for s in samples])
    return batch


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Per-sample loss: cross entropy, for causal models the mean over a sample's target tokens."""
    batch = dict(batch)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    if labels.dim() == 1:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    targets = labels[:, 1:]
    each = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return each.sum(1) / (targets != -100).sum(1)


def oracle(model: nn.Module, samples: list[dict], layers: list[str]) -> dict[str, Tensor]:
    """Gradients ``{layer: (N, out, in)}`` by the literal loop: one sample at a time, float64, ``autograd.grad``."""
    model = model.double()
    modules = named_layers(model)
    parameters = dict(model.named_parameters())
    weights = [modules[name].weight if name in modules else parameters[name] for name in layers]
    kept = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    out: dict[str, list[Tensor]] = {name: [] for name in layers}
    for sample in samples:
        grads = torch.autograd.grad(losses(model, collate([sample])).sum(), weights, allow_unused=True)
        for name, weight, grad in zip(layers, weights, grads, strict=True):
            grad = torch.zeros_like(weight) if grad is None else grad
            if name not in modules:
                out[name].append(grad.reshape(len(grad), -1))
            else:
                out[name].append(grad if isinstance(modules[name], nn.Linear) else grad.T)
    for weight, flag in zip(weights, kept, strict=True):
        weight.requires_grad_(flag)
    model.float()
    return {name: torch.stack(grads) for name, grads in out.items()}
