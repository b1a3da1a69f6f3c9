"""The C++ kernels of ``csrc/cpu`` on torch tensors in main memory."""

from __future__ import annotations

import torch

try:
    import influence_fast_cpu as _native
except ImportError as error:
    _native = None
    _missing = f"the extension influence_fast_cpu is not built ({error})"


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it works on tensors in main memory, not on {device.type}"
    return _missing if _native is None else f"it has no kernel for {op}"
