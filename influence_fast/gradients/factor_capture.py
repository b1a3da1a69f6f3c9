"""The factors of unprojected gradients, for inner products that never form a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from influence_fast.data.batching import Loss, batches, checked_rows, token_budget
from influence_fast.data.tasks import device_of
from influence_fast.errors import InputError
from influence_fast.gradients import losses
from influence_fast.gradients.capture import GradientCapture
from influence_fast.gradients.captured_layer import CapturedLayer, GradientRecords
from influence_fast.gradients.row_checks import settle_batches
from influence_fast.gradients.sample_rows import Factors, Operand, SampleRows, TokenIds, promoted
from influence_fast.ops.projections import Projection


class _FactorRecords(GradientRecords):
    pairs: dict[str, list[Factors]]

    def clear(self) -> None:
        super().clear()
        self.pairs = {}

    @property
    def pending(self) -> bool:
        return bool(self.pairs)

    def record(
        self, module: nn.Module | None, layer: CapturedLayer, transposed: bool, seen: Operand, samples: SampleRows
    ) -> Callable[[Tensor], Tensor | Factors]:
        if isinstance(seen, TokenIds):
            ids = seen.ids
            return lambda dy: (ids, dy)
        x = samples.unfold(seen.detach(), seen.shape[-1], layer.name)
        version = x._version

        def factors(dy: Tensor) -> Factors:
            if x._version != version:
                raise InputError(f"layer {layer.name!r}: its input was changed in place after the layer saw it")
            return promoted(x, dy)

        return factors

    def keep(self, layer: CapturedLayer, arrived: Tensor | Factors) -> None:
        self.pairs.setdefault(layer.name, []).append(cast(Factors, arrived))


class FactorCapture(GradientCapture):
    """Collects the factors of unprojected gradients, not the gradients: ``G = sum_t dy[t] (outer) x[t]``.

    :meth:`pop_factors` gives ``{layer: (x (N, T, in), dy (N, T, out))}``; an embedding's ``x`` are its ids ``(N, T)``. A
    layer that is used several times has the tokens of all its uses, one behind the other. The loss runs the head whole, not
    in chunks, and a weight that is an embedding here and a linear layer there is refused, because it has no such factors.
    """

    _kept_in = _FactorRecords

    def __init__(self, model: nn.Module, layers: str | Iterable[str] = "all") -> None:
        super().__init__(model, layers, Projection("identity"))
        no_factors = [*self.exact, *(layer.name for layer in self.captured_layers if layer.vector)]
        if no_factors:
            raise InputError(f"layers: {no_factors[0]!r} is no weight matrix and has no factors; leave it out here")
        experts = [layer.name for layer in self.captured_layers if layer.number is not None]
        if experts:
            raise InputError(f"layers: {experts[0]!r} sees the tokens routed to it alone; leave it out here")
        for module, uses in self._uses.items():
            for layer, transposed in uses:
                if transposed:
                    kind = type(module).__name__
                    raise InputError(f"layers: {layer.name!r} shares its weight with a {kind}; leave it out here")

    def pop_factors(self) -> dict[str, Factors]:
        """Factors of the batch; forgets them. A layer that the loss does not depend on is left out."""
        self._raise_unseen()
        pairs = cast(_FactorRecords, self._records).pairs
        if not pairs:
            raise InputError("capture: no gradient has arrived; run forward and backward before pop_factors()")
        found = {}
        for name, several in pairs.items():
            xs, dys = zip(*several, strict=True)
            found[name] = (torch.cat(xs, 1), torch.cat(dys, 1)) if len(several) > 1 else several[0]
        self.clear()
        return found


def factors_of(
    capture: FactorCapture,
    dataset: Sequence[Mapping[str, Any]],
    loss: str | Loss,
    batch_tokens: int | str,
    truncate: bool,
) -> Iterator[tuple[Tensor, dict[str, Factors], dict[str, Tensor]]]:
    """Row numbers and factors of each batch, and the batch."""
    model = capture.model
    rows, kind = checked_rows(model, dataset, loss, truncate=truncate)
    function = loss if callable(loss) else losses.named(kind, chunked=False)
    tokens = token_budget(batch_tokens, model)
    settle_batches(model, rows, function, tokens)
    for chosen in batches(rows, range(len(rows)), tokens):
        batch = rows.batch(chosen, model)
        function(model, {name: tensor.to(device_of(model)) for name, tensor in batch.items()}).sum().backward()
        yield torch.tensor(chosen), capture.pop_factors(), batch
