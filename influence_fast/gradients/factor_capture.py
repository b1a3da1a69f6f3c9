"""The factors of unprojected gradients, for inner products that never form a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from influence_fast.errors import InputError
from influence_fast.gradients.capture import (
    CapturedLayer,
    Factors,
    GradientCapture,
    Operand,
    SampleRows,
    TokenIds,
    promoted,
)
from influence_fast.ops.projections import Projection


class FactorCapture(GradientCapture):
    """Collects the factors of unprojected gradients, not the gradients: ``G = sum_t dy[t] (outer) x[t]``.

    :meth:`pop_factors` gives ``{layer: (x (N, T, in), dy (N, T, out))}``; an embedding's ``x`` are its ids ``(N, T)``. A
    layer that is used several times has the tokens of all its uses, one behind the other. The loss runs the head whole, not
    in chunks, and a weight that is an embedding here and a linear layer there is refused, because it has no such factors.
    """

    def __init__(self, model: nn.Module, layers: str | Iterable[str] = "all") -> None:
        super().__init__(model, layers, Projection("identity"))
        no_factors = [*self.exact, *(layer.name for layer in self.captured_layers if layer.vector)]
        if no_factors:
            raise InputError(f"layers: {no_factors[0]!r} is no weight matrix and has no factors; leave it out here")
        for module, uses in self._uses.items():
            for layer, transposed in uses:
                if transposed:
                    kind = type(module).__name__
                    raise InputError(f"layers: {layer.name!r} shares its weight with a {kind}; leave it out here")
        self._pairs: dict[str, list[Factors]] = {}

    def clear(self) -> None:
        super().clear()
        self._pairs = {}

    def pop_factors(self) -> dict[str, Factors]:
        """Factors of the batch; forgets them. A layer that the loss does not depend on is left out."""
        if not self._pairs:
            raise InputError("capture: no gradient has arrived; run forward and backward before pop_factors()")
        found = {}
        for name, pairs in self._pairs.items():
            xs, dys = zip(*pairs, strict=True)
            found[name] = (torch.cat(xs, 1), torch.cat(dys, 1)) if len(pairs) > 1 else pairs[0]
        self.clear()
        return found

    def _pending(self) -> bool:
        return bool(self._pairs)

    def _record(
        self, module: nn.Module, layer: CapturedLayer, transposed: bool, seen: Operand, samples: SampleRows
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

    def _keep(self, layer: CapturedLayer, arrived: Tensor | Factors) -> None:
        self._pairs.setdefault(layer.name, []).append(cast(Factors, arrived))
