"""What a module with this weight and bias gives, and nothing else does: linear layers, embeddings, norms, convolutions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from influence_fast.gradients.layers import is_conv1d, is_router, layer_shape, uncompiled
from influence_fast.ops.arguments import accumulator

_CHECKED_TOKENS = 32


def is_matrix(module: nn.Module) -> bool:
    """A linear layer, a Conv1D or an embedding."""
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)


def changes_output(module: nn.Module) -> bool:
    """Whether this embedding or router has a forward of its own around the use of its weight."""
    kind = type(module)
    own = kind.forward not in (nn.Linear.forward, nn.Embedding.forward)
    packed = not cast(Tensor, module.weight).is_floating_point()
    return own and not packed and (isinstance(module, nn.Embedding) or is_router(module))


def plain_kind(module: nn.Module, x: Tensor, output: Any) -> str:
    """How a layer's output follows from its weight and bias alone; empty where it does not.

    ``plain``, or of a norm what is done to its input: ``mean`` (minus the mean, over the deviation), ``square`` (over the
    root mean square) or ``none``. A norm's weight may be added to 1 first. With a packed weight it cannot be told.
    """
    weight = cast(Tensor, module.weight)
    packed = not weight.is_floating_point() or (is_matrix(module) and tuple(weight.shape) != _weight_shape(module))
    if packed:
        return "plain"
    if not isinstance(output, Tensor):
        return ""
    try:
        with torch.no_grad():
            if weight.dim() > 1:
                x, output = _spaced_rows(module, x, output) if is_matrix(module) else (x, output)
                return "plain" if _close(output, _plain_output(module, x)) else ""
            return _norm_kind(module, weight, x, output)
    except (RuntimeError, TypeError, AttributeError):
        # Not even called as a plain one is.
        return ""


def _spaced_rows(module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """A few tokens of a matrix layer's input and output, spread evenly.

    Such a layer treats its tokens one by one, and all of them would cost a second forward of the layer: a quarter of
    the whole capture where a context sees few batches.
    """
    inner = 0 if isinstance(module, nn.Embedding) else 1
    tokens = x.shape[: x.dim() - inner]
    if output.dim() == 0 or output.shape[:-1] != tokens:
        return x, output  # told apart by the comparison of shapes
    step = max(1, tokens.numel() // _CHECKED_TOKENS)
    return x.reshape(-1, *x.shape[len(tokens) :])[::step], output.reshape(-1, output.shape[-1])[::step]


def _norm_kind(module: nn.Module, weight: Tensor, x: Tensor, output: Tensor) -> str:
    bias = cast("Tensor | None", getattr(module, "bias", None))
    for kind in ("mean", "square", "none"):
        normal = normalised(module, x, kind)
        for offset in (0.0, 1.0):
            expected = normal * (weight.to(normal.dtype) + offset)
            if _close(output, expected if bias is None else expected + bias.to(normal.dtype)):
                return kind
    return ""


def _close(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape:
        return False
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    loose = 1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2
    return torch.allclose(output.detach().to(expected.dtype), expected, rtol=loose, atol=loose * scale)


def _plain_output(module: nn.Module, x: Tensor) -> Tensor:
    weight = cast(Tensor, module.weight)
    bias = cast("Tensor | None", getattr(module, "bias", None))
    if isinstance(module, nn.Embedding):
        return nn.functional.embedding(x, weight)
    if isinstance(module, nn.modules.conv._ConvNd):
        return cast(Any, module)._conv_forward(x, weight, bias)
    return nn.functional.linear(x, weight.T if is_conv1d(module) else weight, bias)


def _weight_shape(module: nn.Module) -> tuple[int, int]:
    out, in_ = layer_shape(module)
    return (out, in_) if isinstance(module, nn.Linear) else (in_, out)


def normalised(module: nn.Module, x: Tensor, kind: str) -> Tensor:
    """A norm's input before its weight, by a kind of :func:`plain_kind`."""
    x = x.to(accumulator(x.dtype))
    if kind == "none":
        return x
    names = ("variance_epsilon", "eps", "epsilon", "layer_norm_eps")
    eps = next((getattr(module, name) for name in names if hasattr(module, name)), 1e-6)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if kind == "mean":
        return nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def conv_gradients(module: Any, leaf: str, x: Tensor, dy: Tensor) -> Tensor:
    """Each sample's gradient of a convolution of ``x (N, in, ...)``.

    Of its weight ``(N, out, in / groups * kernel)``, of its bias ``(N, out, 1)``.
    """
    wide = accumulator(dy.dtype)
    x, dy = x.to(wide), dy.to(wide)
    if leaf == "bias":
        return dy.flatten(2).sum(2)[..., None]
    if isinstance(module.padding, str):
        # 'same' pads the right more where it cannot pad evenly.
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        pads = [(t // 2, t - t // 2) if module.padding == "same" else (0, 0) for t in total]
    else:
        pads = [(p, p) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, [side for pair in reversed(pads) for side in pair], mode=mode)
    for axis, (size, step, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        # Windows of each axis in turn: (N, in, out positions ..., kernel positions ...).
        x = x.unfold(axis + 2, gap * (size - 1) + 1, step)[..., ::gap]
    n, groups = len(x), module.groups
    positions = dy.shape[2:].numel()
    x = x[(slice(None), slice(None), *(slice(length) for length in dy.shape[2:]))]
    windows = x.reshape(n, groups, x.shape[1] // groups, positions, -1).transpose(2, 3).flatten(3)
    return (dy.reshape(n, groups, -1, positions) @ windows).flatten(1, 2)


def is_magnitude(module: nn.Module) -> bool:
    """Whether this holds the magnitudes of a linear layer of DoRA (Liu et al. 2024), as PEFT has it."""
    return type(module).__name__ == "DoraLinearLayer"


def before_magnitude(module: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """What DoRA's magnitudes m are multiplied with: ``(W x + s B A x) / |W + s B A|``, of a call's output.

    The output is ``m`` times that, less the base's ``W x``, which the call was given; None where it was not, or where m has
    a zero.
    """
    base, weight = kwargs.get("base_result"), module.weight.detach()
    if base is None or not bool((weight != 0).all()):
        return None
    bias = getattr(kwargs.get("base_layer"), "bias", None)
    wide = accumulator(output.dtype)
    base = base.detach().to(wide) - (0 if bias is None else bias.detach().to(wide))
    return (output.detach().to(wide) + base) / weight.to(wide)


def vector_owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """What a hook can serve besides matrices, by the parameter's name: biases of layers, and norms and convolutions.

    A module whose output is not a plain one is told when it is called, as a layer's is.
    """
    found = {}
    for name, module in model.named_modules():
        norm = "norm" in type(module).__name__.lower() and not isinstance(
            module, nn.modules.batchnorm._NormBase | nn.GroupNorm
        )
        conv = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        leaves = (
            ["weight", "bias"] if norm or conv else ["bias"] if linear else ["weight"] if is_magnitude(module) else []
        )
        for leaf in leaves:
            parameter = module._parameters.get(leaf)
            if parameter is not None and (parameter.dim() == 1 or conv):
                found[uncompiled(f"{name}.{leaf}")] = module, leaf
    return found
