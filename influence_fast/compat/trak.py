"""trak's projectors on our sketches: same arguments, shapes and dtypes, results not normalised; no part of a matrix is kept.

Entries are ours, so results differ from the stock projectors', as those of two seeds do. They are the same on every device
and for every batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from influence_fast.ops import Side, sketch

DISTRIBUTION, VERSIONS = "traker", ("0.3.2",)
HOLDERS = ("trak", "less")
MODULES = ("trak.projectors", "trak.traker")
REPLACED = tuple(("trak.projectors", name) for name in ("BasicProjector", "CudaProjector", "ChunkedCudaProjector"))
_KINDS = {"normal": "gaussian", "rademacher": "rademacher"}


class BasicProjector:
    """Projects ``(B, grad_dim)`` or a dict of ``(B, ...)`` to ``(B, proj_dim)`` in ``dtype``: entries +-1 or normal.

    Raises:
        KeyError: a type that is neither normal nor rademacher.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str,
        device: torch.device | str,
        block_size: int = 100,
        dtype: torch.dtype = torch.float32,
        model_id: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.grad_dim, self.proj_dim, self.seed = int(grad_dim), int(proj_dim), int(seed)
        self.proj_type, self.device, self.dtype = proj_type, device, dtype
        self.block_size, self.model_id = block_size, model_id
        self._side(model_id)

    def _side(self, model_id: int) -> Side:
        name = str(getattr(self.proj_type, "value", self.proj_type))
        if name not in _KINDS:
            raise KeyError(f"Projection type {self.proj_type} not recognized.")
        # Seeds are 32-bit numbers; each model has matrices of its own.
        key = (int(self.seed) & 0xFFFFFFFF) | (int(model_id) & 0x7FFFFFFF) << 32
        return Side(_KINDS[name], key, self.proj_dim, self.grad_dim)  # type: ignore[arg-type]

    def project(self, grads: Tensor | Mapping[str, Tensor] | Sequence[Tensor], model_id: int) -> Tensor:
        """``(B, proj_dim)``; a dict's tensors are taken as one vector, in its order."""
        if isinstance(grads, Mapping):
            grads = list(grads.values())
        given = grads.to(self.device) if isinstance(grads, Tensor) else [part.to(self.device) for part in grads]
        return sketch(given, self._side(model_id), dtype=self.dtype)

    def free_memory(self) -> None:
        """There is nothing to free."""


class CudaProjector(BasicProjector):
    """The same on a GPU, in float32, without fast_jl; any ``proj_dim``.

    Raises:
        ValueError: a device that is no GPU.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str,
        device: torch.device | str,
        max_batch_size: int = 32,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if torch.device(device).type != "cuda":
            raise ValueError("CudaProjector only works on a CUDA device; use BasicProjector instead")
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)
        self.max_batch_size = max_batch_size
        # Users write it; here nothing depends on it.
        self.num_sms = 0


class ChunkedCudaProjector:
    """One projector for each of consecutive runs of parameters, whose results are added."""

    def __init__(
        self,
        projector_per_chunk: Sequence[Any],
        max_chunk_size: int,
        params_per_chunk: Sequence[int],
        feat_bs: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.projector_per_chunk, self.params_per_chunk = list(projector_per_chunk), list(params_per_chunk)
        self.max_chunk_size, self.feat_bs, self.device, self.dtype = max_chunk_size, feat_bs, device, dtype
        self.proj_dim, self.proj_type = self.projector_per_chunk[0].proj_dim, self.projector_per_chunk[0].proj_type

    def allocate_input(self) -> None:
        """There is nothing to allocate: parameters are read where they are."""

    def free_memory(self) -> None:
        """There is nothing to free."""

    def project(self, grads: Mapping[str, Tensor], model_id: int) -> Tensor:
        """``(B, proj_dim)``; parameters are cut into chunks where ``params_per_chunk`` says.

        Raises:
            AssertionError: parameters that do not fill the chunks, as the stock class has it.
        """
        parts = [grad.flatten(1) if grad.dim() > 1 else grad[:, None] for grad in grads.values()]
        total: Tensor | None = None
        for projector, size in zip(self.projector_per_chunk, self.params_per_chunk, strict=True):
            chunk, pointer = [], 0
            while parts and pointer + parts[0].shape[1] <= size:
                pointer += parts[0].shape[1]
                chunk.append(parts.pop(0).to(self.dtype))
            if pointer != size:
                raise AssertionError(f"Current number of params {pointer} does not match expected {size}")
            found: Tensor = projector.project(chunk, model_id)
            total = found if total is None else total + found
        if parts or total is None:
            raise AssertionError(f"{len(parts)} parameters are in no chunk")
        return total.to(self.dtype)
