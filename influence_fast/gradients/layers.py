"""Which layers: names from a model by kind, block range, quarter or pattern.

A *layer* is one weight matrix: an ``nn.Linear``, a GPT-2 ``Conv1D``, a LoRA ``A`` or ``B``, an embedding table, a
classification or language-model head. Its name is its module's name in ``model.named_modules()``. Experts of a mixture that
share one parameter are layers each, ``...experts.gate_up_proj[3]``, and a router is one under its parameter's name. Every
other parameter (norms, biases, convolutions, recurrent cells, bare ones) is a layer too, under its own name in
``model.named_parameters()``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from influence_fast.errors import InputError

KINDS = ("all", "attention", "mlp", "embedding", "head", "lora")
# Kinds of parameters that are no weight matrix, and what training changes.
PARAMETER_KINDS = ("norm", "bias", "conv", "other")
QUARTERS = ("q1", "q2", "q3", "q4")

_BLOCK = re.compile(r"(?:^|\.)(?:h|[a-z_]*(?:layers?|blocks?|groups?))\.(\d+)(?=\.|$)", re.IGNORECASE)
_ATTENTION = re.compile(
    r"attn|attention|(?:^|\.)(?:[qkvo]_proj|query|key|value|w?qkv(?:_proj)?)(?:\.|$)", re.IGNORECASE
)
_LORA = re.compile(r"\.lora_[AB]\.")
_EXPERT = re.compile(r"(?:^|\.)experts\.(?:expert_)?\d+(?=\.|$)")
_ITEM = re.compile(r"(?P<kind>[a-z]+)(?:\[(?P<range>[^\]]*)\])?")
# Class names of modules that hold experts in one parameter, and of those that choose among them.
_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_ROUTER = re.compile(r"router|gate|topk", re.IGNORECASE)


@dataclass(frozen=True)
class Expert:
    """One expert's part ``parameter[number]`` of a parameter that all experts of a mixture share.

    ``turned`` says whether that part is ``(in, out)``, the gradient's shape transposed.
    """

    holder: nn.Module
    parameter: nn.Parameter
    leaf: str
    number: int
    turned: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the expert's gradient, ``(d, 1)`` of its bias."""
        if self.parameter.dim() == 2:
            return self.parameter.shape[1], 1
        rows, columns = self.parameter.shape[1:]
        return (columns, rows) if self.turned else (rows, columns)


Layer = nn.Module | Expert | nn.Parameter


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the transposed linear layer of GPT-2 (recognised by shape, so transformers is not imported)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a layer's gradient. An embedding has one-hot input: ``(width, vocabulary)``."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if is_conv1d(module):
        inputs, outputs = cast(Tensor, module.weight).shape
        return outputs, inputs
    raise InputError(f"layer: expected nn.Linear, Conv1D or nn.Embedding, got {type(module).__name__}")


def uncompiled(name: str) -> str:
    """A module's or parameter's name as it was before ``torch.compile`` wrapped some of its parents."""
    return name.replace("_orig_mod.", "")


def is_quantised(weight: Tensor) -> bool:
    """Whether this is a frozen weight of packed integers or of a quantising library's own type, which has no gradient."""
    own_type = hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor")
    return not weight.requires_grad and (not weight.is_floating_point() or own_type)


def _is_empty(weight: Tensor) -> bool:
    """Whether this is a weight of size 0, such as what MobileBERT's head adds to embeddings as wide as its states."""
    return not is_lazy(weight) and not weight.numel()


