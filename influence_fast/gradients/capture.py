"""Per-sample (projected) gradients of a model's selected layers, taken during an ordinary backward.

For a linear layer with inputs ``x[t]`` and output gradients ``dy[t]`` the gradient of one sample's loss is
``G = sum_t dy[t] (outer) x[t]``, so both factors are all it takes: ``x`` is seen (and projected) in the forward, ``dy``
in the backward, and no weight gradient is ever computed. A hook behind each selected layer joins its output to the
autograd graph, so weights need no ``requires_grad``; where nothing below does, the backward ends at the lowest one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from influence_fast import ops
from influence_fast.errors import InputError
from influence_fast.gradients.layers import (
    is_conv1d,
    is_expert,
    layer_shape,
    named_layers,
    other_parameters,
    select_layers,
    uncompiled,
)
from influence_fast.gradients.model_state import is_sharded
from influence_fast.ops import philox
from influence_fast.ops.arguments import accumulator
from influence_fast.ops.projections import Projection, Side

_log = logging.getLogger("influence_fast")

# The unprojected gradient of an embedding is as large as its table, for every sample.
_DENSE_EMBEDDING_BYTES = 4 << 30
_TOKEN_ENTRIES = 1 << 20
_GROUP_ENTRIES = 1 << 22


class _OutputHook(torch.autograd.Function):
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
class TokenIds:
    """One-hot rows of width ``size``, kept as their ids ``(N, T)``: the inputs of an embedding."""

    ids: Tensor
    size: int


@dataclass(frozen=True)
class SampleRows:
    """Whose tokens a layer sees: those of ``count`` samples, of one length, or as ``index (N, T)`` numbers ``tokens``."""

    count: int
    tokens: int = 0
    index: Tensor | None = None

    def unfold(self, x: Tensor, features: int, name: str) -> Tensor:
        """``x`` as ``(N, T, features)``; tokens flattened into the batch are unfolded, packed ones padded with 0."""
        tokens = x.numel() // features
        if self.index is not None:
            if tokens != self.tokens:
                raise InputError(f"layer {name!r}: expected {self.tokens} packed tokens, got shape {tuple(x.shape)}")
            return nn.functional.pad(x.reshape(tokens, features), (0, 0, 0, 1))[self.index.to(x.device)]
        if self.count != 1 and x.shape[0] != self.count and (x.dim() != 2 or tokens % max(self.count, 1)):
            raise InputError(
                f"layer {name!r}: expected {self.count} samples in the first dimension, got shape {tuple(x.shape)}"
            )
        return x.reshape(self.count, tokens // self.count if self.count else 0, features)


Operand = Tensor | TokenIds
# The projected factors (N, T, k_in) and (N, T, k_out) of a gradient that is not formed yet.
Factors = tuple[Tensor, Tensor]


class _Operator(NamedTuple):
    """A side, and the constant that what it projects gets as one more feature where it has one too few: 1 for a bias."""

    side: Side
    constant: float = 0.0


@dataclass
class CapturedLayer:
    """One weight matrix: its gradient's shape ``(out, in)``, bias column included, and what projects it."""

    name: str
    shape: tuple[int, int]
    dim: int
    bias: bool
    left: Side | None = None
    right: Side | None = None
    single: Side | None = None
    turned: bool = False
    """Whether the parameter is the gradient's ``(out, in)`` transposed: an embedding's table, a Conv1D's weight."""
    vector: str = ""
    """``bias`` or ``weight`` where this is a vector that is added to, or multiplied with, every token."""
    operators: tuple[tuple[_Operator, _Operator], ...] = ()
    """Of the input and of the output gradient of a use; then of a use with the weight transposed. None for one side."""

    def __post_init__(self) -> None:
        if self.left is not None and self.right is not None:
            straight = _Operator(self.right, float(self.bias)), _Operator(self.left)
            self.operators = straight, (straight[1], _Operator(self.right))

    def projected(self, gradients: Tensor, matrices: ops.Matrices) -> Tensor:
        """Whole gradients ``(N, out, in)`` as they are kept: ``(N, dim)``."""
        if self.left is not None and self.right is not None:
            right = matrices.project(gradients, (self.right,), (0.0,))[0]
            return matrices.project(right.mT.contiguous(), (self.left,))[0].mT.flatten(1)
        flat = gradients.flatten(1)
        return flat if self.single is None else ops.sketch(flat, self.single)


