"""Which layers of a store are kept as factors (``row_factors``)."""

from __future__ import annotations

from collections.abc import Mapping

from influence_fast.errors import InputError
from influence_fast.ops.projections import Projection


def factored_layers(
    projection: str, shapes: Mapping[str, tuple[int, int]], dims: Mapping[str, int], factors: int
) -> dict[str, int]:
    """Of the layers that are kept as factors, how many numbers the outputs' side has.

    Raises:
        InputError: gradients that are sketched as a whole, which are no matrices.
    """
    parsed = Projection.parse(projection)
    if parsed.kind != "identity" and not parsed.two_sided:
        raise InputError(
            f"factors: a gradient sketched by {projection} is no matrix; project with two sides, or not at all"
        )
    outs = {}
    for name, dim in dims.items():
        out = parsed.dim[0] if isinstance(parsed.dim, tuple) and parsed.two_sided else shapes[name][0]
        if out and dim % out == 0 and factors * (out + dim // out) < dim:
            outs[name] = out
    return outs
