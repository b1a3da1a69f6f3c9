"""Per-sample (projected) gradients of a model's selected layers, taken during an ordinary backward.

For a linear layer with inputs ``x[t]`` and output gradients ``dy[t]`` the gradient of one sample's loss is
``G = sum_t dy[t] (outer) x[t]``, so both factors are all it takes: ``x`` is seen (and projected) in the forward, ``dy``
in the backward, and no weight gradient is ever computed. A tap behind each selected layer joins its output to the
autograd graph, so weights need no ``requires_grad``; where nothing below does, the backward ends at the lowest tap.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from influence_fast import ops
from influence_fast.errors import InputError
from influence_fast.layers import check_supported, layer_shape, named_layers, select_layers
from influence_fast.ops import philox
from influence_fast.ops.common import accumulator
from influence_fast.projection import Projection, Side

__all__ = ["GradientCapture"]

_log = logging.getLogger("influence_fast")

# The unprojected gradient of an embedding is as large as its table, for every sample.
_DENSE_EMBEDDING_BYTES = 4 << 30
_TOKEN_ENTRIES = 1 << 20


class _Tap(torch.autograd.Function):
    """Identity whose backward hands the output gradient to ``receive``; ``anchor`` makes it part of a graph."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.receive(grad.detach())
        return grad if ctx.needs_input_grad[0] else None, None, None


@dataclass(frozen=True)
class _Tokens:
    """One-hot rows of width ``size``, kept as their ids ``(N, T)``: the inputs of an embedding."""

    ids: Tensor
    size: int


_Operand = Tensor | _Tokens


