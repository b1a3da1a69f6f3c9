"""What a build would take in time, disk and memory, from a few of its batches."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from influence_fast._memory import peak_memory
from influence_fast.data.batching import Loss
from influence_fast.data.tasks import device_of
from influence_fast.gradients.build import verified_settings
from influence_fast.gradients.job import prepare_job
from influence_fast.gradients.model_state import as_evaluated, fingerprint
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.shard import row_bytes
from influence_fast.ops.projections import Projection

# Groups of batches, one of which is run for each.
_SAMPLED = 8


@dataclass(frozen=True)
class Estimate:
    """What a build would take, from a few of its batches.

    Attributes:
        rows, batches: how many there are.
        seconds: time of the whole build on this machine by this process alone, checks of the rows included.
        samples_per_s: ``rows / seconds``.
        disk_bytes: size of the finished store.
        memory_bytes: largest resident memory of the process.
        device_bytes: largest memory of tensors on the GPU, 0 without one.
    """

    rows: int
    batches: int
    seconds: float
    samples_per_s: float
    disk_bytes: int
    memory_bytes: int
    device_bytes: int


def estimate_build(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    layers: str | Iterable[str] = "all",
    projection: Projection | str = Projection(),  # noqa: B008 (frozen)
    loss: str | Loss = "auto",
    batch_tokens: int | str = "auto",
    *,
    ids: Sequence[int | str] | None = None,
    dtype: str = "float32",
    shard_rows: int | str = "auto",
    truncate: bool = False,
    bias: bool = False,
    precision: str | None = None,
) -> Estimate:
    """Time, disk and memory of :func:`build_store` with the same arguments; writes nothing.

    All rows are checked. Of the batches, sorted by what they cost, one of each eighth of the cost is run and stands for
    the others of its eighth.

    Raises:
        InputError: as :func:`build_store`.
    """
    settings = BuildSettings(
        layers, Projection.parse(projection), loss, batch_tokens, dtype, shard_rows, truncate, bias, precision
    )
    return estimate_of(model, dataset, settings, ids=ids)


def estimate_of(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    settings: BuildSettings,
    *,
    ids: Sequence[int | str] | None = None,
) -> Estimate:
    """:func:`estimate_build` with its settings as one object."""
    begin = time.perf_counter()
    settings, _ = verified_settings(model, dataset, settings, ids)
    job = prepare_job(model, dataset, settings, ids)
    fingerprint(model)
    checked = time.perf_counter() - begin
    device = device_of(model)
    rows, size = len(job.rows), job.shard_rows
    planned = [
        batch
        for first in range(0, rows, size)
        for batch in job.budget.batches(job.rows, range(first, min(first + size, rows)))
    ]
    cost = [len(batch) * job.rows.lengths[batch[0]] for batch in planned]
    order = sorted(range(len(planned)), key=lambda b: (-cost[b], -job.rows.lengths[planned[b][0]]))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    shares = np.cumsum([cost[b] for b in order]) / sum(cost)
    eighth = np.minimum(shares * _SAMPLED, _SAMPLED - 1).astype(int)
    groups = [[order[i] for i in np.flatnonzero(part == eighth)] for part in range(_SAMPLED)]
    seconds, columns, written = 0.0, 0, 0.0
    with as_evaluated(model), job.capture:
        job.step(planned[order[0]])
        for group in filter(None, groups):
            chosen = group[len(group) // 2]
            begin = time.perf_counter()
            shard = job.compute(planned[chosen])
            taken = time.perf_counter() - begin
            seconds += taken * sum(cost[b] for b in group) / cost[chosen]
            columns = sum(column.element_size() for column in shard.columns.values())
            begin = time.perf_counter()
            hashlib.sha256(b"".join(part.numpy().tobytes() for part in shard.gradients.values())).digest()
            written += (time.perf_counter() - begin) * sum(len(planned[b]) for b in group) / len(planned[chosen])
    # Writing goes on beside computing, but on a CPU it takes cores from it.
    seconds = checked + (max(seconds, written) if device.type == "cuda" else seconds + written)
    dims = job.capture.dims
    header = sum(150 + 2 * len(name) for name in dims) + 200
    shards = -(-rows // size)
    row = sum(row_bytes(settings.dtype, dim) for dim in dims.values()) + columns
    held = min(size, rows) * (4 * sum(dims.values()) * min(2, shards) + row + 8 * max(dims.values()))
    return Estimate(
        rows=rows,
        batches=len(planned),
        seconds=seconds,
        samples_per_s=rows / seconds,
        disk_bytes=rows * row + shards * (header + 300) + 400 * len(dims),
        memory_bytes=peak_memory() + held,
        device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )
