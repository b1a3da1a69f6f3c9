"""dattri's random projections on our sketches: same arguments, shapes, scales and dtypes; no part of a matrix is kept.

Entries are ours, so results differ from the stock projectors', as those of two seeds do. They are the same on every device,
and every kind works on all of them: ``sjlt`` and ``grass`` too, that stock has on a GPU alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_fast.ops import Side, sketch

DISTRIBUTION, VERSIONS = "dattri", ("0.3.0",)
HOLDERS = ("dattri", "dattri_llm")
MODULES = ("dattri.func.projection",)
# The classes, not random_project: modules that imported that by name make their projectors through these.
REPLACED = tuple(("dattri.func.projection", name) for name in ("BasicProjector", "CudaProjector"))
_KINDS = {"normal": "gaussian", "rademacher": "rademacher", "sjlt": "sjlt", "random_mask": "random_mask"}


class BasicProjector:
    """Projects ``(B, feature_dim)`` or a dict of ``(B, ...)`` to ``(B, proj_dim)`` in ``dtype``.

    ``normal`` and ``rademacher`` are divided by ``sqrt(proj_dim)``; ``sjlt`` has one +-1 a column, ``random_mask`` keeps
    features as they are, ``grass`` is a mask to ``grass_multiplier * proj_dim`` features and then ``sjlt``, and
    ``identity`` gives back what came.

    Raises:
        KeyError: another type.
    """

    def __init__(
        self,
        feature_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str,
        device: torch.device | str,
        block_size: int = 100,
        dtype: torch.dtype = torch.float32,
        ensemble_id: int = 0,
        *,
        grass_multiplier: int = 4,
    ) -> None:
        self.feature_dim, self.proj_dim, self.seed = int(feature_dim), int(proj_dim), int(seed)
        self.proj_type, self.device, self.dtype = proj_type, torch.device(device), dtype
        self.block_size, self.ensemble_id, self.grass_multiplier = block_size, ensemble_id, grass_multiplier
        self._sides(ensemble_id)

    def _sides(self, ensemble_id: int) -> list[Side]:
        name = str(getattr(self.proj_type, "value", self.proj_type))
        if name not in (*_KINDS, "grass", "identity"):
            raise KeyError(f"Projection type {self.proj_type} not recognized.")
        # Seeds are 32-bit numbers; each ensemble has matrices of its own.
        key = (self.seed & 0xFFFFFFFF) | (int(ensemble_id) & 0x7FFFFFFF) << 32
        if name == "identity":
            return []
        if name == "grass":
            kept = min(self.grass_multiplier * self.proj_dim, self.feature_dim)
            return [Side("random_mask", key, kept, self.feature_dim), Side("sjlt", key, self.proj_dim, kept)]
        scale = 1 / math.sqrt(self.proj_dim) if name in ("normal", "rademacher") else 1.0
        # A mask cannot keep more than there is.
        k = min(self.proj_dim, self.feature_dim) if name == "random_mask" else self.proj_dim
        return [Side(_KINDS[name], key, k, self.feature_dim, scale)]  # type: ignore[arg-type]

    def project(self, features: Tensor | Mapping[str, Tensor], ensemble_id: int) -> Tensor:
        """``(B, proj_dim)``; a dict's tensors are taken as one vector, in its order."""
        given: Tensor | list[Tensor]
        if isinstance(features, Tensor):
            given = features.to(self.device, self.dtype)
        else:
            given = [part.to(self.device, self.dtype) for part in features.values()]
        sides = self._sides(ensemble_id)
        if not sides and not isinstance(given, Tensor):
            return torch.cat([part.reshape(part.shape[0], -1) for part in given], 1)
        for side in sides:
            given = sketch(given, side, dtype=self.dtype)
        assert isinstance(given, Tensor)  # A list was sketched or put together above.
        return given

    def free_memory(self) -> None:
        """There is nothing to free."""


class CudaProjector(BasicProjector):
    """The same on a GPU.

    Raises:
        ValueError: a device that is no GPU.
    """

    def __init__(
        self,
        feature_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        grass_multiplier: int = 4,
    ) -> None:
        if torch.device(device).type != "cuda":
            raise ValueError("CudaProjector only works on a CUDA device; use BasicProjector instead")
        super().__init__(feature_dim, proj_dim, seed, proj_type, device, dtype=dtype, grass_multiplier=grass_multiplier)


@dataclass
class RandomProjectionParams:
    """What :func:`random_project` takes in place of single arguments."""

    proj_dim: int = 512
    proj_max_batch_size: int = 32
    proj_seed: int = 0
    feature_batch_size: int = 1
    device: torch.device | str = "cpu"
    proj_type: str = "normal"


def random_project(
    feature: Tensor | Mapping[str, Tensor],
    feature_batch_size: int | Any,
    proj_dim: int | None = None,
    proj_max_batch_size: int | None = None,
    proj_seed: int = 0,
    proj_type: str = "normal",
    *,
    device: torch.device | str = "cpu",
) -> Callable[..., Tensor]:
    """A function ``f(feature, ensemble_id=0) -> (B, proj_dim)`` for features shaped like ``feature``, in its dtype.

    Args:
        feature_batch_size: rows of ``feature``, or an object with all that follows, such as
            :class:`RandomProjectionParams`.
        proj_type: ``normal``, ``rademacher``, ``sjlt``, ``random_mask``, ``grass``, ``grass_N`` or ``identity``.
        proj_max_batch_size: changes nothing here.

    Raises:
        ValueError: another type, or no ``proj_dim``.
    """
    if not isinstance(feature_batch_size, int):
        given = feature_batch_size
        feature_batch_size, proj_dim, proj_seed = given.feature_batch_size, given.proj_dim, given.proj_seed
        proj_type, device = given.proj_type, given.device
    if proj_dim is None:
        raise ValueError("proj_dim: expected a whole number, got None")
    parts: Sequence[Tensor] = [feature] if isinstance(feature, Tensor) else list(feature.values())
    features = sum(part.numel() // feature_batch_size for part in parts)
    name, _, count = str(getattr(proj_type, "value", proj_type)).partition("_")
    multiplier = 4
    if name == "grass" and count:
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"Invalid grass multiplier: expected grass_N with a whole number N, got {proj_type!r}")
        proj_type, multiplier = name, int(count)
    try:
        projector = BasicProjector(
            features, proj_dim, proj_seed, proj_type, device, dtype=parts[0].dtype, grass_multiplier=multiplier
        )
    except KeyError:
        known = ", ".join((*_KINDS, "grass", "grass_N", "identity"))
        raise ValueError(f"Invalid proj_type {proj_type!r}: expected one of {known}") from None

    def project(feature: Tensor | Mapping[str, Tensor], ensemble_id: int = 0) -> Tensor:
        return projector.project(feature, ensemble_id)

    return project
