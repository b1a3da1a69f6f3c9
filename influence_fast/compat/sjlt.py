"""sjlt's projection on our sparse sides, for tensors on any device; ``threads`` and ``fixed_blocks`` change nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.ops import SparseSide, project, sketch

CUDA_AVAILABLE = torch.cuda.is_available()
# Users ask whether they may construct a projection: here they always may.
EXTENSION_AVAILABLE = True


class SJLTProjection(nn.Module):
    """Projects ``(B, original_dim)`` to ``(B, proj_dim)``: every column of the matrix has ``c`` entries +-1/sqrt(c).

    Args:
        original_dim: numbers of an input; proj_dim: numbers of a result; c: non-zeros a column.

    ``rand_indices`` (int64) and ``rand_signs`` (int8), both ``(original_dim, c)``, are the matrix: write to them to
    change it. They come from torch's global generator.

    Raises:
        ValueError: sizes that are not positive, or ``proj_dim`` below ``c``.
    """

    rand_indices: Tensor
    rand_signs: Tensor

    def __init__(
        self,
        original_dim: int,
        proj_dim: int,
        c: int = 1,
        threads: int = 1024,
        fixed_blocks: int = 84,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        if original_dim <= 0 or proj_dim <= 0:
            raise ValueError(f"Dimensions must be positive, got {original_dim} and {proj_dim}")
        if c <= 0:
            raise ValueError(f"Sparsity parameter c must be positive, got {c}")
        if proj_dim < c:
            raise ValueError(f"proj_dim must be at least c, got {proj_dim} and {c}")
        self.original_dim, self.proj_dim, self.c = original_dim, proj_dim, c
        self.threads, self.fixed_blocks = threads, fixed_blocks
        self.normalization_factor = 1 / math.sqrt(c)
        shape = (original_dim, c)
        self.register_buffer("rand_indices", torch.randint(proj_dim, shape, device=device))
        self.register_buffer("rand_signs", torch.randint(2, shape, device=device, dtype=torch.int8) * 2 - 1)

    def _given(self, tensor: Tensor, size: int) -> tuple[Tensor, SparseSide]:
        if tensor.dim() != 2 or tensor.shape[1] != size:
            raise ValueError(f"Expected an input of shape (batch, {size}), got {tuple(tensor.shape)}")
        # Made at each call, for the buffers may have been written to.
        side = SparseSide(self.rand_indices, self.rand_signs, self.proj_dim, self.normalization_factor)
        return tensor.to(self.rand_indices.device), side

    def forward(self, x: Tensor) -> Tensor:
        """``(B, original_dim) -> (B, proj_dim)`` in the input's dtype; half types are added up in float32.

        Raises:
            ValueError: an input of another shape.
        """
        given, side = self._given(x, self.original_dim)
        return sketch(given, side, dtype=x.dtype)

    def transpose(self, y: Tensor) -> Tensor:
        """``(B, proj_dim) -> (B, original_dim)`` by the transposed matrix, in the input's dtype.

        Raises:
            ValueError: an input of another shape.
        """
        given, side = self._given(y, self.proj_dim)
        return project(given, side, transpose=True).to(y.dtype)

    def get_compression_ratio(self) -> float:
        """``original_dim / proj_dim``."""
        return self.original_dim / self.proj_dim

    def get_sparsity_ratio(self) -> float:
        """Share of the matrix that is zero."""
        return 1 - self.c / self.proj_dim

    def extra_repr(self) -> str:
        return f"original_dim={self.original_dim}, proj_dim={self.proj_dim}, c={self.c}"


def get_cuda_info() -> dict[str, Any]:
    """Whether CUDA is there, the version that torch was built for, and its devices by name."""
    count = torch.cuda.device_count()
    return {
        "cuda_available": torch.cuda.is_available(),
        "extension_available": EXTENSION_AVAILABLE,
        "cuda_version": torch.version.cuda,
        "device_count": count,
        "devices": [torch.cuda.get_device_name(number) for number in range(count)],
    }
