"""One job by several processes, as ``torchrun`` starts them; without it there is one, of rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from influence_fast.errors import InfluenceError

T = TypeVar("T")


def here() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def joined() -> Iterator[torch.device]:
    """The process group that ``torchrun`` describes (nccl on GPUs, gloo elsewhere), and this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    mine = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if mine:
            dist.destroy_process_group()


def agree(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; an InfluenceError is raised on every rank too."""
    rank, world = here()
    if world == 1:
        return make()
    said: list[T | InfluenceError | None] = [None]
    if rank == 0:
        try:
            said[0] = make()
        except InfluenceError as error:
            said[0] = error
    dist.broadcast_object_list(said)
    if isinstance(said[0], InfluenceError):
        raise said[0]
    return cast(T, said[0])


def wait() -> None:
    """Until every rank is here."""
    if here()[1] > 1:
        dist.barrier()
