"""What a build computes, beside its weights and rows: told when it begins, and asked again whenever it goes on.

Hashes of weights and rows do not see an adapter's scale, an activation that the config names, a loss with another
temperature or another chat template. So a store's facts keep two things. The **identity** is what can be read off: class,
config, adapters, the code of the loss with what is bound to it, the tokenizer. The **probe** is what comes out: loss and
gradient of two rows. Both are found again before anything is added to a store, or taken from it as done.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_fast import ops
from influence_fast.data.tasks import config_of, unwrapped
from influence_fast.gradients.differences import TOLERANCE, Identity, Probe
from influence_fast.gradients.model_state import fingerprint
from influence_fast.ops.projections import Side

# Config entries that change no number of a model in eval mode, or are another's affair (labels are hashed with the rows).
_IRRELEVANT = re.compile(
    r"(^|\.)(_.*|transformers_version|(torch_)?dtype|architectures|use_cache|return_dict|output_\w+|id2label|label2id"
    r"|pad_token_id|tokenizer_class|gradient_checkpointing|attn_implementation|name_or_path|\w*drop\w*)(\.|$)"
)
_SKETCH = 16
_SAMPLE = "The quick brown fox, 1234567890; \u00e9\u4e16\u754c!\n  def f(x): return x"


def identity_of(model: nn.Module, loss: Any = None, tokenizer: Any = None) -> Identity:
    """What is computed, as far as it can be read off: plain JSON."""
    found: Identity = {"class": type(unwrapped(model)).__qualname__}
    config = config_of(model)
    if config is not None and callable(getattr(config, "to_dict", None)):
        found["config"] = {n: v for n, v in _flat(config.to_dict()).items() if not _IRRELEVANT.search(n)}
    if adapters := _adapters(model):
        found["adapters"] = adapters
    # Losses of this package are known by name, and change with its version.
    if callable(loss) and not str(getattr(loss, "__module__", "")).startswith("influence_fast."):
        found["loss"] = _described_loss(loss, model)
    if tokenizer is not None:
        found["tokenizer"] = _described_tokenizer(tokenizer)
    return found


def probe_of(numbers: Sequence[int], names: Sequence[str], gradients: Mapping[str, Tensor], losses: Tensor) -> Probe:
    """Loss, norms by layer and a sketch of the whole gradient of some rows: plain JSON."""
    sketch = torch.zeros(len(numbers), _SKETCH, dtype=torch.float64, device="cpu")
    norms = []
    for name in names:
        gradient = gradients[name].detach().to("cpu", torch.float32)
        norms.append(gradient.double().norm(dim=1))
        if gradient.shape[1]:
            sketch += ops.sketch(gradient, Side("sjlt", f"{name}/probe", _SKETCH, gradient.shape[1])).double()
    by_row = torch.stack(norms, 1)
    return [
        {"row": int(number), "loss": _digits(loss), "norms": _listed(by_row[i]), "sketch": _listed(sketch[i])}
        for i, (number, loss) in enumerate(zip(numbers, losses.tolist(), strict=True))
    ]


def tolerance_of(model: nn.Module, precision: str | None) -> tuple[float, torch.dtype]:
    """How far apart two machines may be, as a share, and the dtype that they compute in."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision or "", own)
    return TOLERANCE.get(dtype, 8e-2), dtype


def _described_loss(loss: Callable[..., Any], model: nn.Module) -> dict[str, Any]:
    """Name, hash of the code, and what is bound to it by name."""
    seen = {id(model)}
    code = hashlib.sha256()
    bound: dict[str, str] = {}
    inner: Any = loss
    while isinstance(inner, functools.partial):
        outer = [(str(place), value) for place, value in enumerate(inner.args)]
        for name, value in [*outer, *inner.keywords.items()]:
            bound.setdefault(name, _bounded(value, seen))
        inner = inner.func
    if not inspect.isroutine(inner) and inspect.isroutine(inside := getattr(inner, "__wrapped__", None)):
        inner = inside
    if isinstance(inner, types.MethodType):
        bound |= _attributes(inner.__self__, seen)
        inner = inner.__func__
    elif not inspect.isroutine(inner) and not inspect.isclass(inner):
        bound |= _attributes(inner, seen)
        inner = type(inner).__call__
    _add_function(inner, code, bound, seen)
    return {
        "name": getattr(inner, "__qualname__", type(loss).__qualname__),
        "code": code.hexdigest()[:32],
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **{name: bound[name] for name in sorted(bound)},
    }


def _attributes(value: Any, seen: set[int]) -> dict[str, str]:
    """What a callable object carries: weights of a module, else its plain attributes."""
    if id(value) in seen:
        return {}
    if isinstance(value, nn.Module):
        return {"self": f"{type(value).__qualname__} {fingerprint(value)[:32]}"}
    plain = {n: v for n, v in getattr(value, "__dict__", {}).items() if _is_plain(v)}
    return {f"self.{name}": _bounded(entry, seen) for name, entry in plain.items()}


