"""fast_jl's six functions on our sketches, for tensors on any device.

The number in a name is a batch size that the stock kernels are tuned for, and ``num_feature_tiles`` a way to cut the work:
here results depend on neither. Inputs of float32 are not rounded to float16.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from influence_fast.ops import Side, sketch


def _project(kind: Literal["rademacher", "gaussian"], given: Tensor, n: int, seed: int) -> Tensor:
    if not isinstance(given, Tensor) or given.dim() != 2 or given.dtype not in (torch.float16, torch.float32):
        raise ValueError("input: expected a matrix of float16 or float32")
    if n <= 0 or n % 512:
        raise ValueError("Invalid Number of JL dimensions it has to be a multiple of 512")
    return sketch(given, Side(kind, int(seed) & 0xFFFFFFFF, n, given.shape[1]))


def project_rademacher_8(input: Tensor, N: int, seed: int, num_feature_tiles: int) -> Tensor:
    """``(B, D) -> (B, N)`` float32 by random signs, not scaled: integers for integers.

    Raises:
        ValueError: an input that is no float16 or float32 matrix, or an ``N`` that is no multiple of 512.
    """
    return _project("rademacher", input, N, seed)


def project_normal_8(input: Tensor, N: int, seed: int, num_feature_tiles: int) -> Tensor:
    """``(B, D) -> (B, N)`` float32 by standard normal entries, not scaled.

    Raises:
        ValueError: an input that is no float16 or float32 matrix, or an ``N`` that is no multiple of 512.
    """
    return _project("gaussian", input, N, seed)


project_rademacher_16 = project_rademacher_32 = project_rademacher_8
project_normal_16 = project_normal_32 = project_normal_8