@dataclass
class _SharedInput:
    """One input of the layers called with it in a row (q, k, v; gate, up), projected for all of them at once.

    ``projected`` has the ``(N, T, k)`` of each of ``operators`` once there are; ``users`` are those of the layers that came.
    """

    tensor: Tensor
    rows: Tensor
    version: int
    operators: tuple[_Operator, ...] = ()
    users: list[_Operator] = field(default_factory=list)
    projected: tuple[Tensor, ...] = ()

    def serves(self, x: Tensor, operator: _Operator) -> bool:
        same = self.tensor is x and self.version == x._version and operator not in self.users
        return same and (operator in self.operators or not self.projected)

    def project(self, matrices: ops.Matrices) -> None:
        if not self.projected:
            if self.tensor._version != self.version:
                layer = self.operators[0].side.identifier.rsplit("/", 1)[0]
                raise InputError(f"layer {layer!r}: its input was changed in place after the layer saw it")
            sides, constants = zip(*self.operators, strict=True)
            self.projected = matrices.project(self.rows, sides, constants)


class GradientCapture:
    """Collects per-sample gradients of ``layers`` while the caller's own code runs forward and backward.

    Example::

        with inf.GradientCapture(model, "attention[middle]", inf.Projection("rademacher", (16, 16))) as capture:
            cross_entropy(model(**batch).logits, labels, reduction="sum").backward()
            gradients = capture.pop()  # {layer: (N, 256)}

    Args:
        model: any ``nn.Module`` whose selected layers see the batch in their first dimension. It is left as it was
            found, also after an exception; weights need no ``requires_grad``.
        layers: a specification or a list of names for :func:`~influence_fast.select_layers`.
        projection: a :class:`~influence_fast.Projection` or its text; identity keeps whole gradients.
        bias: give the gradient of a layer that has a bias one more input column, of the bias (off by default).
        exact: names of the layers that autograd itself differentiates, for uses of a weight that hooks do not see. They, and
            parameters that are no layer's weight (norms, biases, ...), need a batch of one sample.

    The loss must be the **sum** of per-sample losses: with a mean every gradient is divided by the batch size. A weight
    that several modules share (tied embedding and head) has the sum over its uses, as autograd would give it, which
    takes the backward down to the lowest of them. Call :meth:`pop` after each backward. Modules that were compiled by
    ``torch.compile`` run eagerly inside, because compiled code does not see hooks that come later.

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
        exact: Iterable[str] = (),
    ) -> None:
        self.model = model
        self.projection = Projection.parse(projection)
        self.layers = select_layers(model, layers)
        modules, parameters = named_layers(model), other_parameters(model)
        vectors = {
            name: (module, leaf)
            for name, (module, leaf) in vector_owners(model).items()
            if name in parameters and name not in set(exact)
        }
        self.exact = [
            name for name in self.layers if name in set(exact) or (name in parameters and name not in vectors)
        ]
        self._layers = [
            _layer(name, modules[name], self.projection, bias)
            if name in modules
            else _parameter_layer(name, parameters[name], self.projection)
            for name in self.layers
        ]
        # Weight, then bias where the gradient has a column for it.
        self._parameters: dict[str, list[nn.Parameter]] = {}
        for layer in self._layers:
            if layer.name in set(self.exact):
                self._parameters[layer.name] = owned_parameters(layer, modules, parameters)
        self._uses: dict[nn.Module, list[tuple[CapturedLayer, bool]]] = {}
        for layer in self._layers:
            if layer.name in self._parameters:
                continue
            if layer.name in vectors:
                module, leaf = vectors[layer.name]
                layer.vector = leaf
                self._uses.setdefault(module, []).append((layer, False))
                continue
            owner = modules[layer.name]
            for module in modules.values():
                if module is owner or _weight(module) is _weight(owner):
                    transposed = isinstance(module, nn.Embedding) != isinstance(owner, nn.Embedding)
                    self._uses.setdefault(module, []).append((layer, transposed))
        self._plain: set[nn.Module] = set()
        self._handles: list[Any] = []
        self._stance = ExitStack()
        self._matrices = ops.Matrices()
        self._shared: _SharedInput | None = None
        self._together: dict[_Operator, tuple[_Operator, ...]] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self._batch: int | None = None
        self._part: tuple[int, int] | None = None
        self._packed: SampleRows | None = None
        self._factors: dict[str, Factors] = {}
        self._gradients: dict[str, Tensor] = {}
        self._warned: set[str] = set()
        self._flags: list[tuple[nn.Parameter, bool, Tensor | None]] = []

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
        self._gradients, self._factors = {}, {}
        self._shared = None
        for parameter, _, _ in self._flags:
            parameter.grad = None

    @contextmanager
    def part(self, begin: int, end: int, total: int) -> Iterator[None]:
        """Within, layers see samples ``[begin, end)`` of ``total`` (all or some of their tokens), and what arrives is
        added to those rows: for a loss that runs the head, forward and backward, in chunks."""
        self._batch, self._part = total, (begin, end)
        try:
            yield
        finally:
            self._part = None

    @contextmanager
    def packed(self, lengths: Iterable[int]) -> Iterator[None]:
        """Within, a forward sees several samples packed into each row: its tokens, row after row, are those of the
        first sample, then those of the second, and so on; :meth:`pop` gives one gradient for each.

        Args:
            lengths: tokens of each sample, the differences of ``cu_seqlens``. They add up to the batch's tokens:
                padding at the end counts as one more sample. That samples do not attend to each other is the
                model's affair (``position_ids`` or ``cu_seqlens``), and so is a loss that is summed over samples.

        Raises:
            InputError: lengths that are not positive; a layer that sees another number of tokens.
        """
        sizes = [int(length) for length in lengths]
        if not sizes or min(sizes) < 1:
            raise InputError(f"lengths: expected positive numbers of tokens, got {sizes[:8]}")
        total, step = sum(sizes), torch.arange(max(sizes))
        ends = torch.tensor(sizes).cumsum(0)
        starts = ends - torch.tensor(sizes)
        # The row behind the last token is zero.
        index = torch.where(step < torch.tensor(sizes)[:, None], starts[:, None] + step, total)
        self._packed = SampleRows(len(sizes), total, index)
        try:
            yield
        finally:
            self._packed = None

    def __enter__(self) -> GradientCapture:
        if self._handles:
            raise InputError("capture: already active; make another GradientCapture to nest")
        if any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in self.model.modules()):
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for module in self._uses:
            self._handles.append(module.register_forward_hook(self._see, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end))
        for parameter in self._exact_parameters():
            self._flags.append((parameter, parameter.requires_grad, parameter.grad))
            parameter.grad = None
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter, flag, grad in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        self._flags.clear()
        self._stance.close()
        self.clear()
        self._batch = None

    def pop(self) -> dict[str, Tensor]:
        """Gradients of the batch, ``{layer: (N, dim)}`` out-major, float32 (float64 for a float64 model); forgets them.

        A selected layer that the loss does not depend on has zeros; that is logged once.
        """
        self._take_exact()
        if not self._gradients and not self._factors:
            raise InputError(
                "capture: no gradient has arrived; run forward (with gradients enabled) and backward before pop()"
            )
        self._form()
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

    def _take_exact(self) -> None:
        """Gradients that autograd left on the parameters, of the one sample there was."""
        if not self._flags:
            return
        if self._batch not in (None, 1) or self._packed is not None:
            raise InputError(
                f"layer {self.exact[0]!r}: autograd gives the gradient of the whole batch, so it takes one sample a batch, "
                f"got {self._batch}"
            )
        for layer in self._layers:
            owned = self._parameters.get(layer.name, [])
            grads = [parameter.grad for parameter in owned]
            if any(grad is not None for grad in grads):
                self._gradients[layer.name] = self.as_kept(layer, owned, grads, self._matrices)

    def as_kept(
        self, layer: CapturedLayer, owned: Sequence[Tensor], grads: Sequence[Tensor | None], matrices: ops.Matrices
    ) -> Tensor:
        """What autograd gives for a layer's weight (and bias) as it is kept of one sample: ``(1, dim)``."""
        weight, *bias = [
            (torch.zeros_like(parameter) if grad is None else grad).detach().to(accumulator(parameter.dtype))
            for parameter, grad in zip(owned, grads, strict=True)
        ]
        matrix = weight.T if layer.turned else weight.flatten(1) if weight.dim() > 1 else weight[..., None]
        if bias:
            matrix = torch.cat([matrix, bias[0][:, None]], 1)
        return layer.projected(matrix.reshape(1, *layer.shape), matrices)

    @property
    def captured_layers(self) -> list[CapturedLayer]:
        """The layers with their shapes and sides."""
        return list(self._layers)

    def _exact_parameters(self) -> list[nn.Parameter]:
        """Each of them once, also where two layers share one."""
        return list({id(p): p for found in self._parameters.values() for p in found}.values())

    def _form(self) -> None:
        """Gradients from their factors: one call for all layers of one shape, as far as copying them together pays."""
        groups: dict[Any, list[str]] = {}
        for name, (x, dy) in self._factors.items():
            key = (x.shape, dy.shape, x.dtype, x.device)
            groups.setdefault(key, []).append(name)
        for names in groups.values():
            largest = max(factor.numel() for factor in self._factors[names[0]])
            step = max(1, _GROUP_ENTRIES // max(1, largest))
            for begin in range(0, len(names), step):
                chosen = names[begin : begin + step]
                xs, dys = zip(*(self._factors[name] for name in chosen), strict=True)
                formed = _product(torch.cat(xs), torch.cat(dys)) if len(chosen) > 1 else _product(xs[0], dys[0])
                self._gradients.update(zip(chosen, formed.chunk(len(chosen)), strict=True))
        self._factors = {}

    def _pending(self) -> bool:
        """Whether gradients have arrived that nobody popped."""
        return bool(self._gradients or self._factors)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if self._pending():
            raise InputError("capture: pop() the gradients of one batch before the forward of the next")
        self._batch = _batch_size(args, kwargs)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._shared is not None:
            with _exactly(self._shared.rows):
                self._flush()

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if module not in self._plain:
            self._check_plain(module, x, output)
        if self._batch != 1 and is_expert(self._uses[module][0][0].name):
            raise InputError(
                f"layer {self._uses[module][0][0].name!r}: one expert of a mixture sees routed tokens without their "
                f"sample, so it takes one sample a batch, got {self._batch}"
            )
        name, samples = self._uses[module][0][0].name, self._samples(x)
        seen: Operand
        if isinstance(module, nn.Embedding):
            if self._batch is not None and x.dim() == 2 and x.shape[0] == 1 < self._batch:
                # Positions come once for the whole batch; only a copy for each sample has a gradient for each.
                x, output = x.expand(self._batch, -1), output.expand(self._batch, -1, -1)
            if x.dim() != 2 and self._batch != 1:
                raise InputError(f"layer {name!r}: expected ids of shape (N, T), got {tuple(x.shape)}")
            seen = TokenIds(samples.unfold(x[..., None], 1, name)[..., 0], module.num_embeddings)
        else:
            seen = x
        with _exactly(output):
            receivers = [self._record(module, *use, seen, samples) for use in self._uses[module]]
        return _OutputHook.apply(output, self._anchor, partial(self._receive, module, name, samples, seen, receivers))

    def _check_plain(self, module: nn.Module, x: Tensor, output: Any) -> None:
        """Raise where a layer's output is not that of its weight and bias alone; once for each module."""
        name = self._uses[module][0][0].name
        weight = cast(Tensor, module.weight)
        matrix = isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)
        packed = not weight.is_floating_point() or (matrix and tuple(weight.shape) != _weight_shape(module))
        if is_sharded(weight) or packed:
            # A part of a weight, or a packed one: there is nothing to compare with.
            self._plain.add(module)
            return
        with torch.no_grad():
            expected = _plain_output(module, x)
        same = isinstance(output, Tensor) and output.shape == expected.shape
        if same:
            scale = float(expected.abs().max()) if expected.numel() else 0.0
            loose = 1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2
            same = torch.allclose(output.detach().to(expected.dtype), expected, rtol=loose, atol=loose * scale)
        if not same:
            raise UnseenUse(
                [layer.name for layer, _ in self._uses[module]],
                f"layer {name!r}: the output of its {type(module).__name__} is not that of a plain layer with its weight (a "
                "forward or a hook of its own), so its gradient cannot be told from inputs and outputs; name it in exact=",
            )
        self._plain.add(module)

    def _share(self, x: Tensor, samples: SampleRows, operator: _Operator) -> tuple[_SharedInput, int]:
        """The input that ``operator`` projects, and its place among those that do.

        Which layers read one tensor is known when another tensor comes along, and from then on at the first of them,
        while the tensor is in cache. Either way it is the same product, to the bit.
        """
        shared = self._shared
        if shared is None or not shared.serves(x, operator):
            self._flush()
            rows = samples.unfold(x.detach(), x.shape[-1], operator.side.identifier.rsplit("/", 1)[0])
            shared = self._shared = _SharedInput(x, rows, x._version, self._together.get(operator, ()))
            if shared.operators:
                shared.project(self._matrices)
        shared.users.append(operator)
        if not shared.projected:
            shared.operators = tuple(shared.users)
        return shared, shared.operators.index(operator)

    def _flush(self) -> None:
        if self._shared is not None:
            self._shared.project(self._matrices)
            self._together[self._shared.users[0]] = tuple(self._shared.users)
            del self._shared.tensor, self._shared.rows
            self._shared = None

    def _samples(self, x: Tensor) -> SampleRows:
        if self._packed is not None:
            return self._packed
        if self._part is not None:
            return SampleRows(self._part[1] - self._part[0])
        return SampleRows(self._batch if self._batch is not None else x.shape[0])

    def _record(
        self, module: nn.Module, layer: CapturedLayer, transposed: bool, seen: Operand, samples: SampleRows
    ) -> Callable[[Tensor], Tensor | Factors]:
        """Keep what ``layer`` needs of a module's input; the result turns an output gradient into ``(N, dim)``, or
        into the factors of it."""
        if layer.vector:
            return self._record_vector(module, layer, seen, samples)
        if layer.operators:
            return self._record_two_sided(module, layer, transposed, seen, samples)
        if isinstance(seen, TokenIds):
            return partial(_tokens_gradient, layer, seen, transposed)
        dense = samples.unfold(seen.detach(), seen.shape[-1], layer.name)
        if layer.bias and not transposed:
            dense = nn.functional.pad(dense, (0, 1), value=1.0)
        version = dense._version

        def gradient(dy: Tensor) -> Tensor:
            if dense._version != version:
                raise InputError(f"layer {layer.name!r}: its input was changed in place after the layer saw it")
            x, g = _oriented(*promoted(dense, dy), transposed)
            return ops.outer(x, g).flatten(1) if layer.single is None else ops.sketch_outer(x, g, layer.single)

        return gradient

    def _record_vector(
        self, module: nn.Module, layer: CapturedLayer, seen: Operand, samples: SampleRows
    ) -> Callable[[Tensor], Tensor | Factors]:
        """A bias is the sum of ``dy`` over tokens, a norm's weight the sum of ``dy`` times the normalised input."""
        scaled: Tensor | None = None
        if layer.vector == "weight" and isinstance(seen, Tensor):
            normal = normalised(module, seen.detach())
            scaled = samples.unfold(normal, normal.shape[-1], layer.name)

        def gradient(dy: Tensor) -> Tensor:
            dy = dy.to(accumulator(dy.dtype))
            summed = (dy if scaled is None else dy * scaled).sum(1)
            return layer.projected(summed[..., None], self._matrices)

        return gradient

    def _record_two_sided(
        self, module: nn.Module, layer: CapturedLayer, transposed: bool, seen: Operand, samples: SampleRows
    ) -> Callable[[Tensor], Tensor | Factors]:
        near, far = layer.operators[transposed]

        def projected(dy: Tensor) -> Tensor:
            return self._matrices.project(dy, (far.side,), (far.constant,))[0]

        if isinstance(seen, TokenIds):
            columns = self._matrices.columns(seen.ids, near.side, accumulator(_weight(module).dtype), near.constant)
            return lambda dy: _oriented(columns, projected(dy), transposed)
        if self._part is not None:
            # A chunk's backward follows its forward at once, so its input may wait for one fused kernel.
            x, version = _widened(samples.unfold(seen.detach(), seen.shape[-1], layer.name), near), seen._version

            def fused(dy: Tensor) -> Tensor:
                if seen._version != version:
                    raise InputError(f"layer {layer.name!r}: its input was changed in place after the layer saw it")
                inputs, gradients = _oriented(*promoted(x, _widened(dy, far)), transposed)
                return ops.project_outer(inputs, gradients, layer.right, layer.left).flatten(1)

            return fused
        shared, place = self._share(seen, samples, near)

        def factors(dy: Tensor) -> Factors:
            shared.project(self._matrices)
            return _oriented(shared.projected[place], projected(dy), transposed)

        return factors

    def _receive(
        self,
        module: nn.Module,
        name: str,
        samples: SampleRows,
        seen: Operand,
        receivers: list[Callable[[Tensor], Tensor | Factors]],
        grad: Tensor,
    ) -> None:
        dy = samples.unfold(grad, grad.shape[-1], name)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and isinstance(seen, TokenIds):
            dy = dy.masked_fill((seen.ids == module.padding_idx)[..., None], 0)
        for (layer, _), receive in zip(self._uses[module], receivers, strict=True):
            with _exactly(dy):
                self._keep(layer, receive(dy))

    def _keep(self, layer: CapturedLayer, arrived: Tensor | Factors) -> None:
        """Add what one use gave to what is there of the layer; factors of a first use stay factors until :meth:`pop`."""
        if isinstance(arrived, tuple):
            if layer.name not in self._gradients and layer.name not in self._factors and self._part is None:
                self._factors[layer.name] = arrived
                return
            arrived = _product(*arrived)
        if layer.name in self._factors:
            self._gradients[layer.name] = _product(*self._factors.pop(layer.name))
        if self._part is not None:
            rows = arrived.new_zeros(cast(int, self._batch), layer.dim)
            rows = self._gradients.setdefault(layer.name, rows)
            rows[slice(*self._part)] += arrived
        else:
            earlier = self._gradients.get(layer.name)
            self._gradients[layer.name] = arrived if earlier is None else earlier + arrived


