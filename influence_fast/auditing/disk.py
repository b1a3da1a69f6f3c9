"""What an audit would write, before it writes: what fits, what it may take, and what would take less."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from influence_fast._memory import parse_memory
from influence_fast.attribution.model_passes import states_on_disk
from influence_fast.attribution.registry import get_method
from influence_fast.auditing.config import SELF_CHECK_ROWS, AuditPlan
from influence_fast.errors import InputError
from influence_fast.gradients.default_projection import SMALL, numbers
from influence_fast.gradients.shard import row_bytes
from influence_fast.ops.projections import Projection

# What is written beside stores: scores, a report; and what a disk should have left.
_BESIDE = 256 << 20
# Queries that are built once more with other labels, at most.
_MISLABELLED = 2000


class TooLarge(InputError):
    """An audit fits on the disk, and takes more than it may; ``bytes`` says how much."""

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.bytes = size


def stored_rows(plan: AuditPlan) -> int:
    """Rows of all stores of an audit: training samples, queries, and what its methods and the self-check build beside."""
    n, m = len(plan.samples), len(plan.trusted)
    copied = 0 if plan.config.self_check is None else min(n, SELF_CHECK_ROWS)
    methods = [get_method(name) for name in plan.config.methods or ()]
    rows = n + m + 2 * copied
    if any(method.fitted_to_queries for method in methods):
        rows += min(m, _MISLABELLED)
    if any(method.name.startswith("contrast") for method in methods):
        rows += n + m
    over = sum("checkpoints" in method.needs for method in methods)
    if over:
        # The queries are the same for all of them.
        rows += len(plan.checkpoints) * (m + over * (n + copied))
    return rows


def stored_bytes(plan: AuditPlan, projection: Projection | None = None) -> int:
    """Bytes of all stores of an audit, and of hidden states that memory does not take."""
    dims = numbers(plan.model, plan.layers, projection or plan.build.projection)
    # With three columns.
    row = sum(row_bytes(plan.build.dtype, dim) for dim in dims.values()) + 16
    return stored_rows(plan) * row + _states(plan)


def _states(plan: AuditPlan) -> int:
    """Before fine-tuning, and after it where a method asks for both."""
    needs = set().union(*(get_method(name).needs for name in plan.config.methods or ()))
    config = getattr(plan.model, "config", None)
    blocks, width = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "hidden_size"))
    kinds = len(needs & {"hidden states", "base states"})
    return kinds * states_on_disk(len(plan.samples), blocks, width)


def free_disk(out: str | Path | None) -> int:
    """Bytes that are free where an audit would write."""
    folder = Path(tempfile.gettempdir() if out is None else out).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def check_disk(plan: AuditPlan, out: str | Path | None) -> None:
    """Refuse what does not fit on the disk, or takes more than it may; what an earlier run left there counts as written.

    Raises:
        InputError: it does not fit.
        TooLarge: it fits, and takes more than ``max_disk``.
    """
    size, free = stored_bytes(plan), free_disk(out)
    left = max(0, size - _written(out))
    most = parse_memory(plan.config.max_disk)
    if left + _BESIDE <= free and left <= most:
        return
    smaller = [
        f"--projection {projection} takes {as_text(stored_bytes(plan, projection))}"
        for projection in _smaller(plan)
        if stored_bytes(plan, projection) < size / 2
    ]
    quarter = ["--dtype int8 takes a quarter"] if plan.build.dtype == "float32" else []
    remedy = "; ".join([*smaller, "--layers names fewer layers", *quarter])
    takes = f"the gradients of this audit take {as_text(size)} ({plan.build.projection}, {len(plan.layers)} layers)"
    where = "the temporary folder" if out is None else str(out)
    if left + _BESIDE > free:
        raise InputError(f"out: {takes}, and where {where} is {as_text(free)} are free. {remedy}")
    raise TooLarge(f"out: {takes}, more than {as_text(most)}. {remedy}; or allow it (--max-disk {as_text(size)})", size)


def _smaller(plan: AuditPlan) -> Iterable[Projection]:
    return [SMALL] if plan.build.projection != SMALL else [Projection("sjlt", 64)]


def _written(out: str | Path | None) -> int:
    stores = None if out is None else Path(out) / "stores"
    if stores is None or not stores.is_dir():
        return 0
    return sum(file.stat().st_size for file in stores.rglob("*") if file.is_file())


def as_text(size: int) -> str:
    """Bytes for people, rounded up, as ``--max-disk`` takes them."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            return f"{-(-size // (factor // 10)) / 10:g}{unit}"
    return f"{-(-size // 1000)}kB"