def quantised_layers(model: nn.Module) -> list[str]:
    """Names of modules whose weight is quantised; they are no layers."""
    return [
        uncompiled(name)
        for name, module in model.named_modules()
        if isinstance(weight := module._parameters.get("weight"), Tensor) and is_quantised(weight)
    ]


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of ``model`` by name, in the model's order.

    Left out: the frozen originals that PEFT keeps beside ``modules_to_save``, quantised weights, empty ones, and the output
    matrix of ``nn.MultiheadAttention``, which is used without being called. Names are those before ``torch.compile``.
    """
    return _linear(_modules(model))


def every_layer(model: nn.Module) -> tuple[dict[str, Layer], dict[str, Expert | nn.Parameter]]:
    """Every weight matrix (layers that are modules, then experts that share a parameter, then routers), and every parameter
    that is none, in the model's order; a shared one has its first name."""
    # Walking through a model takes longer than what is done with its modules: once for all.
    there = _modules(model)
    modules, experts = _linear(there), _experts(there)
    known = {id(module.weight) for module in modules.values()}
    routers = {}
    for name, module in there:
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and id(weight) not in known and is_router(module):
            routers[_joined(name, "weight")] = weight
    shared = {name: expert for name, expert in experts.items() if expert.parameter.dim() == 3}
    matrices: dict[str, Layer] = {**modules, **shared, **routers}
    taken = {id(weight_of(layer)) for layer in (*matrices.values(), *experts.values())}
    others: dict[str, Expert | nn.Parameter] = {}
    for name, module in there:
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) in taken:
                continue
            taken.add(id(parameter))
            path = _joined(name, leaf)
            if not ("original_module" in path.split(".") or is_quantised(parameter) or _is_empty(parameter)):
                others[path] = parameter
    return matrices, others | {name: expert for name, expert in experts.items() if name not in matrices}


def layers_by_name(model: nn.Module) -> dict[str, Layer]:
    """Every layer, weight matrices first."""
    matrices, others = every_layer(model)
    return {**matrices, **others}


def is_router(module: nn.Module) -> bool:
    """Whether a module chooses among experts, by its class's name."""
    return bool(_ROUTER.search(type(module).__name__))


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(uncompiled(name), module) for name, module in model.named_modules()]


