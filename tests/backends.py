"""The backends that tests go through: the reference, the CPU kernels once per instruction set, Triton and CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import pytest
import torch

from influence_fast import ops

try:
    import influence_fast_cpu as native
except ImportError:
    native = None


@dataclass(frozen=True)
class Backend:
    """A backend, the device its tensors live on, and for the CPU kernels the instruction set. A context manager."""

    name: str
    device: str = "cpu"
    isa: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.name, self.isa)))

    def __enter__(self) -> Backend:
        if self.isa:
            native.set_isa(self.isa)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.isa:
            native.set_isa(native.isas()[-1])

    def need(self, op: str, dtype: torch.dtype = torch.float32) -> None:
        """Skip the test where this backend does not do ``op``."""
        if reason := ops.available(op, self.name, self.device, dtype):
            pytest.skip(f"{self}: {reason}")


def _backends() -> list[Backend]:
    found = [Backend("reference")]
    found += [Backend("cpu", isa=isa) for isa in native.isas()] if native else []
    # Without a GPU their tests are smaller ones, in files of their own: interpreters are slow.
    if torch.cuda.is_available():
        found += [
            Backend(name, "cuda") for name in ("triton", "cuda") if not ops.available("project_outer", name, "cuda")
        ]
    return found


BACKENDS = _backends()
