"""Uses of a parameter wherever they are: ``F.linear(x, W)``, ``x @ W.T``, ``W @ x``, ``F.embedding(ids, W)``.

A layer whose module does something of its own (an embedding that is scaled or whose ids have an offset, a router, a weight
that is read beside its module) is captured at the operations that its parameter enters. All of them pass here, so that one
of which the gradient cannot be told is noticed where it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

functional = nn.functional

_attributes: Any = torch.Tensor
_FLIPS = {_attributes.T.__get__, _attributes.mT.__get__, torch.Tensor.t, torch.t}
_TRANSPOSES = {torch.Tensor.transpose, torch.transpose, torch.Tensor.swapaxes, torch.swapaxes}
_PERMUTES = {torch.Tensor.permute, torch.permute}
# The same numbers, perhaps in another type.
_SAME = {
    torch.Tensor.to,
    torch.Tensor.type,
    torch.Tensor.type_as,
    torch.Tensor.float,
    torch.Tensor.double,
    torch.Tensor.half,
    torch.Tensor.bfloat16,
    torch.Tensor.contiguous,
    torch.Tensor.clone,
}
# No gradient comes through these.
_CUT = {
    torch.Tensor.detach,
    torch.detach,
    _attributes.data.__get__,
    _attributes.grad.__get__,
    torch.Tensor.requires_grad_,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.Tensor.new_zeros,
    torch.Tensor.new_ones,
    torch.Tensor.new_empty,
    torch.Tensor.new_tensor,
}
_MATMULS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}
_REVERSED = {torch.Tensor.__rmatmul__}


class Use(NamedTuple):
    """One operation that a parameter enters.

    ``x`` are its inputs, ``(..., features)`` or ids; ``by_rows`` whether they meet the parameter's rows (``x @ W``, an
    embedding), not its columns; ``columns`` whether features and tokens have their places changed (``W @ x``); ``bias``
    whether the parameter is added to the output.
    """

    parameter: nn.Parameter
    x: Tensor
    by_rows: bool
    columns: bool = False
    ids: bool = False
    bias: bool = False
    padding: int | None = None


class FollowedUses(TorchFunctionMode):
    """Within, every use of ``parameters`` is shown to ``see``, whose result takes the output's place.

    ``lost(parameter, name)`` is called for a use of which the gradient cannot be told; it raises.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        see: Callable[[list[Use], Tensor], Tensor],
        lost: Callable[[nn.Parameter, str], None],
    ) -> None:
        super().__init__()
        self._parameters = {id(parameter): (parameter, False, parameter) for parameter in parameters}
        self._see, self._lost = see, lost
        # What was made of a parameter, and whether it is transposed; kept alive, so that ids stay theirs.
        self._forms: dict[int, tuple[nn.Parameter, bool, Tensor]] = dict(self._parameters)

    def clear(self) -> None:
        """Forget what was made of the parameters."""
        self._forms = dict(self._parameters)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        forms = self._forms
        if not any(id(value) in forms for value in args) and not any(id(value) in forms for value in kwargs.values()):
            nested = [value for value in (*args, *kwargs.values()) if isinstance(value, tuple | list)]
            inside = [item for value in nested for item in value if id(item) in forms]
            if inside and torch.is_grad_enabled() and _has_floats(output):
                self._lost(forms[id(inside[0])][0], getattr(func, "__name__", str(func)))
            return output
        if not torch.is_grad_enabled():
            return output
        return self._used(func, args, kwargs, output)

    def _used(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        forms = self._forms
        if not _has_floats(output) or func in _CUT:
            return output
        # Within a transform of torch.func, such as a vmap over the samples, what enters is no batch.
        uses = [] if _is_transformed(output) else self._uses(func, args, kwargs)
        if uses:
            return self._see(uses, output)
        first = args[0] if args else None
        if id(first) in forms and not any(id(value) in forms for value in args[1:]):
            parameter, flipped, _ = forms[id(first)]
            if func in _SAME:
                forms[id(output)] = (parameter, flipped, output)
                return output
            swapped = _swapped(func, args[1:], kwargs)
            if swapped is not None and parameter.dim() == 2:
                forms[id(output)] = (parameter, flipped != swapped, output)
                return output
        [lost, *_] = [value for value in (*args, *kwargs.values()) if id(value) in forms]
        self._lost(forms[id(lost)][0], getattr(func, "__name__", str(func)))
        return output

    def _uses(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Use]:
        forms = self._forms
        if func is functional.linear:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            x, bias = named["input"], named.get("bias")
            if id(x) in forms:
                return []
            uses = []
            if id(named["weight"]) in forms:
                parameter, flipped, _ = forms[id(named["weight"])]
                uses.append(Use(parameter, x, by_rows=flipped))
            if id(bias) in forms:
                uses.append(Use(forms[id(bias)][0], x, by_rows=False, bias=True))
            return uses
        if func in (functional.embedding, torch.embedding):
            names = (
                ("input", "weight", "padding_idx") if func is functional.embedding else ("weight", "input", "padding")
            )
            named = dict(zip(names, args, strict=False)) | kwargs
            if id(named["weight"]) not in forms or named.get("scale_grad_by_freq") or named.get("max_norm"):
                return []
            parameter, flipped, _ = forms[id(named["weight"])]
            padding = named.get("padding_idx", named.get("padding", None))
            padding = None if padding is None or (func is torch.embedding and padding < 0) else padding
            if padding is not None and padding < 0:
                padding += named["weight"].shape[0]
            return [Use(parameter, named["input"], by_rows=not flipped, ids=True, padding=padding)]
        if func in _MATMULS or func in _REVERSED:
            left, right = (args[1], args[0]) if func in _REVERSED else (args[0], args[1] if len(args) > 1 else None)
            if (
                not isinstance(left, Tensor)
                or not isinstance(right, Tensor)
                or (id(left) in forms and id(right) in forms)
            ):
                return []
            if id(right) in forms:
                parameter, flipped, _ = forms[id(right)]
                return [Use(parameter, left, by_rows=not flipped)] if left.dim() > 1 else []
            parameter, flipped, _ = forms[id(left)]
            return [Use(parameter, right, by_rows=flipped, columns=True)] if right.dim() > 2 else []
        return []


def _has_floats(output: Any) -> bool:
    parts = output if isinstance(output, tuple | list) else [output]
    return any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)


def _is_transformed(output: Any) -> bool:
    parts = output if isinstance(output, tuple | list) else [output]
    return any(isinstance(part, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(part) for part in parts)


def _swapped(func: Any, dims: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
    """Whether a matrix comes out transposed; None where this is another operation."""
    if func in _FLIPS:
        return True
    if func not in _TRANSPOSES and func not in _PERMUTES:
        return None
    given = [*dims, *kwargs.values()]
    flat = list(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else given
    first, second = (dim % 2 for dim in flat)
    return first != second if func in _TRANSPOSES else first == 1
