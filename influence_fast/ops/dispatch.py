"""Which backend an operation takes: the table of operations, what each backend can run, and the call itself.

``auto`` takes cuda, then triton, then reference for tensors on a GPU, and cpu, then reference elsewhere; the environment
variable ``INFLUENCE_FAST_BACKEND`` replaces ``auto``. A backend that was asked for by name and cannot run raises with the
reason; a fallback of ``auto`` is logged once.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch

from influence_fast.errors import BackendError, InputError


@dataclass(frozen=True)
class Operation:
    """The backends that have a kernel for an operation, and why others have none."""

    backends: tuple[str, ...]
    why_not: Mapping[str, str]


BACKENDS = ("cuda", "triton", "cpu", "reference")
# Name -> what is known of the operation; ``specs`` fills it, one entry a public function.
OPERATIONS: dict[str, Operation] = {}

_log = logging.getLogger("influence_fast")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def operation(*backends: str, **why_not: str) -> Callable[[_Function], _Function]:
    """Enter a public function into the table of operations, with the backends that implement it beside the reference."""

    def enter(function: _Function) -> _Function:
        OPERATIONS[function.__name__] = Operation((*backends, "reference"), why_not)
        return function

    return enter


def available(
    op: str, backend: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str | None:
    """None when ``backend`` can run ``op`` on tensors of this device and dtype, else the reason why it cannot.

    Raises:
        InputError: unknown operation or backend.
    """
    if op not in OPERATIONS:
        raise InputError(f"op: expected one of {', '.join(OPERATIONS)}, got {op!r}")
    if backend not in BACKENDS:
        raise InputError(f"backend: expected auto, {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in OPERATIONS[op].backends:
        return OPERATIONS[op].why_not.get(backend, f"it has no kernel for {op}")
    return _module(backend).unavailable(op, torch.device(device), dtype)


def choose(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> str:
    """The backend that ``op`` takes for tensors of this device and dtype.

    Raises:
        InputError: unknown operation or backend.
        BackendError: the backend was asked for by name and cannot run; the message says why.
    """
    if backend == "auto":
        backend = os.environ.get("INFLUENCE_FAST_BACKEND") or "auto"
    if backend != "auto":
        device = torch.device(device)
        if reason := available(op, backend, device, dtype):
            raise BackendError(f"backend {backend!r} cannot run {op} on {device.type} {dtype}: {reason}")
        return backend
    return _automatic(op, device, dtype)


@cache
def _automatic(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    # Kept: what a process can run stays the same, and asking takes as long as a small kernel.
    device = torch.device(device)
    for name in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        reason = available(op, name, device, dtype)
        if reason is None:
            return name
        _note_fallback(op, name, dtype, reason)
    return "reference"


def run(op: str, backend: str, device: torch.device, dtype: torch.dtype, *args: Any) -> Any:
    """Call an operation's kernel with arguments that were checked."""
    # No torch.no_grad(): every tensor was detached on the way here, and entering it costs as much as a small kernel.
    return getattr(_module(choose(op, device, dtype, backend)), op)(*args)


@cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"influence_fast.ops.{backend}")


@cache
def _note_fallback(op: str, backend: str, dtype: torch.dtype, reason: str) -> None:
    # float64 is the oracle's business: the reference is where it belongs, not a fallback.
    if dtype != torch.float64:
        _log.warning("%s does not run on backend %r: %s", op, backend, reason)
