"""Per-sample (projected) gradients of a model's selected layers, taken during an ordinary backward.

For a linear layer with inputs ``x[t]`` and output gradients ``dy[t]`` the gradient of one sample's loss is
``G = sum_t dy[t] (outer) x[t]``, so both factors are all it takes: ``x`` is seen (and projected) in the forward, ``dy``
in the backward, and no weight gradient is ever computed. A hook behind each selected layer joins its output to the
autograd graph, so weights need no ``requires_grad``; where nothing below does, the backward ends at the lowest one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from influence_fast import ops
from influence_fast.data.batching import Loss
from influence_fast.errors import InputError
from influence_fast.gradients.captured_layer import CapturedLayer, GradientRecords, Places, Receiver, Uses
from influence_fast.gradients.exact_layers import ExactLayers
from influence_fast.gradients.experts import Routed, experts_forward
from influence_fast.gradients.followed_uses import FollowedUses, Use
from influence_fast.gradients.layers import is_expert, select_layers
from influence_fast.gradients.model_state import is_sharded
from influence_fast.gradients.plain_layers import before_magnitude, conv_gradients, is_magnitude, is_matrix, plain_kind
from influence_fast.gradients.sample_rows import (
    Operand,
    OutputHook,
    SampleRows,
    TokenIds,
    UnseenUse,
    batch_size,
    exactly,
    oriented,
    promoted,
)
from influence_fast.gradients.token_gradients import tokens_gradient
from influence_fast.ops.projections import Projection

_log = logging.getLogger("influence_fast")


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
            parameters that neither a hook nor their uses can give (recurrent cells, batch norms, ...), need a batch of one
            sample.
        followed: names of the layers that are captured at the operations which their parameter enters, not at their module:
            embeddings that are scaled, weights that are also read beside their module. Routers always are.
        layouts: where the samples of some layers are, if not in the first dimension of what they see: ``second``;
            ``grouped`` for several rows a sample, one behind the other; ``parts`` for all samples in each of several
            parts; ``shared`` for ids ``(T,)`` that all samples have, also where there are T samples.
        batched: :meth:`differentiate` gives the exact layers of batches of any size.

    The loss must be the **sum** of per-sample losses: with a mean every gradient is divided by the batch size. A weight
    that several modules share (tied embedding and head) has the sum over its uses, as autograd would give it, which
    takes the backward down to the lowest of them. Call :meth:`pop` after each backward. Modules that were compiled by
    ``torch.compile`` run eagerly inside, because compiled code does not see hooks that come later. Experts that share one
    parameter run by steps of our own, the same as theirs.

    Raises:
        InputError: unknown layers; modules whose per-sample gradient cannot be told from their input and output;
            a second forward before the first batch's gradients were popped; inputs changed in place after a layer
            saw them; gradients whose rows are not samples.
    """

    _kept_in = GradientRecords

    def __init__(
        self,
        model: nn.Module,
        layers: str | Iterable[str] = "all",
        projection: Projection | str = Projection("identity"),  # noqa: B008 (frozen)
        *,
        bias: bool = False,
        exact: Iterable[str] = (),
        followed: Iterable[str] = (),
        layouts: Mapping[str, str] | None = None,
        batched: bool = False,
    ) -> None:
        self.model = model
        self.projection = Projection.parse(projection)
        self.layers = select_layers(model, layers)
        self._layouts, self._batched = dict(layouts or {}), batched
        self.shared = {name for name, place in self._layouts.items() if place == "shared"}
        """Layers whose ids are those of all samples."""
        self._matrices = ops.Matrices()
        self._records = self._kept_in(self._matrices, self._formed, ops.outer)
        places = Places.of(model, self.layers, self.projection, bias, frozenset(exact), frozenset(followed))
        self._layers, self._uses = places.layers, places.uses
        self._experts, self._factors = places.experts, places.factors
        self._followed = {id(parameter): layers for parameter, layers in places.followed}
        self._follow = [parameter for parameter, _ in places.followed]
        self._exact = ExactLayers(
            model, {name: (partial(layer.as_kept, matrices=self._matrices), own) for name, layer, own in places.exact}
        )
        self._one_sample = {
            module for module, uses in self._uses.items() if any(is_expert(use[0].name) for use in uses)
        }
        self._plain: set[nn.Module] = set()
        self._handles: list[Any] = []
        self._stance = ExitStack()
        self._mode: FollowedUses | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._batch: int | None = None
        self._rows = 1
        self._packed: SampleRows | None = None
        self._off = False
        self._unseen: dict[str, UnseenUse] = {}
        self._warned: set[str] = set()
        self.says_unused = True
        """Whether a layer that the loss does not depend on is logged."""
        self.expanded: set[str] = set()
        """Layers whose input came once for the whole batch and was repeated for each sample."""

    def _formed(
        self, layer: CapturedLayer, seen: Operand, dy: Tensor, transposed: bool = False, lengths: Tensor | None = None
    ) -> Tensor:
        """A layer's gradients ``(N, dim)`` of inputs and output gradients ``(N, T, features)``, or packed by ``lengths``."""
        if isinstance(seen, TokenIds):
            return tokens_gradient(layer.name, layer.single, seen, transposed, dy, self._matrices)
        x, dy = oriented(seen, dy, transposed)
        if layer.operators:
            return ops.project_outer(x, dy, layer.right, layer.left, lengths).flatten(1)
        if layer.single is not None:
            return ops.sketch_outer(x, dy, layer.single, lengths)
        return ops.outer(x, dy, lengths).flatten(1)

    @property
    def exact(self) -> list[str]:
        """Names of the layers that autograd differentiates."""
        return self._exact.names

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
        return {layer.name: layer.identifiers for layer in self._layers}

    def clear(self) -> None:
        """Forget what has arrived since the last :meth:`pop`, such as part of a backward that failed."""
        self._unseen = {}
        self._records.clear()
        self._exact.clear()
        if self._mode is not None:
            self._mode.clear()

    @contextmanager
    def part(self, begin: int, end: int, total: int) -> Iterator[None]:
        """Within, layers see samples ``[begin, end)`` of ``total`` (all or some of their tokens), and what arrives is
        added to those rows: for a loss that runs the head, forward and backward, in chunks."""
        self._batch = self._records.total = total
        self._records.part = begin, end
        try:
            yield
        finally:
            self._records.part = None

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
        self._packed = SampleRows.packed(lengths)
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
        for module, uses in self._uses.items():
            if is_magnitude(module):
                see = partial(self._see_magnitude, uses[0][0])
                self._handles.append(module.register_forward_hook(see, with_kwargs=True))
                continue
            conv, table = isinstance(module, nn.modules.conv._ConvNd), isinstance(module, nn.Embedding)
            watch = self._watch_conv if conv else self._watch_table if table else self._watch
            self._handles.append(module.register_forward_hook(partial(self._see, uses, watch), with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end))
        for module in {**self._experts, **self._factors}:
            # An instance's own forward goes before its class's.
            own = module.__dict__.get("forward")
            self._stance.callback(
                partial(setattr, module, "forward", own) if own else partial(delattr, module, "forward")
            )
            cast(Any, module).forward = partial(self._see_experts, module, module.forward)
        if self._follow:
            self._mode = FollowedUses(self._follow, self._see_followed, self._lose)
            self._stance.enter_context(self._mode)
        if not self._batched:
            self._exact.begin()
            self._stance.callback(self._exact.end)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stance.close()
        self.clear()
        self._mode = None
        self._batch = None

    def pop(self) -> dict[str, Tensor]:
        """Gradients of the batch, ``{layer: (N, dim)}`` out-major, float32 (float64 for a float64 model); forgets them.

        A selected layer that the loss does not depend on has zeros; that is logged once.
        """
        self._raise_unseen()
        if not self._batched and self._exact:
            if self._batch not in (None, 1) or self._packed is not None:
                raise InputError(
                    f"layer {self.exact[0]!r}: autograd gives the gradient of the whole batch, so it takes one sample a "
                    f"batch, got {self._batch}"
                )
            self._records.add(self._exact.left_by_backward())
        if not self._records.pending:
            message = "capture: no gradient has arrived; run forward (with gradients enabled) and backward before pop()"
            followed = {layer.name: "exact" for layers in self._followed.values() for layer in layers}
            # A use inside a function of its own for autograd is not seen.
            raise UnseenUse(followed, message) if followed else InputError(message)
        self._records.form()
        arrived = self._records.gradients
        sample = next(iter(arrived.values()))
        rows = {name: len(gradient) for name, gradient in arrived.items()}
        if len(set(rows.values())) > 1:
            raise InputError(f"capture: layers disagree on the number of samples: {rows}")
        out = {}
        for layer in self._layers:
            found = arrived.get(layer.name)
            # An expert that no token goes to is no news.
            if found is None and layer.number is None and self.says_unused and layer.name not in self._warned:
                self._warned.add(layer.name)
                _log.warning("the loss does not depend on layer %r: its gradients are zero", layer.name)
            out[layer.name] = sample.new_zeros(len(sample), layer.dim) if found is None else found
        self.clear()
        return out

    def differentiate(self, loss: Loss, batch: Mapping[str, Tensor]) -> None:
        """Add the exact layers' gradients of a batch to what :meth:`pop` gives, by passes of their own.

        ``loss(model, batch)`` is one number a row, by operations that ``torch.func`` can follow.
        """
        if not self._exact or not self._batched:
            return
        with self._unwatched():
            self._records.add(self._exact.of_batch(loss, batch))

    @property
    def one_by_one(self) -> str:
        """Why ``torch.func`` could not run some batch of :meth:`differentiate`; empty where it could."""
        return self._exact.failure

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def _raise_unseen(self) -> None:
        if self._unseen:
            first = next(iter(self._unseen.values()))
            unseen, self._unseen = self._unseen, {}
            raise UnseenUse({name: error.remedies[name] for name, error in unseen.items()}, str(first))

    @property
    def captured_layers(self) -> list[CapturedLayer]:
        """The layers with their shapes and sides."""
        return list(self._layers)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._off or not torch.is_grad_enabled():
            return
        if self._records.pending:
            raise InputError("capture: pop() the gradients of one batch before the forward of the next")
        self._batch = batch_size(args, kwargs)
        self._rows = self._batch or 1

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        shared = self._records.shared
        if shared.last is not None:
            with exactly(shared.last.rows):
                shared.flush()
        if not self._off:
            self._raise_unseen()

    def _see(
        self,
        uses: Uses,
        watch: Callable[..., Tensor],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        if self._off or not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if module not in self._plain and not self._is_plain(module, uses, x, output):
            return None
        return watch(module, uses, x, output)

    def _watch_table(self, module: nn.Embedding, uses: Uses, x: Tensor, output: Tensor) -> Tensor:
        ids = TokenIds(x, len(module.weight), module.weight.dtype, module.padding_idx)
        return self._watch_ids(module, uses, x, output, ids)

    def _watch_ids(self, module: nn.Module | None, uses: Uses, x: Tensor, output: Tensor, ids: TokenIds) -> Tensor:
        name, batch = uses[0][0].name, self._batch
        once = x.dim() == 1 and (len(x) != batch or name in self.shared)
        if (once or (x.dim() == 2 and len(x) == 1)) and batch is not None and batch > 1:
            if once:
                self.shared.add(name)
            # Positions come once for the whole batch; only a copy for each sample has a gradient for each.
            self.expanded.add(name)
            x, output = x.expand(self._rows, x.shape[-1]), output.expand(self._rows, *output.shape[-2:])
        elif x.dim() == 2:
            self._rows = len(x)
        if x.dim() != 2 and batch != 1:
            message = f"layer {name!r}: expected ids of shape (N, T), got {tuple(x.shape)}"
            return self._later(output, UnseenUse({name: "exact"}, message))
        return self._watch(module, uses, x, output, ids)

    def _watch_conv(self, module: nn.Module, uses: Uses, x: Tensor, output: Tensor) -> Tensor:
        if self._packed is not None or (self._batch is not None and x.shape[0] != self._batch):
            name = uses[0][0].name
            message = (
                f"layer {name!r}: expected {self._batch} samples in the first dimension, got shape {tuple(x.shape)}"
            )
            return self._later(output, UnseenUse({layer.name: "exact" for layer, _ in uses}, message))
        seen, version = x.detach(), x._version

        def receive(grad: Tensor) -> None:
            if seen._version != version:
                raise InputError(f"layer {uses[0][0].name!r}: its input was changed in place after the layer saw it")
            with exactly(grad):
                for layer, _ in uses:
                    found = conv_gradients(module, layer.vector, seen, grad)
                    self._records.keep(layer, layer.projected(found, self._matrices))

        return OutputHook.apply(output, self._anchor, receive)

    def _see_magnitude(
        self, layer: CapturedLayer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self._off or not torch.is_grad_enabled():
            return None
        scaled = before_magnitude(module, kwargs, output)
        if scaled is None:
            message = f"layer {layer.name!r}: the output before its magnitudes is not known (exact= captures it)"
            return self._later(output, UnseenUse({layer.name: "exact"}, message))
        samples = self._samples(output, layer.name)

        def receive(grad: Tensor) -> None:
            with exactly(grad):
                try:
                    dy, by = (samples.unfold(tensor, tensor.shape[-1], layer.name) for tensor in (grad, scaled))
                except UnseenUse as error:
                    return self._note(error)
                found = (dy.to(by.dtype) * by).sum(1)[..., None]
                self._records.keep(layer, layer.projected(found, self._matrices))

        return OutputHook.apply(output, self._anchor, receive)

    def _see_experts(self, module: nn.Module, own: Callable[..., Tensor], *args: Tensor, **kwargs: Tensor) -> Tensor:
        if self._off or not torch.is_grad_enabled():
            return own(*args, **kwargs)
        hidden, index, weights = *args, *kwargs.values()
        layers, factors = self._experts.get(module, {}), self._factors.get(module, {})
        tokens = hidden.numel() // hidden.shape[-1]
        names = [layer.name for leaf in layers.values() for layer in leaf.values()]
        names += [layer.name for leaf in factors.values() for layer, _ in leaf]
        samples = self._samples(hidden, names[0])
        if samples.index is None and tokens % max(1, samples.count):
            message = f"layer {names[0]!r}: {tokens} tokens of {samples.count} samples came to its experts"
            self._note(UnseenUse(dict.fromkeys(names, "exact"), message))
            return own(hidden, index, weights)

        def see(leaf: str, routed: Routed, x: Tensor, y: Tensor) -> Tensor:
            parts = [layers[name] for name in (leaf, f"{leaf}_bias") if name in layers]
            added = [(layer, factor) for layer, factor in factors.get(leaf, []) if factor.is_active]
            if not parts and not added:
                return y
            x = x.detach()

            def receive(dy: Tensor) -> None:
                with exactly(dy):
                    both = promoted(x, dy)
                    self._records.add_experts(parts, routed, *both)
                    self._records.add_factors(added, routed, *both)

            return OutputHook.apply(y, self._anchor, receive)

        return experts_forward(module, hidden, index, weights, samples, see)

    def _see_followed(self, uses: list[Use], output: Tensor) -> Tensor:
        if self._off:
            return output
        first = uses[0]
        found = [
            (layer, not use.bias and use.by_rows != layer.turned)
            for use in uses
            for layer in self._followed[id(use.parameter)]
        ]
        if first.ids:
            size = first.parameter.shape[0 if first.by_rows else 1]
            ids = TokenIds(first.x, size, first.parameter.dtype, first.padding)
            return self._watch_ids(None, found, first.x, output, ids)
        if first.columns:
            return self._watch(None, found, first.x.mT, output.mT).mT
        return self._watch(None, found, first.x, output)

    def _lose(self, parameter: nn.Parameter, operation: str) -> None:
        if self._off:
            return
        for layer in self._followed[id(parameter)]:
            message = f"layer {layer.name!r}: autograd alone can tell its gradient from a use in {operation} (exact=)"
            self._note(UnseenUse({layer.name: "exact"}, message))

    def _is_plain(self, module: nn.Module, uses: Uses, x: Tensor, output: Any) -> bool:
        """Whether hooks can tell this module's gradient, once for each module; what they cannot is noted."""
        name = uses[0][0].name
        if module in self._one_sample:
            if self._batch == 1:
                return True
            message = (
                f"layer {name!r}: one expert of a mixture sees routed tokens without their sample, so it takes one sample "
                f"a batch, got {self._batch}"
            )
            self._note(UnseenUse({layer.name: "exact" for layer, _ in uses}, message))
            return False
        kind = "mean" if isinstance(module, nn.LayerNorm) else "square"
        if not is_sharded(cast(Tensor, module.weight)):
            kind = plain_kind(module, x, output)
        if not kind:
            message = (
                f"layer {name!r}: the output of its {type(module).__name__} is not that of a plain layer with its weight (a "
                "forward of its own, or a hook that changes it); followed= or exact= captures it"
            )
            remedy = "followed" if is_matrix(module) else "exact"
            self._note(UnseenUse({layer.name: remedy for layer, _ in uses}, message))
            return False
        for layer, _ in uses:
            layer.normal = kind
        self._plain.add(module)
        return True

    def _later(self, output: Tensor, error: UnseenUse) -> Tensor:
        """The output, with an error that comes true if a gradient arrives: a use without one needs no samples."""

        return OutputHook.apply(output, self._anchor, lambda grad: self._note(error))

    def _note(self, error: UnseenUse) -> None:
        """Keep what :meth:`pop`, or the end of the forward, raises; the first of each layer."""
        self._unseen = {**dict.fromkeys(error.remedies, error), **self._unseen}

    def _samples(self, x: Tensor, name: str) -> SampleRows:
        if self._packed is not None:
            return self._packed
        if (part := self._records.part) is not None:
            return SampleRows(part[1] - part[0])
        count = self._batch if self._batch is not None else x.shape[0]
        return SampleRows(count, layout=self._layouts[name]) if name in self._layouts else SampleRows(count)

    def _watch(
        self, module: nn.Module | None, uses: Uses, x: Tensor, output: Tensor, ids: TokenIds | None = None
    ) -> Tensor:
        """The output, joined to a graph that hands its gradient on to the layers of ``uses``."""
        name = uses[0][0].name
        if self._layouts and len(uses) > 1:
            same = [use for use in uses if self._layouts.get(use[0].name) == self._layouts.get(name)]
            if len(same) < len(uses):
                output = self._watch(module, [use for use in uses if use not in same], x, output, ids)
                uses = same
        samples = self._samples(x, name)
        try:
            with exactly(output):
                seen: Operand = x
                if ids is not None:
                    seen = replace(ids, ids=samples.unfold(x[..., None], 1, name)[..., 0])
                receivers = [self._records.record(module, *use, seen, samples) for use in uses]
        except UnseenUse as error:
            [remedy] = error.remedies.values()
            return self._later(output, UnseenUse({layer.name: remedy for layer, _ in uses}, str(error)))
        return OutputHook.apply(output, self._anchor, partial(self._receive, uses, samples, seen, receivers))

    def _receive(self, uses: Uses, samples: SampleRows, seen: Operand, receivers: list[Receiver], grad: Tensor) -> None:
        try:
            dy = samples.unfold(grad, grad.shape[-1], uses[0][0].name)
        except UnseenUse as error:
            return self._note(error)
        if isinstance(seen, TokenIds) and seen.padding is not None:
            dy = dy.masked_fill((seen.ids == seen.padding)[..., None], 0)
        for (layer, _), receive in zip(uses, receivers, strict=True):
            with exactly(dy):
                self._records.keep(layer, receive(dy))
