"""Small stores for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import influence_fast as inf
from influence_fast.gradients.factored_layers import factored_layers
from influence_fast.gradients.store_changes import add_segment
from influence_fast.gradients.store_records import read_manifest
from influence_fast.gradients.store_writer import StoreWriter


def writer(
    path: Path,
    gradients: Mapping[str, Tensor],
    *,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    ids: Sequence[int | str] | None = None,
    projection: str = "identity",
    model: str = "m",
    dtype: str = "float32",
    shard_rows: int = 4,
    resume: bool = True,
    factors: int | None = None,
) -> StoreWriter:
    rows = len(next(iter(gradients.values())))
    shapes = shapes or {name: (1, tensor.shape[1]) for name, tensor in gradients.items()}
    dims = {name: tensor.shape[1] for name, tensor in gradients.items()}
    return StoreWriter.create(
        path,
        layers=shapes,
        dims=dims,
        ids=range(rows) if ids is None else ids,
        projection=projection,
        identifiers={},
        model=model,
        loss="classification",
        dtype=dtype,
        shard_rows=shard_rows,
        settings={},
        resume=resume,
        factors=factors,
        outs={} if factors is None else factored_layers(projection, shapes, dims, factors),
    )


def write_store(
    path: Path, gradients: Mapping[str, Tensor], columns: Mapping[str, Tensor] | None = None, **settings
) -> inf.GradientStore:
    with writer(path, gradients, **settings) as out:
        for shard in out.missing:
            rows = slice(out.span(shard).start, out.span(shard).stop)
            out.write(
                shard,
                {name: tensor[rows] for name, tensor in gradients.items()},
                {name: column[rows] for name, column in (columns or {}).items()},
            )
    return inf.GradientStore.open(path)


def append(
    path: Path,
    gradients: Mapping[str, Tensor],
    ids: Sequence[int | str],
    columns: Mapping[str, Tensor] | None = None,
    **settings,
) -> inf.GradientStore:
    """Rows behind those of a store, as ``append_store`` adds them."""
    name = f"segment-{read_manifest(path).get('next', 1):05d}"
    write_store(path / name, gradients, columns, ids=ids, **settings)
    add_segment(path, name)
    return inf.GradientStore.open(path)


def gradients(rows: int, seed: int) -> dict[str, Tensor]:
    """Gradients of two layers, by a seed."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, dim, generator=random) for name, dim in (("a", 6), ("b", 10))}