def _add_function(function: Any, code: Any, bound: dict[str, str], seen: set[int], depth: int = 0) -> None:
    """The code of a function, its defaults and closure, and of what it names in its own module."""
    if id(function) in seen:
        return
    seen.add(id(function))
    body = getattr(function, "__code__", None)
    if body is None:
        code.update(f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}\n".encode())
        return
    _add_code(body, code)
    prefix = "" if depth == 0 else f"{function.__qualname__}."
    try:
        defaults = {n: p.default for n, p in inspect.signature(function, follow_wrapped=False).parameters.items()}
    except (TypeError, ValueError):
        defaults = {}
    found = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty}
    for name, cell in zip(body.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # Not filled yet: a function that names itself.
            continue
    for name in _names(body):
        value = function.__globals__.get(name, inspect.Parameter.empty)
        if isinstance(value, types.FunctionType) and value.__module__ == function.__module__:
            found[name] = value
        elif _is_plain(value):
            found[f"global {name}"] = value
    for name, value in found.items():
        if isinstance(value, types.FunctionType):
            _add_function(value, code, bound, seen, depth + 1)
        else:
            bound.setdefault(prefix + name, _bounded(value, seen))


def _names(body: types.CodeType) -> set[str]:
    nested = [const for const in body.co_consts if isinstance(const, types.CodeType)]
    return set(body.co_names).union(*map(_names, nested))


def _add_code(body: types.CodeType, digest: Any) -> None:
    """Bytecode and constants; nothing of files and lines."""
    digest.update(body.co_code)
    digest.update(repr((body.co_names, body.co_varnames, body.co_freevars, body.co_argcount, body.co_flags)).encode())
    for const in body.co_consts:
        if isinstance(const, types.CodeType):
            _add_code(const, digest)
        else:
            digest.update(_canonical(const, set()).encode())


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    plain = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, Tensor, np.ndarray, np.generic)
    return value is None or isinstance(value, plain)


def _bounded(value: Any, seen: set[int]) -> str:
    """A value as text that tells it apart: itself where it is short, else a hash."""
    text = _canonical(value, set(seen))
    return text if len(text) <= 64 else "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:32]


def _canonical(value: Any, seen: set[int]) -> str:
    """Text that is the same for equal values in every process."""
    if isinstance(value, Tensor | np.ndarray):
        array = torch.as_tensor(value).detach().cpu().contiguous()
        data = array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""
        return f"{array.dtype} {tuple(array.shape)} {hashlib.sha256(data).hexdigest()[:32]}"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return repr(value.item() if isinstance(value, np.generic) else value)
    if isinstance(value, torch.dtype | torch.device | types.ModuleType):
        return getattr(value, "__name__", str(value))
    if id(value) in seen:
        return "..."
    seen = seen | {id(value)}
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(_canonical(v, seen) for v in value)) + "}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{_canonical(k, seen)}: {_canonical(v, seen)}" for k, v in value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_canonical(v, seen) for v in value) + "]"
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {fingerprint(value)}"
    if isinstance(value, functools.partial):
        return f"partial({_canonical([value.func, value.args, value.keywords], seen)})"
    if isinstance(value, types.FunctionType | types.MethodType):
        code, bound = hashlib.sha256(), _attributes(getattr(value, "__self__", None), set(seen))
        _add_function(getattr(value, "__func__", value), code, bound, set(seen))
        return f"{value.__qualname__} {sorted(bound.items())}"
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{type(value).__qualname__} {sorted(_attributes(value, set(seen)).items())}"


def _adapters(model: nn.Module) -> dict[str, Any]:
    """What adapters do beside their weights: which are on, by what factor, merged or not. Empty for a plain model."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        active = getattr(module, "active_adapters", None)
        if not isinstance(active, list | tuple) or not hasattr(module, "merged_adapters"):
            continue
        scaling = getattr(module, "scaling", None)
        for adapter in active:
            factor = scaling.get(adapter) if isinstance(scaling, Mapping) else None
            state = [f"scale {factor:.6g}"] if isinstance(factor, int | float) else []
            state += ["off"] if getattr(module, "disable_adapters", False) else []
            state += ["merged"] if adapter in module.merged_adapters else []
            state += ["dora"] if isinstance(d := getattr(module, "use_dora", None), Mapping) and d.get(adapter) else []
            found.setdefault(str(adapter), []).append(f"{name}: {', '.join(state)}")
    return {
        adapter: f"{len(layers)} layers, {_some({part.split(': ', 1)[1] for part in layers})}, "
        + hashlib.sha256("\n".join(sorted(layers)).encode()).hexdigest()[:16]
        for adapter, layers in found.items()
    }


def _described_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does, by hashes that do not depend on how a version of the library keeps it."""
    found: dict[str, Any] = {}
    if callable(vocabulary := getattr(tokenizer, "get_vocab", None)):
        entries = "\n".join(f"{token!r} {number}" for token, number in sorted(vocabulary().items()))
        found["vocabulary"] = hashlib.sha256(entries.encode("utf-8", "backslashreplace")).hexdigest()[:32]
    special = getattr(tokenizer, "special_tokens_map", None)
    if isinstance(special, Mapping):
        found["special tokens"] = ", ".join(sorted(f"{name} {value}" for name, value in special.items()))
    template = getattr(tokenizer, "chat_template", None)
    text = _canonical(template, set())
    found["template"] = "none" if template is None else hashlib.sha256(text.encode()).hexdigest()[:32]
    # A processor of more than texts may refuse one.
    with contextlib.suppress(TypeError, ValueError, KeyError):
        found["sample"] = " ".join(map(str, tokenizer(_SAMPLE)["input_ids"]))
    return found


def _flat(document: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested entries by dotted names; lists and numbers as JSON has them."""
    out: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{above}{name}.")
        elif (
            value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
        ):
            out[f"{above}{name}"] = value
        else:
            out[f"{above}{name}"] = _bounded(value, set())
    return out


def _listed(values: Tensor) -> list[float]:
    return [_digits(value) for value in values.tolist()]


def _digits(value: float) -> float:
    """As many digits as a float32 has: a manifest is to stay short."""
    return float(f"{value:.8g}")


def _some(values: set[str]) -> str:
    ordered = sorted(filter(None, values))
    return "; ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
