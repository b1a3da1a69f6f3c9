"""One job by several processes, as ``torchrun`` starts them; without it there is one, of rank 0."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from influence_fast import errors
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
    """What rank 0 makes, on every rank: plain JSON, so that nothing is unpickled. An InfluenceError is raised on every
    rank."""
    rank, world = here()
    if world == 1:
        return make()
    text, failed = b"", None
    if rank == 0:
        try:
            made: dict[str, Any] = {"value": make()}
        except InfluenceError as error:
            failed, made = error, {"error": type(error).__name__, "message": str(error)}
        text = json.dumps(made).encode()
    answer = json.loads(_from_first(text))
    if failed is not None:
        raise failed
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return answer["value"]


def _from_first(data: bytes) -> bytes:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, 0)
    sent = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if data:
        sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(sent, 0)
    return bytes(sent.cpu().numpy())


def added(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, the same bits on each."""
    moved = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def wait() -> None:
    """Until every rank is here."""
    if here()[1] > 1:
        dist.barrier()
