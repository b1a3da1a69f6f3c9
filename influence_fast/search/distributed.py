"""One search over an index that is spread over processes (started by ``torchrun``, gloo or nccl).

Every rank holds an index of its own share of the rows, in the order of the ranks. All of them search the same queries,
exchange their best k as tensors (nothing is pickled) and merge them, so each ends with the answer that one process with
all rows gives, bit for bit: exact scores are float64 sums that do not depend on where a row is.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from influence_fast.attribution.gradient_source import Gradients
from influence_fast.errors import InfluenceError, InputError
from influence_fast.search.influence_index import METRICS, InfluenceIndex


def search_all(
    index: InfluenceIndex, queries: Gradients, k: int = 10, harmful: bool = False, group: Any = None, **options: Any
) -> tuple[Tensor, Any]:
    """As :meth:`InfluenceIndex.search`, over all ranks of ``group``; every rank calls it with the same queries.

    ``options`` are those of ``search``; a mask in ``only`` is of this rank's rows. Ids should be unique over all ranks.

    Raises:
        InputError: ``k`` exceeds the rows of all ranks; a method that needs the curvature of all rows.
        InfluenceError: the search failed on some rank.
    """
    if options.get("method") not in (None, *METRICS):
        raise InputError(
            f"method: {options['method']} needs the curvature of all ranks' rows; over several processes one of "
            f"{', '.join(METRICS)}"
        )
    sizes = _gather(torch.tensor([len(index)]), group)
    total, rank = sum(int(size) for size in sizes), dist.get_rank(group)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= total:
        raise InputError(f"k: expected an int from 1 to the {total} rows of all ranks, got {k!r}")
    own, failed = min(k, len(index)), None
    try:
        scores, rows = index.search_rows(queries, own, harmful, **options)
    except InfluenceError as error:
        failed = error
    # A rank that raised alone would leave the others waiting.
    failures = [int(flag) for flag in _gather(torch.tensor([int(failed is not None)]), group)]
    if failed is not None:
        raise failed
    if any(failures):
        raise InfluenceError(f"search: failed on rank {failures.index(1)}")
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
