"""Experts that share one parameter against the literal loop, one sample at a time, on every layout that transformers has."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.gradients.experts import experts_forward
from influence_fast.gradients.sample_rows import SampleRows

_SMALL: dict[str, Any] = {
    "vocab_size": models.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {
    "num_key_value_heads": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {}),
    "qwen2_moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 12}),
    "qwen3_moe": ("Qwen3Moe", {}),
    "gpt_oss": ("GptOss", {"layer_types": ["full_attention", "full_attention"]}),
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK),
    "olmoe": ("Olmoe", {}),
    "granitemoe": ("GraniteMoe", {}),
    "jamba": (
        "Jamba",
        {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0},
    ),
    "nemotron_h": ("NemotronH", {"layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": 8}),
    "phimoe": ("Phimoe", {}),
    "aria": ("AriaText", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    family, extra = FAMILIES[name]
    config = getattr(hf, f"{family}Config")(**_SMALL | extra)
    config._experts_implementation = "eager"  # products of float64, which the grouped ones are not made for
    model = getattr(hf, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        # Some families start their experts at zero.
        nn.init.normal_(parameter, std=0.3)
    return model


def literal(model: nn.Module, given: list[dict], names: list[str]) -> dict[str, Tensor]:
    """``autograd.grad`` of one row at a time, in a batch of one."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    out: dict[str, list[Tensor]] = {name: [] for name in names}
    owned = {}
    for name in names:
        path, _, number = name.partition("[")
        owned[name] = (parameters[path] if path in parameters else modules[path].weight), number.rstrip("]")
    weights = list({id(weight): weight for weight, _ in owned.values()}.values())
    for row in given:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        grads = dict(zip(map(id, weights), torch.autograd.grad(loss, weights, allow_unused=True), strict=True))
        for name, (weight, number) in owned.items():
            grad = grads[id(weight)]
            grad = torch.zeros_like(weight) if grad is None else grad
            if number:
                holder = modules[name.partition("[")[0].rpartition(".")[0]]
                grad = grad[int(number)]
                grad = grad.T if holder.is_transposed and grad.dim() == 2 else grad
            elif isinstance(modules.get(name), nn.Embedding):
                grad = grad.T
            out[name].append(grad.flatten())
    return {name: torch.stack(grads) for name, grads in out.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_and_routers_equal_the_one_sample_loop(name: str) -> None:
    model, given = make(name).double(), models.rows("causal", count=4)
    layers = inf.select_layers(model, "trained")
    experts = [layer for layer in layers if layer.endswith("]")]
    assert experts
    assert {layer.partition("[")[0].rpartition(".")[2] for layer in experts} >= {"down_proj"}
    assert sum("gate.weight" in layer or "router" in layer for layer in layers) >= 1
    followed = [layer for layer in layers if layer.endswith("router.bias")]
    names = [layer for layer in layers if layer.endswith("]") or "gate" in layer or "router" in layer]
    with inf.GradientCapture(model, names, followed=followed) as capture:
        models.losses(model, models.collate(given)).sum().backward()
        got = capture.pop()
    truth = literal(model, given, names)
    assert any(gradient.norm() > 0 for layer, gradient in truth.items() if layer.endswith("]"))
    for layer, expected in truth.items():
        # Some families route in float32, whatever the model is in.
        torch.testing.assert_close(
            got[layer], expected, rtol=1e-4, atol=1e-7, check_dtype=False, msg=lambda m, n=layer: f"{n}: {m}"
        )
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("projection", ["rademacher:3x2", "sjlt:7"])
def test_a_build_takes_experts_on_the_fast_way(
    projection: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, given = make("gpt_oss"), models.rows("causal", count=6)
    chosen = inf.Projection.parse(projection)
    with caplog.at_level(logging.WARNING, "influence_fast"):
        store = inf.build_store(tmp_path / "s", model, given, "all,bias", chosen, progress=False)
    assert not store.meta["settings"].get("one_row")
    assert [message for message in caplog.messages if "autograd" in message] == []
    names = [name for name in store.layers if name.endswith("]") or name.endswith("router.weight")]
    assert len(names) == 2 * (4 * 4 + 1)
    for name, expected in literal(model, given, names).items():
        shape = inf.GradientCapture(model, [name]).shapes[name]
        if shape[1] == 1:
            single = inf.Projection(chosen.kind, chosen.output_dim(shape)).side(name, "single", shape[0])
            wanted = expected if shape[0] <= chosen.output_dim(shape) else expected @ single.matrix().T
        elif chosen.two_sided:
            left, right = chosen.side(name, "left", shape[0]), chosen.side(name, "right", shape[1])
            wanted = (left.matrix() @ expected.view(-1, *shape) @ right.matrix().T).flatten(1)
        else:
            wanted = expected @ chosen.side(name, "single", shape[0] * shape[1]).matrix().T
        torch.testing.assert_close(store.read(name), wanted, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_experts_of_packed_rows() -> None:
    model, given = make("mixtral"), models.rows("causal", count=3)
    names = [name for name in inf.select_layers(model) if name.endswith("]")]
    ids = torch.tensor([[token for row in given for token in row["input_ids"]]])
    lengths = [len(row["input_ids"]) for row in given]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with inf.GradientCapture(model, names) as capture, capture.packed(lengths):
        logits = model(ids, position_ids=positions, use_cache=False).logits[0]
        parts = zip(logits.split(lengths), given, strict=True)
        loss = sum(
            nn.functional.cross_entropy(part[:-1], torch.tensor(row["labels"])[1:], reduction="mean")
            for part, row in parts
        )
        loss.backward()
        got = capture.pop()
    for name, expected in literal(model, given, names).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # weights (E, out, in) and (E, in, out)
def test_lora_on_the_parameters_of_experts(name: str) -> None:
    peft = pytest.importorskip("peft")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    # Adapters need not have one rank, and the last of a kind is not the one that is on.
    configs = {
        adapter: peft.LoraConfig(r=rank, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets)
        for adapter, rank in (("on", 3), ("off", 2))
    }
    model = peft.get_peft_model(make(name).double(), configs["on"], adapter_name="on")
    model.add_adapter("off", configs["off"])
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad or parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    given = models.rows("causal", count=4)
    names = [name for name in inf.select_layers(model, "lora") if "experts" in name]
    assert len(names) == 2 * 2 * 2 * 2
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with inf.GradientCapture(model, names) as capture:
        models.losses(model, models.collate(given)).sum().backward()
        got = capture.pop()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    model.requires_grad_(True)
    for layer, expected in literal(model, given, names).items():
        torch.testing.assert_close(
            got[layer], expected, rtol=1e-4, atol=1e-7, check_dtype=False, msg=lambda m, n=layer: f"{n}: {m}"
        )
        assert bool(expected.any()) == (".on" in layer)


def test_numbers_beyond_the_experts_are_no_expert() -> None:
    """Expert parallelism marks tokens of other processes so; they have no output and no gradient."""
    model = make("mixtral")
    experts = model.model.layers[0].mlp.experts
    torch.manual_seed(1)
    hidden, weights = torch.randn(6, 16), torch.rand(6, 2)
    index = torch.tensor([[0, 4], [1, 2], [4, 4], [3, 0], [2, 4], [1, 0]])
    kept = weights.masked_fill(index == 4, 0)
    out = experts_forward(experts, hidden, index, weights, SampleRows(2), lambda leaf, routed, x, y: y)
    torch.testing.assert_close(out, experts(hidden, index.clamp(max=3), kept))


def test_names_of_experts() -> None:
    model = make("gpt_oss")
    first = "model.layers.0.mlp.experts."
    every = inf.select_layers(model)
    assert [name for name in every if name.startswith(first)] == [
        f"{first}{leaf}[{number}]" for leaf in ("gate_up_proj", "down_proj") for number in range(4)
    ]
    assert "model.layers.0.mlp.router.weight" in every
    assert set(inf.select_layers(model, "mlp[0]")) == {name for name in every if "layers.0.mlp" in name}
    assert inf.select_layers(model, f"{first}down_proj[2]") == [f"{first}down_proj[2]"]
    assert inf.select_layers(model, [f"{first}down_proj"]) == [f"{first}down_proj[{number}]" for number in range(4)]
    assert inf.select_layers(model, r"re:.*experts\.down_proj\[1\]") == [
        f"model.layers.{block}.mlp.experts.down_proj[1]" for block in (0, 1)
    ]
    assert f"{first}gate_up_proj_bias[3]" in inf.select_layers(model, "bias")
    assert len(inf.select_layers(model, "trained")) == len(every) + len(inf.select_layers(model, "norm,bias,other"))


def test_experts_of_a_class_of_its_own_go_to_autograd(tmp_path: Path) -> None:
    config = hf.Llama4TextConfig(**_SMALL | {"intermediate_size_mlp": 12, "interleave_moe_layer_step": 1})
    torch.manual_seed(0)
    model = hf.Llama4ForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    given = models.rows("causal", count=4)
    names = [name for name in inf.select_layers(model) if "experts" in name or "router" in name]
    assert any(name.endswith("gate_up_proj[3]") for name in names)
    store = inf.build_store(tmp_path / "s", model, given, names, "identity", progress=False)
    for module in model.modules():
        module.is_transposed = False
    for name, expected in literal(model, given, names).items():
        torch.testing.assert_close(store.read(name), expected, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
