"""One search over an index that is spread over processes (started by ``torchrun``, gloo or nccl).

Every rank holds an index of its own share of the rows, in the order of the ranks. All of them search the same queries,
exchange their best k as tensors (nothing is pickled) and merge them, so each ends with the answer that one process with
all rows gives, bit for bit: exact scores are float64 sums that do not depend on where a row is.

Methods that precondition queries take the curvature of all rows: each rank sums over its own, and the sums are added up in
float64. Rounding depends on how rows are spread, so that scores agree with those of one process to about 1e-12 of the
largest, and bit for bit where the sums are exact. Rows of all but equal scores may change places.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from influence_fast.attribution.gradient_source import Gradients
from influence_fast.errors import InfluenceError, InputError
from influence_fast.search.influence_index import METRICS, InfluenceIndex
from influence_fast.search.kept_curvature import Preconditioned

T = TypeVar("T")


def add_curvature_all(
    index: InfluenceIndex,
    method: str,
    *,
    damping: float | Mapping[str, float] = 0.1,
    rank: int | None = None,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    group: Any = None,
) -> None:
    """As :meth:`InfluenceIndex.add_curvature`, of the rows of all ranks, for :func:`search_all`; every rank calls it.

    It stays in memory, and is not saved: that of the index in a folder is of this rank's rows alone.

    Raises:
        InputError: as of :meth:`InfluenceIndex.add_curvature`. InfluenceError: that failed on some rank.
    """
    index._check_method(method)
    index._of_all.make(
        method,
        index._rows,
        index.layers,
        _seen_by_all(index, group),
        damping,
        rank,
        factors or {},
        lambda make: _added(make, group),
    )


def search_all(
    index: InfluenceIndex,
    queries: Gradients,
    k: int = 10,
    harmful: bool = False,
    group: Any = None,
    *,
    layers: Sequence[str] | Mapping[str, float] | None = None,
    only: Tensor | Sequence[bool] | Sequence[int | str] | None = None,
    method: str | None = None,
) -> tuple[Tensor, Any]:
    """As :meth:`InfluenceIndex.search`, over all ranks of ``group``; every rank calls it with the same queries.

    Options are those of ``search``; a mask in ``only`` is of this rank's rows. Ids should be unique over all ranks. A
    method's curvature is that of :func:`add_curvature_all`, which is called now where there is none of these rows.

    Raises:
        InputError: ``k`` exceeds the rows of all ranks, or as of ``search``. InfluenceError: the search failed on some rank.
    """
    seen = ""
    if method is not None and method not in METRICS:
        index._check_method(method)
        seen = _seen_by_all(index, group)
        kept = index._of_all.serves(method, index.layers, seen)
        # Ranks of which one was added to, or was given other curvature, make it anew together.
        if not all(int(flag) for flag in _gather(torch.tensor([int(kept)]), group)):
            add_curvature_all(index, method, group=group)

    def ready(how: str, values: Tensor, weights: Mapping[str, float]) -> Preconditioned:
        if how in METRICS:
            return Preconditioned(values)
        return index._of_all.precondition(how, index._rows, values, weights, seen)

    sizes = _gather(torch.tensor([len(index)]), group)
    total, rank = sum(int(size) for size in sizes), dist.get_rank(group)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= total:
        raise InputError(f"k: expected an int from 1 to the {total} rows of all ranks, got {k!r}")
    own = min(k, len(index))
    scores, rows = _made_by_all(
        lambda: index._search_rows(queries, own, harmful, layers, only, method, ready), "search", group
    )
    names = [[index.name_of(row) for row in found] for found in rows.tolist()]
    before = sum(int(size) for size in sizes[:rank])
    padded = torch.full((len(scores), k), float("nan"), dtype=torch.float64)
    numbers = torch.full((len(scores), k), -1)
    padded[:, :own], numbers[:, :own] = scores, rows + before
    everything = torch.cat(_gather(padded, group), 1)
    places = torch.cat(_gather(numbers, group), 1)
    of_ranks = [json.loads(bytes(text.numpy())) for text in _gather_bytes(json.dumps(names).encode(), group)]
    sign = -1 if harmful else 1
    order = np.lexsort((places.numpy(), -sign * everything.numpy()), axis=1)[:, :k]
    best = everything.gather(1, torch.from_numpy(order)).float()
    # Column j of the gathered arrays is entry j % k of rank j // k.
    found = [[of_ranks[j // k][query][j % k] for j in row] for query, row in enumerate(order.tolist())]
    if all(isinstance(name, int) for row in found for name in row):
        return best, torch.tensor(found)
    return best, found


def _seen_by_all(index: InfluenceIndex, group: Any) -> str:
    """Tells the rows of all ranks from others."""
    return sha256(b"".join(bytes(part.numpy()) for part in _gather_bytes(index._seen.encode(), group))).hexdigest()


def _made_by_all(make: Callable[[], T], what: str, group: Any) -> T:
    """What this rank makes; InfluenceError on all where one fails: others would wait for one that raised alone."""
    made: list[T] = []
    failed = None
    try:
        made.append(make())
    except InfluenceError as error:
        failed = error
    failures = [int(flag) for flag in _gather(torch.tensor([int(failed is not None)]), group)]
    if failed is not None:
        raise failed
    if any(failures):
        raise InfluenceError(f"{what}: failed on rank {failures.index(1)}")
    return made[0]


def _added(make: Callable[[], Sequence[Tensor]], group: Any) -> list[Tensor]:
    """The sums of what every rank makes, the same on each."""
    made = _made_by_all(make, "curvature", group)
    out = []
    for tensor in made:
        moved = tensor.to(_device(group), copy=True).contiguous()
        dist.all_reduce(moved, group=group)
        out.append(moved.cpu())
    return out


def _device(group: Any) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def _gather(tensor: Tensor, group: Any) -> list[Tensor]:
    tensor = tensor.to(_device(group)).contiguous()
    out = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, tensor, group=group)
    return [part.cpu() for part in out]


def _gather_bytes(data: bytes, group: Any) -> list[Tensor]:
    sizes = [int(size) for size in _gather(torch.tensor([len(data)]), group)]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return [part[:size] for part, size in zip(_gather(padded, group), sizes, strict=True)]