def owned_parameters(
    layer: CapturedLayer, modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]
) -> list[nn.Parameter]:
    """What autograd differentiates for a layer: its weight, and its bias where the gradient has a column for it."""
    if layer.name not in modules:
        return [parameters[layer.name]]
    owner = modules[layer.name]
    return cast("list[nn.Parameter]", [owner.weight, owner.bias] if layer.bias else [owner.weight])


class UnseenUse(InputError):
    """Hooks cannot give the gradient of some layers; autograd can. ``layers`` names them."""

    def __init__(self, layers: Iterable[str], message: str) -> None:
        super().__init__(message)
        self.layers = list(layers)


def _plain_output(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer with this weight and bias gives, and nothing else does."""
    weight = cast(Tensor, module.weight)
    if isinstance(module, nn.Embedding):
        return nn.functional.embedding(x, weight)
    if weight.dim() == 1:
        normal = normalised(module, x)
        bias = cast("Tensor | None", getattr(module, "bias", None))
        plain = normal * weight.to(normal.dtype)
        return plain if bias is None else plain + bias.to(normal.dtype)
    matrix = weight.T if is_conv1d(module) else weight
    return nn.functional.linear(x, matrix, cast("Tensor | None", getattr(module, "bias", None)))


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """A norm's input before its weight: minus the mean where it is a LayerNorm, divided by the root mean square."""
    x = x.to(accumulator(x.dtype))
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), 1e-6)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def vector_owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Vectors that a hook can serve, by the parameter's name: biases of layers, weights and biases of norms.

    A norm whose output is not that of a plain one is told when it is called, as a layer's is.
    """
    found = {}
    for name, module in model.named_modules():
        norm = "norm" in type(module).__name__.lower() and not isinstance(
            module, nn.modules.batchnorm._NormBase | nn.GroupNorm
        )
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        for leaf in ["weight", "bias"] if norm else ["bias"] if linear else []:
            parameter = module._parameters.get(leaf)
            if parameter is not None and parameter.dim() == 1:
                found[uncompiled(f"{name}.{leaf}")] = module, leaf
    return found


def _weight_shape(module: nn.Module) -> tuple[int, int]:
    out, in_ = layer_shape(module)
    return (out, in_) if isinstance(module, nn.Linear) else (in_, out)


def _parameter_layer(name: str, parameter: Tensor, projection: Projection) -> CapturedLayer:
    """A parameter that is no layer's weight. A vector of d numbers has shape ``(d, 1)``, one of more dimensions is flattened
    behind the first; a vector is sketched to as many numbers as a matrix is, or kept where it has no more."""
    out = parameter.shape[0] if parameter.dim() else 1
    shape = (out, max(1, parameter.numel() // max(1, out)))
    dim = projection.output_dim(shape)
    if shape[1] == 1:
        if projection.kind == "identity" or out <= dim:
            return CapturedLayer(name, shape, out, False)
        seed = "" if projection.seed is None else f"/seed{projection.seed}"
        return CapturedLayer(name, shape, dim, False, single=Side(projection.kind, f"{name}/single{seed}", dim, out))
    return _captured(name, shape, False, projection)


def _exactly(like: Tensor) -> AbstractContextManager[Any]:
    """Our own arithmetic is not in the low precision that the model may run in. What it works on is detached."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _layer(name: str, module: nn.Module, projection: Projection, bias: bool) -> CapturedLayer:
    out, in_ = layer_shape(module)
    bias = bias and getattr(module, "bias", None) is not None
    in_ += bias
    layer = _captured(name, (out, in_), bias, projection)
    layer.turned = not isinstance(module, nn.Linear)
    return layer


def _captured(name: str, shape: tuple[int, int], bias: bool, projection: Projection) -> CapturedLayer:
    out, in_ = shape
    dim = projection.output_dim(shape)
    if projection.two_sided:
        left, right = projection.side(name, "left", out), projection.side(name, "right", in_)
        return CapturedLayer(name, shape, dim, bias, left, right)
    return CapturedLayer(name, shape, dim, bias, single=projection.side(name, "single", out * in_))


def _weight(module: nn.Module) -> Any:
    return getattr(module, "weight", None)


def _oriented(near: Tensor, far: Tensor, transposed: bool) -> Factors:
    """Inputs and output gradients of one use; a transposed one has their places changed."""
    return (far, near) if transposed else (near, far)


def promoted(x: Tensor, dy: Tensor) -> Factors:
    """Both in one dtype: autocast may hand a layer float32 and take bfloat16 gradients back."""
    dtype = torch.promote_types(x.dtype, dy.dtype)
    return x.to(dtype), dy.to(dtype)


def _widened(x: Tensor, operator: _Operator) -> Tensor:
    """``x`` with the constant feature that its side has and it lacks, if any."""
    missing = operator.side.features - x.shape[-1]
    return nn.functional.pad(x, (0, missing), value=operator.constant) if missing else x


def _product(x: Tensor, dy: Tensor) -> Tensor:
    """``(N, k_out * k_in)`` from factors a few columns wide, which plain batched products are fastest at."""
    return torch.bmm(dy.mT, x).flatten(1)


def _tokens_gradient(layer: CapturedLayer, tokens: TokenIds, transposed: bool, dy: Tensor) -> Tensor:
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


def _sketch_tokens(side: Side, tokens: TokenIds, transposed: bool, dy: Tensor) -> Tensor:
    n, t, width = dy.shape
    out = dy.new_zeros(n, side.k)
    channel = torch.arange(width, device=dy.device)
    step = max(1, _TOKEN_ENTRIES // max(1, n * width))
    for begin in range(0, t, step):
        ids = tokens.ids[:, begin : begin + step, None]
        feature = ids * width + channel if transposed else channel * tokens.size + ids
        index, sign = philox.sjlt_at(side.words, side.k, feature)
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