def _joined(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf


def _linear(there: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    found = {}
    for name, module in there:
        if type(module).__name__ == "NonDynamicallyQuantizableLinear" or "original_module" in name.split("."):
            continue
        # A weight that is computed from other parameters (weight norm, pruning) is no parameter itself; those are.
        weight = module._parameters.get("weight")
        linear = isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)
        if linear and weight is not None and not is_quantised(weight) and not _is_empty(weight):
            found[name] = module
    return found


def _experts(there: Iterable[tuple[str, nn.Module]]) -> dict[str, Expert]:
    """Experts that share one parameter, as ``name[number]``: weights ``(E, rows, columns)`` and biases ``(E, out)``."""
    found = {}
    for name, module in there:
        if not _EXPERTS.search(type(module).__name__) or "original_module" in name.split("."):
            continue
        own = dict(module.named_parameters(recurse=False))
        counts = {parameter.shape[0] for parameter in own.values() if parameter.dim() == 3}
        turned = bool(getattr(module, "is_transposed", False))
        for leaf, parameter in own.items():
            bias = parameter.dim() == 2 and leaf.endswith("bias") and parameter.shape[0] in counts
            if bias or parameter.dim() == 3:
                path = _joined(name, leaf)
                for number in range(parameter.shape[0]):
                    found[f"{path}[{number}]"] = Expert(module, parameter, leaf, number, turned and not bias)
    return found


def weight_of(layer: Layer) -> Any:
    """The parameter that a layer is, or is a part of."""
    return layer.parameter if isinstance(layer, Expert) else layer if isinstance(layer, Tensor) else layer.weight


def parameter_kind(model: nn.Module, name: str) -> str:
    """``norm``, ``bias``, ``conv`` or ``other``: by the module that holds the parameter, then by its name."""
    path, _, leaf = re.sub(r"\[\d+\]$", "", name).rpartition(".")
    holder = next((module for other, module in model.named_modules() if uncompiled(other) == path), model)
    if "norm" in type(holder).__name__.lower():
        return "norm"
    if isinstance(holder, nn.modules.conv._ConvNd) and leaf == "weight":
        return "conv"
    return "bias" if leaf.startswith("bias") or leaf.endswith("bias") else "other"


def trained_layers(model: nn.Module) -> list[str]:
    """Names of all layers whose parameter has ``requires_grad``, in the model's order."""
    return [name for name, layer in layers_by_name(model).items() if weight_of(layer).requires_grad]


def is_partly_trained(model: nn.Module) -> bool:
    """Whether training left some parameters as they were: an adapter, a head alone."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return (any(flags) and not all(flags)) or bool(_adapters(model))


def default_layers(model: nn.Module) -> str | list[str]:
    """What training changed: everything with ``requires_grad`` where some parameters are frozen, else all but embeddings."""
    trained = trained_layers(model)
    if trained and not all(parameter.requires_grad for parameter in model.parameters()):
        return trained
    return _adapters(model) or "attention,mlp,head"


def freeze_others(model: nn.Module, trained: Collection[str] | None) -> None:
    """Leave ``requires_grad`` to the parameters of these names; nothing is done where one is not there, or none is known."""
    named = {uncompiled(name): parameter for name, parameter in model.named_parameters()}
    if trained and set(trained) <= set(named):
        for name in set(named) - set(trained):
            named[name].requires_grad_(False)


def _adapters(model: nn.Module) -> list[str]:
    return [name for name in named_layers(model) if re.search(r"\.lora_[AB]\.|\.modules_to_save\.", name)]


def block_of(name: str) -> int | None:
    """Index of the transformer block that a layer's name lies in, or None outside the blocks."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else None


def kind_of(name: str, module: Layer) -> str:
    """``attention``, ``mlp``, ``embedding`` or ``head``. A LoRA matrix has the kind of the layer that it adapts."""
    match = _BLOCK.search(name)
    if match:
        return "attention" if _ATTENTION.search(name[match.end() :]) else "mlp"
    if isinstance(module, nn.Embedding) or re.search(r"embed", name, re.IGNORECASE):
        return "embedding"
    return "head"


def select_layers(model: nn.Module, spec: str | Iterable[str] = "all") -> list[str]:
    """Names of the layers that ``spec`` asks for, in the model's order.

    Args:
        model: any model; a PEFT model's names include its wrapper's.
        spec: ``all attention mlp embedding head lora`` or a layer's whole name, joined by commas; each kind may carry
            a range of blocks: ``attention[8:16]``, ``mlp[3]``, ``all[-2:]``, a quarter ``attention[q1]`` .. ``[q4]`` or
            ``[middle]`` (the second and third). Block b of B lies in quarter ``4 b // B + 1``. ``re:PATTERN`` takes the
            names that match whole. A list of names passes through. ``all`` are the weight matrices, experts and routers of
            mixtures among them; the name of a parameter that experts share stands for all of its ``name[number]``.
            ``norm``, ``bias``, ``conv`` and ``other`` are the parameters that are none, with block ranges alike;
            ``trained`` is everything that has ``requires_grad``.

    Raises:
        InputError: a name, kind or range that fits nothing; the message lists what there is.
    """
    layers, parameters = every_layer(model)
    everything = [*layers, *parameters]
    if not everything:
        raise InputError(f"model: {type(model).__name__} has no parameter")
    if not isinstance(spec, str):
        return _known(model, list(spec), everything, layers)
    if spec.startswith("re:"):
        try:
            pattern = re.compile(spec[3:])
        except re.error as error:
            raise InputError(f"layers: {spec[3:]!r} is no regular expression ({error})") from None
        chosen = {name for name in layers if pattern.fullmatch(name)}
        chosen = chosen or {name for name in parameters if pattern.fullmatch(name)}
    else:
        items = [item.strip() for item in spec.split(",")]
        chosen = set().union(*(_select(model, layers, parameters, item) for item in items))
    if not chosen:
        raise InputError(f"layers: {spec!r} matches nothing; {_overview(layers)}")
    return [name for name in everything if name in chosen]


def layer_groups(model: nn.Module, layers: Iterable[str]) -> dict[str, list[str]]:
    """``layers`` by group, empty ones left out: embedding, attention q1 .. q4, mlp, head, norm, bias, conv, other, all."""
    modules, parameters = every_layer(model)
    names = _known(model, list(layers), [*modules, *parameters], modules)
    blocks = _block_count(modules)
    groups: dict[str, list[str]] = {
        group: [] for group in ("embedding", *(f"attention {q}" for q in QUARTERS), "mlp", "head", *PARAMETER_KINDS)
    }
    for name in names:
        kind = kind_of(name, modules[name]) if name in modules else parameter_kind(model, name)
        if kind == "attention":
            kind += f" {QUARTERS[4 * (block_of(name) or 0) // blocks]}"
        groups[kind].append(name)
    return {group: members for group, members in groups.items() if members} | {"all": names}


def is_expert(name: str) -> bool:
    """Whether a layer is one expert of a mixture, which sees routed tokens without their sample."""
    return bool(_EXPERT.search(name))


def _known(model: nn.Module, names: list[str], everything: list[str], layers: dict[str, Layer]) -> list[str]:
    shared: dict[str, list[str]] = {}
    for name in everything:
        shared.setdefault(name.partition("[")[0], []).append(name)
    there = {*everything, *shared}
    wanted = set(names).union(*(shared[name] for name in names if name in shared))
    unknown = [name for name in names if name not in there]
    if unknown and unknown[0] in quantised_layers(model):
        raise InputError(
            f"layers: the weight of {unknown[0]!r} is quantised and frozen: it has no gradient; leave it out"
        )
    if unknown:
        raise InputError(f"layers: no layer is named {unknown[0]!r}; {_overview(layers)}")
    if not names:
        raise InputError(f"layers: the list is empty; {_overview(layers)}")
    return [name for name in everything if name in wanted]


def _select(model: nn.Module, layers: dict[str, Layer], parameters: dict[str, Any], item: str) -> set[str]:
    if item in layers or item in parameters:
        return {item}
    if experts := {name for name in (*layers, *parameters) if name.partition("[")[0] == item}:
        return experts
    if item == "trained":
        found = set(trained_layers(model))
        if not found:
            raise InputError("layers: 'trained' is nothing, for no parameter of the model has requires_grad")
        return found
    match = _ITEM.fullmatch(item)
    kinds = (*KINDS, *PARAMETER_KINDS)
    if match is None or match["kind"] not in kinds:
        raise InputError(
            f"layers: {item!r} is neither a kind ({', '.join(kinds)}, trained) nor a layer; {_overview(layers)}"
        )
    kind, text = match["kind"], match["range"]
    if kind in PARAMETER_KINDS:
        chosen = {name for name in parameters if parameter_kind(model, name) == kind}
    else:
        chosen = {name for name, module in layers.items() if _is(kind, name, module)}
    if text is None:
        return chosen
    blocks = _blocks(text, _block_count(layers), item)
    inside = {name for name in chosen if block_of(name) in blocks}
    if chosen and not inside:
        raise InputError(f"layers: {item!r} lies in no block; {_overview(layers)}")
    return inside


def _is(kind: str, name: str, module: Layer) -> bool:
    if kind == "all":
        return True
    return bool(_LORA.search(name)) if kind == "lora" else kind_of(name, module) == kind


def _block_count(layers: dict[str, Layer]) -> int:
    return max((block_of(name) or 0 for name in layers), default=0) + 1


def _blocks(text: str, count: int, item: str) -> set[int]:
    if text in QUARTERS or text == "middle":
        wanted = (1, 2) if text == "middle" else (QUARTERS.index(text),)
        return {block for block in range(count) if 4 * block // count in wanted}
    match = re.fullmatch(r"(-?\d+)?(:)?(-?\d+)?", text)
    if match is None or not text or (match[2] is None and match[3] is not None):
        raise InputError(f"layers: {item!r} needs a range of blocks such as [8:16], [3], [q1] or [middle]")
    begin, colon, end = match.groups()
    if colon is None:
        block = int(begin) + count if int(begin) < 0 else int(begin)
        return {block}
    return set(range(count)[int(begin) if begin else None : int(end) if end else None])


def _overview(layers: dict[str, Layer]) -> str:
    kinds = {kind: sum(_is(kind, name, module) for name, module in layers.items()) for kind in KINDS}
    counts = ", ".join(f"{kind} ({count})" for kind, count in kinds.items() if count)
    blocks = _block_count(layers)
    shown: dict[str, None] = {}
    for name in layers:
        name = re.sub(r"\[\d+\]$", "[...]", name)
        match = _BLOCK.search(name)
        shown[f"{name[: match.start(1)]}{{0..{blocks - 1}}}{name[match.end(1) :]}" if match else name] = None
    return f"there are {counts} in {blocks} blocks: {', '.join(shown)}"
