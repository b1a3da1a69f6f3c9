"""Experts that share one parameter ``(E, ...)``: each sample's gradient of each expert, from the tokens routed to it.

Transformers' experts (``use_experts_implementation``) all take the same steps: tokens are sorted by expert, go through an up
and a down product, are weighted and summed. Those steps are repeated here, so that the inputs and output gradients of both
products are seen together with each token's sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from influence_fast.gradients.layers import uncompiled
from influence_fast.gradients.sample_rows import SampleRows

# Told a parameter's name, inputs (S, in) and outputs (S, out) of its product; gives the outputs to go on with.
See = Callable[[str, "Routed", Tensor, Tensor], Tensor]


def can_be_followed(module: nn.Module) -> bool:
    """Whether a module of experts takes the steps that are repeated here."""
    if not all(
        hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
    ):
        return False
    weights = [module._parameters.get(leaf) for leaf in (_first(module), "down_proj")]
    return all(weight is not None and weight.dim() == 3 for weight in weights)


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


@dataclass
class Routed:
    """Tokens sorted by expert, ``counts`` of each: numbers ``token (S,)`` among ``tokens``, and whose they are."""

    token: Tensor
    counts: list[int]
    tokens: int
    samples: SampleRows

    @cached_property
    def by_sample(self) -> tuple[Tensor, Tensor]:
        """The order that puts all tokens by sample, and how many each sample has; those that are nobody's come last."""
        owner = self.samples.owners(self.tokens, self.token.device)[self.token]
        return owner.argsort(stable=True), torch.bincount(owner, minlength=self.samples.count + 1)

    @cached_property
    def pairs(self) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """The order that puts each expert's tokens by sample (None: they are), then of each expert the samples that it has
        tokens of, and how many."""
        owner = self.samples.owners(self.tokens, self.token.device)[self.token]
        counts = torch.tensor(self.counts, device=self.token.device)
        expert = torch.arange(len(self.counts), device=self.token.device).repeat_interleave(counts)
        width = self.samples.count + 1
        key = expert * width + owner
        # Token-major tokens of one expert are not in the order of samples.
        order = key.argsort(stable=True) if self.samples.layout in ("second", "parts") else None
        found, lengths = torch.unique_consecutive(key if order is None else key[order], return_counts=True)
        sizes = torch.bincount(found // width, minlength=len(self.counts)).tolist()
        return order, list((found % width).split(sizes)), list(lengths.split(sizes))


def experts_forward(
    module: Any, hidden: Tensor, index: Tensor, weights: Tensor, samples: SampleRows, see: See
) -> Tensor:
    """What ``module(hidden, index, weights)`` gives, with both of its products shown to ``see``.

    hidden ``(tokens, H)``; index and weights ``(tokens, k)``: the experts of each token, where numbers from
    ``num_experts`` on are none.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    tokens, k = len(flat), index.shape[-1]
    expert = index.reshape(-1)
    none = expert >= module.num_experts
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert.clamp(max=module.num_experts), minlength=module.num_experts)
    sizes = counts[: module.num_experts].tolist()
    order = order[: sum(sizes)]
    routed = Routed(order // k, sizes, tokens, samples)
    x = _products(module, _first(module), flat[routed.token], routed, see)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _products(module, "down_proj", x, routed, see)
    out = x.new_zeros(tokens * k, x.shape[-1]).index_copy(0, order, x)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    share = weights.reshape(-1).masked_fill(none, 0)
    summed = (out * share[:, None]).view(tokens, k, -1).sum(1)
    return summed.to(hidden.dtype).view(hidden.shape)


def _products(module: Any, leaf: str, x: Tensor, routed: Routed, see: See) -> Tensor:
    stacked, bias = getattr(module, leaf), getattr(module, f"{leaf}_bias", None) if module.has_bias else None
    x = x.to(stacked.dtype)
    weights = stacked.unbind(0)
    biases = bias.unbind(0) if bias is not None else (None,) * len(weights)
    parts = [
        nn.functional.linear(part, weight.T if module.is_transposed else weight, added)
        for part, weight, added in zip(x.split(routed.counts), weights, biases, strict=True)
        if len(part)
    ]
    width = stacked.shape[-1 if module.is_transposed else -2]
    return see(leaf, routed, x, torch.cat(parts) if parts else x.new_zeros(0, width))


@dataclass(frozen=True)
class ExpertFactor:
    """LoRA's A or B of experts that share one parameter, as ``target_parameters`` of PEFT keeps it.

    Expert e has rows ``[e r, (e + 1) r)`` of A ``(E r, in)`` and columns ``e, E + e, ...`` of B ``(out, r E)``; its weight,
    as ``(out, in)``, gains ``scaling B_e A_e``.
    """

    wrapper: Any
    adapter: str
    first: bool
    """Whether this is A."""

    @property
    def is_active(self) -> bool:
        """Whether the weights that a forward uses depend on it."""
        on = self.adapter in self.wrapper.active_adapters and self.adapter not in self.wrapper.merged_adapters
        return on and not self.wrapper.disable_adapters

    def operands(self, routed: Routed, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """``(S, in)`` and ``(S, out)`` of the same tokens, with the factor as the weight of one linear layer."""
        experts = len(routed.counts)
        a, b = (getattr(self.wrapper, name)[self.adapter].weight.detach().to(x.dtype) for name in ("lora_A", "lora_B"))
        a, b = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts)
        inner = x.new_zeros(len(x), a.shape[1], experts)
        begin = 0
        for number, count in enumerate(routed.counts):
            tokens = slice(begin, begin + count)
            inner[tokens, :, number] = dy[tokens] @ b[:, :, number] if self.first else x[tokens] @ a[number].T
            begin += count
        inner *= self.wrapper.scaling[self.adapter]
        return (x, inner.mT.flatten(1)) if self.first else (inner.flatten(1), dy)


def expert_factors(model: nn.Module) -> dict[str, tuple[nn.Module, str, ExpertFactor]]:
    """By name, the modules of LoRA that belong to fused experts: the module of those, its parameter's name, which factor."""
    found = {}
    for path, wrapper in model.named_modules():
        leaf = getattr(wrapper, "parameter_name", None)
        if leaf is None or not hasattr(wrapper, "lora_A") or getattr(wrapper, "num_experts", 1) == 1:
            continue
        experts = cast(Any, wrapper).get_base_layer()
        if can_be_followed(experts):
            for kind in ("lora_A", "lora_B"):
                for adapter in getattr(wrapper, kind):
                    factor = ExpertFactor(wrapper, adapter, kind == "lora_A")
                    found[uncompiled(f"{path}.{kind}.{adapter}")] = experts, leaf, factor
    return found


def of_experts(routed: Routed, *tensors: Tensor) -> Iterator[tuple[int, Tensor, Tensor, tuple[Tensor, ...]]]:
    """For each expert that has tokens: its number, the samples that they are of, how many of each, and its part of
    ``tensors (S, ...)``, sample after sample."""
    order, owners, lengths = routed.pairs
    parts = [(tensor if order is None else tensor[order]).split(routed.counts) for tensor in tensors]
    for number, (owner, sizes) in enumerate(zip(owners, lengths, strict=True)):
        if len(sizes):
            yield number, owner, sizes, tuple(part[number] for part in parts)
