"""What a store depends on beside its model and rows, as one object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from influence_fast.data.batching import Loss
from influence_fast.data.tasks import LOSSES
from influence_fast.errors import InputError
from influence_fast.gradients.block_scales import BITS
from influence_fast.gradients.shard import DTYPES
from influence_fast.ops.arguments import AdamState
from influence_fast.ops.projections import Projection

MOST_FACTORS = 64
PRECISIONS = ("bfloat16", "float16")


@dataclass(frozen=True)
class BuildSettings:
    """How gradients are taken and kept; the arguments of :func:`~influence_fast.build_store` say what each means.

    ``exact``, ``one_row``, ``followed`` and ``layouts`` are what verification found
    (:class:`~influence_fast.CaptureReport`), for a build that does not verify again.

    Raises:
        InputError: a value that no build could use; names it.
    """

    layers: str | Iterable[str] = "all"
    projection: Projection = field(default_factory=Projection)
    loss: str | Loss = "auto"
    batch_tokens: int | str = "auto"
    dtype: str = "float32"
    shard_rows: int | str = "auto"
    truncate: bool = False
    bias: bool = False
    precision: str | None = None
    verify: bool = True
    strict: bool = False
    exact: Sequence[str] = ()
    one_row: bool = False
    followed: Sequence[str] = ()
    layouts: Mapping[str, str] = field(default_factory=dict)
    adam: Mapping[str, AdamState] | None = None
    factors: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss) and self.loss not in LOSSES:
            raise InputError(f"loss: expected a callable or one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("batch_tokens", "shard_rows"):
            value = getattr(self, name)
            if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name}: expected 'auto' or a positive int, got {value!r}")
        if self.factors is not None:
            if (
                isinstance(self.factors, bool)
                or not isinstance(self.factors, int)
                or not 1 <= self.factors <= MOST_FACTORS
            ):
                raise InputError(f"factors: expected None or an int from 1 to {MOST_FACTORS}, got {self.factors!r}")
            if self.dtype not in ("float32", *BITS):
                raise InputError(f"factors: are kept as float32, {' or '.join(BITS)}, not {self.dtype}")
        for name in ("truncate", "bias", "verify", "strict", "one_row"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise InputError(f"precision: expected None or one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def of_capture(self) -> dict[str, Any]:
        """Arguments of :class:`~influence_fast.GradientCapture` that take the layers in these ways."""
        return {
            "layers": self.layers,
            "projection": self.projection,
            "bias": self.bias,
            "exact": self.exact,
            "followed": self.followed,
            "layouts": self.layouts,
            "batched": not self.one_row,
        }
