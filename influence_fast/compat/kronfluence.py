"""kronfluence's score files, read into our aggregation and comparison; kronfluence is not needed."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from influence_fast.errors import InputError


def read_pairwise_scores(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The scores of each module, ``{module: (queries, training samples)}`` float32 or float64, for :func:`aggregate`.

    Positive scores are of samples that help, so that the lowest are the most harmful, as everywhere here.

    Args:
        path: ``pairwise_scores.safetensors``, or the folder that it lies in. Without scores by module there is one key,
            ``all_modules``.

    Raises:
        InputError: there is no such file, or it does not hold matrices of one shape.
    """
    source = Path(path)
    if source.is_dir():
        source /= "pairwise_scores.safetensors"
    try:
        found = load_file(source)
    except (OSError, SafetensorError) as error:
        raise InputError(f"path: expected a score file of kronfluence, got {source}: {error}") from None
    shapes = {tuple(scores.shape) for scores in found.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise InputError(f"path: expected matrices (queries, training samples) of one shape, got {sorted(shapes)}")
    return {name: s if s.dtype == torch.float64 else s.float() for name, s in found.items()}