@dataclass
class _Layer:
    """One weight matrix: its gradient's shape ``(out, in)``, bias column included, and what projects it."""

    name: str
    shape: tuple[int, int]
    dim: int
    bias: bool
    left: Side | None = None
    right: Side | None = None
    single: Side | None = None
    matrices: dict[tuple[str, torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def project(self, operand: _Operand, side: Side, dtype: torch.dtype) -> Tensor:
        """``operand P^T`` of one side: ``(N, T, features) -> (N, T, k)``; tokens gather columns of P."""
        if isinstance(operand, Tensor) and side.kind == "sjlt":
            flat = operand.flatten(0, 1).to(dtype)
            return ops.sketch(flat, side).unflatten(0, operand.shape[:2])
        device = operand.device if isinstance(operand, Tensor) else operand.ids.device
        key = (side.identifier, device, dtype)
        if key not in self.matrices:
            self.matrices[key] = side.matrix(dtype, device)
        if isinstance(operand, Tensor):
            return operand.to(dtype) @ self.matrices[key].T
        return nn.functional.embedding(operand.ids, self.matrices[key].T)


class GradientCapture:
    """Collects per-sample gradients of ``layers`` while the caller's own code runs forward and backward.

    Example::

        with inf.GradientCapture(model, "attention[middle]", inf.Projection("rademacher", (16, 16))) as capture:
            cross_entropy(model(**batch).logits, labels, reduction="sum").backward()
            gradients = capture.pop()          # {layer: (N, 256)}

    Args:
        model: any ``nn.Module`` whose selected layers see the batch in their first dimension. It is left as it was
            found, also after an exception; weights need no ``requires_grad``.
        layers: a specification or a list of names for :func:`~influence_fast.select_layers`.
        projection: a :class:`~influence_fast.Projection` or its text; identity keeps whole gradients.
        bias: give the gradient of a layer that has a bias one more input column, of the bias (off by default).

    The loss must be the **sum** of per-sample losses: with a mean every gradient is divided by the batch size. A weight
    that several modules share (tied embedding and head) has the sum over its uses, as autograd would give it, which
    takes the backward down to the lowest of them. Call :meth:`pop` after each backward.

    Raises:
        InputError: unknown layers; modules whose per-sample gradient cannot be told from their input and output;
            a second forward before the first batch's gradients were popped; inputs changed in place after a layer
            saw them; gradients whose rows are not samples.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Iterable[str] = "all",
        projection: Projection | str = Projection("identity"),  # noqa: B008 (frozen)
        *,
        bias: bool = False,
    ) -> None:
        self.model = model
        self.projection = Projection.parse(projection) if isinstance(projection, str) else projection
        self.layers = select_layers(model, layers)
        check_supported(self.layers)
        modules = named_layers(model)
        self._layers = [_layer(name, modules[name], self.projection, bias) for name in self.layers]
        self._uses: dict[nn.Module, list[tuple[_Layer, bool]]] = {}
        for layer in self._layers:
            owner = modules[layer.name]
            for module in modules.values():
                if module is owner or _weight(module) is _weight(owner):
                    transposed = isinstance(module, nn.Embedding) != isinstance(owner, nn.Embedding)
                    self._uses.setdefault(module, []).append((layer, transposed))
        for module in self._uses:
            if isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward:
                name = next(n for n, m in modules.items() if m is module)
                raise InputError(
                    f"layers: {name!r} is a {type(module).__name__} with a forward of its own; leave it out"
                )
        self._handles: list[Any] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._batch: int | None = None
        self._part: tuple[int, int] | None = None
        self._gradients: dict[str, Tensor] = {}
        self._warned: set[str] = set()

    @property
    def dims(self) -> dict[str, int]:
        """Numbers per sample of each layer."""
        return {layer.name: layer.dim for layer in self._layers}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of each layer's unprojected gradient, bias column included."""
        return {layer.name: layer.shape for layer in self._layers}

    @property
    def identifiers(self) -> dict[str, dict[str, str]]:
        """Identifier of each layer's random matrices by role (left, right, single); empty for identity."""
        roles = ("left", "right", "single")
        return {
            layer.name: {role: side.identifier for role in roles if (side := getattr(layer, role)) is not None}
            for layer in self._layers
        }

    def clear(self) -> None:
        """Forget what has arrived since the last :meth:`pop`, such as part of a backward that failed."""
        self._gradients = {}

    @contextmanager
    def part(self, begin: int, end: int, total: int) -> Iterator[None]:
        """Within, layers see samples ``[begin, end)`` of ``total`` (all or some of their tokens), and what arrives is
        added to those rows: for a loss that runs the head, forward and backward, in chunks."""
        self._batch, self._part = total, (begin, end)
        try:
            yield
        finally:
            self._part = None

    def __enter__(self) -> GradientCapture:
        if self._handles:
            raise InputError("capture: already active; make another GradientCapture to nest")
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for module in self._uses:
            self._handles.append(module.register_forward_hook(self._see, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()
        self._batch = None

    def pop(self) -> dict[str, Tensor]:
        """Gradients of the batch, ``{layer: (N, dim)}`` out-major, float32 (float64 for a float64 model); forgets them.

        A selected layer that the loss does not depend on has zeros; that is logged once.
        """
        if not self._gradients:
            raise InputError(
                "capture: no gradient has arrived; run forward (with gradients enabled) and backward before pop()"
            )
        sample = next(iter(self._gradients.values()))
        rows = {name: len(gradient) for name, gradient in self._gradients.items()}
        if len(set(rows.values())) > 1:
            raise InputError(f"capture: layers disagree on the number of samples: {rows}")
        out = {}
        for layer in self._layers:
            if layer.name not in self._gradients and layer.name not in self._warned:
                self._warned.add(layer.name)
                _log.warning("the loss does not depend on layer %r: its gradients are zero", layer.name)
            found = self._gradients.get(layer.name)
            out[layer.name] = sample.new_zeros(len(sample), layer.dim) if found is None else found
        self.clear()
        return out

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if self._gradients:
            raise InputError("capture: pop() the gradients of one batch before the forward of the next")
        self._batch = _batch_size(args, kwargs)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        name = self._uses[module][0][0].name
        seen: _Operand
        if isinstance(module, nn.Embedding):
            if self._batch is not None and x.dim() == 2 and x.shape[0] == 1 < self._batch:
                # Positions come once for the whole batch; only a copy for each sample has a gradient for each.
                x, output = x.expand(self._batch, -1), output.expand(self._batch, -1, -1)
            if x.dim() != 2:
                raise InputError(f"layer {name!r}: expected ids of shape (N, T), got {tuple(x.shape)}")
            seen = _Tokens(self._rows(x[..., None], 1, name)[..., 0], module.num_embeddings)
        else:
            seen = self._rows(x.detach(), x.shape[-1], name)
        with _exactly(output):
            receivers = [self._record(module, layer, transposed, seen) for layer, transposed in self._uses[module]]
        return _Tap.apply(output, self._anchor, partial(self._receive, module, name, seen, receivers))

    def _rows(self, x: Tensor, features: int, name: str) -> Tensor:
        """``x`` as ``(N, T, features)``; tokens flattened into the batch are unfolded again."""
        count = self._batch if self._batch is not None else x.shape[0]
        if self._part is not None:
            count = self._part[1] - self._part[0]
        tokens = x.numel() // features
        if x.shape[0] != count and (x.dim() != 2 or tokens % max(count, 1)):
            raise InputError(
                f"layer {name!r}: expected {count} samples in the first dimension, got shape {tuple(x.shape)}"
            )
        return x.reshape(count, tokens // count if count else 0, features)

    def _record(self, module: nn.Module, layer: _Layer, transposed: bool, seen: _Operand) -> Callable[[Tensor], Tensor]:
        """Keep what ``layer`` needs of a module's input; the result turns an output gradient into ``(N, dim)``."""
        if layer.bias and not transposed and isinstance(seen, Tensor):
            seen = nn.functional.pad(seen, (0, 1), value=1.0)
        near, far = (layer.left, layer.right) if transposed else (layer.right, layer.left)
        if near is not None and far is not None:
            dtype = accumulator(_dtype(seen, module))
            kept = layer.project(seen, near, dtype)
            return lambda dy: _oriented(kept, layer.project(dy, far, dtype), transposed)
        if isinstance(seen, _Tokens):
            return partial(_tokens_gradient, layer, seen, transposed)
        dense = seen
        version = dense._version

        def gradient(dy: Tensor) -> Tensor:
            if dense._version != version:
                raise InputError(f"layer {layer.name!r}: its input was changed in place after the layer saw it")
            # Autocast may hand a layer float32 and take bfloat16 gradients back.
            dtype = torch.promote_types(dense.dtype, dy.dtype)
            x, g = (dy.to(dtype), dense.to(dtype)) if transposed else (dense.to(dtype), dy.to(dtype))
            return ops.outer(x, g).flatten(1) if layer.single is None else ops.sketch_outer(x, g, layer.single)

        return gradient

    def _receive(
        self,
        module: nn.Module,
        name: str,
        seen: _Operand,
        receivers: list[Callable[[Tensor], Tensor]],
        grad: Tensor,
    ) -> None:
        dy = self._rows(grad, grad.shape[-1], name)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and isinstance(seen, _Tokens):
            dy = dy.masked_fill((seen.ids == module.padding_idx)[..., None], 0)
        for (layer, _), receive in zip(self._uses[module], receivers, strict=True):
            with _exactly(dy):
                gradient = receive(dy)
            if self._part is not None:
                rows = gradient.new_zeros(cast(int, self._batch), layer.dim)
                rows = self._gradients.setdefault(layer.name, rows)
                rows[slice(*self._part)] += gradient
            else:
                earlier = self._gradients.get(layer.name)
                self._gradients[layer.name] = gradient if earlier is None else earlier + gradient


@contextmanager
def _exactly(like: Tensor) -> Iterator[None]:
    """Our own arithmetic: no graph, and not in the low precision that the model may run in."""
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield


def _layer(name: str, module: nn.Module, projection: Projection, bias: bool) -> _Layer:
    out, in_ = layer_shape(module)
    bias = bias and getattr(module, "bias", None) is not None
    in_ += bias
    layer = _Layer(name, (out, in_), projection.output_dim((out, in_)), bias)
    if projection.two_sided:
        layer.left, layer.right = projection.side(name, "left", out), projection.side(name, "right", in_)
    else:
        layer.single = projection.side(name, "single", out * in_)
    return layer


def _weight(module: nn.Module) -> Any:
    return getattr(module, "weight", None)


def _dtype(seen: _Operand, module: nn.Module) -> torch.dtype:
    return seen.dtype if isinstance(seen, Tensor) else _weight(module).dtype


def _oriented(near: Tensor, far: Tensor, transposed: bool) -> Tensor:
    """``(N, k_out * k_in)`` from the projected input (``near``) and output gradient (``far``) of one use."""
    left, right = (near, far) if transposed else (far, near)
    return ops.outer(right, left).flatten(1)


def _tokens_gradient(layer: _Layer, tokens: _Tokens, transposed: bool, dy: Tensor) -> Tensor:
    """Unprojected or sketched gradient of an embedding, from its ids; ``transposed`` in the frame of a tied head."""
    dy = dy.to(accumulator(dy.dtype))
    n, _, width = dy.shape
    if layer.single is not None and layer.single.kind == "sjlt":
        return _sketch_tokens(layer.single, tokens, transposed, dy)
    if n * width * tokens.size * dy.element_size() > _DENSE_EMBEDDING_BYTES:
        raise InputError(
            f"layer {layer.name!r}: whole gradients of {n} samples take {n * width * tokens.size * 4 / 2**30:.1f} GiB; "
            "project with two sides (rademacher:16x16) or sjlt:K, use smaller batches, or leave the embedding out"
        )
    table = dy.new_zeros(n * tokens.size, width)
    offset = torch.arange(n, device=dy.device)[:, None] * tokens.size
    table.index_add_(0, (tokens.ids + offset).flatten(), dy.flatten(0, 1))
    table = table.view(n, tokens.size, width)
    flat = (table if transposed else table.mT).flatten(1)
    return flat if layer.single is None else ops.sketch(flat, layer.single)


def _sketch_tokens(side: Side, tokens: _Tokens, transposed: bool, dy: Tensor) -> Tensor:
    n, t, width = dy.shape
    out = dy.new_zeros(n, side.k)
    channel = torch.arange(width, device=dy.device)
    step = max(1, _TOKEN_ENTRIES // max(1, n * width))
    for begin in range(0, t, step):
        ids = tokens.ids[:, begin : begin + step, None]
        feature = ids * width + channel if transposed else channel * tokens.size + ids
        index, sign = philox.sjlt_at(side.key, side.k, feature)
        out.scatter_add_(1, index.flatten(1), (dy[:, begin : begin + step] * sign).flatten(1))
    return out


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    named = dict(kwargs)
    for value in args:
        if isinstance(value, Mapping):
            named.update(value)
    candidates = [named.get(key) for key in ("input_ids", "inputs_embeds", "pixel_values", "input_values")]
    candidates += [*args, *named.values()]
    for value in candidates:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None
