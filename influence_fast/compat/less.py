"""LESS's gradient collection on our sketches: the same arguments and files, without fast_jl and on any device.

The numbers in the files are of our random matrices, so they are not to be mixed with files of stock.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.compat.trak import BasicProjector, CudaProjector
from influence_fast.errors import InputError
from influence_fast.ops import AdamState

DISTRIBUTION, VERSIONS = "less", ("0.1",)
HOLDERS = ("less",)
MODULES = ("less.data_selection.collect_grad_reps",)
REPLACED = tuple((MODULES[0], name) for name in ("collect_grads", "get_trak_projector"))
# Samples that are projected at once, and those between two files: a job that was stopped goes on after the last file.
_PROJECTED, _SAVED = 16, 160


def get_trak_projector(device: torch.device) -> type[BasicProjector]:
    """The projector class for a device: float32 results on a GPU, else of the ``dtype`` that it is given."""
    return CudaProjector if torch.device(device).type == "cuda" else BasicProjector


def collect_grads(
    dataloader: Iterable[Mapping[str, Tensor]],
    model: nn.Module,
    output_dir: str | os.PathLike[str],
    proj_dim: Sequence[int] = (8192,),
    adam_optimizer_state: Mapping[str, Mapping[str, Tensor]] | None = None,
    gradient_type: str = "adam",
    max_samples: int | None = None,
) -> None:
    """Write a projected gradient of every batch (one sample each) to ``output_dir/dim{d}``, for each ``d``.

    ``grads-{count}.pt`` hold up to 160 rows each, ``all_unormalized.pt`` all of them and ``all_orig.pt`` the same with rows
    of length 1. Gradients are rounded to float16 before they are projected, as stock does. What was written is not computed
    again. Torch's seed is set to 0.

    Args:
        adam_optimizer_state: ``{parameter: {"exp_avg": ..., "exp_avg_sq": ...}}``, for ``adam``.
        gradient_type: ``adam`` (Adam's update of the weights, Xia et al. 2024), ``sign`` or ``sgd``.

    Raises:
        InputError: an unknown type, a parameter that has no Adam state of its shape, no sample, or no dimension.
    """
    if gradient_type not in ("adam", "sign", "sgd"):
        raise InputError(f"gradient_type: expected adam, sign or sgd, got {gradient_type!r}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not proj_dim:
        raise InputError("proj_dim: expected at least one number")
    if not parameters:
        raise InputError("model: expected parameters that require gradients")
    states = _states(parameters, adam_optimizer_state) if gradient_type == "adam" else {}
    torch.manual_seed(0)
    first = next(iter(parameters.values()))
    device, size = first.device, sum(p.numel() for p in parameters.values())
    kind = get_trak_projector(device)
    projectors = [kind(size, d, 0, "rademacher", device, 16, dtype=first.dtype) for d in proj_dim]
    folders = [Path(output_dir) / f"dim{d}" for d in proj_dim]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    # Go on from where every dimension has a file; what only some have beyond it is made again, not added twice.
    done = max(set.intersection(*({count for count, _ in _files(folder)} for folder in folders)), default=0)
    for folder in folders:
        for count, path in _files(folder):
            if count > done:
                path.unlink()

    rows: list[dict[str, Tensor]] = []
    projected: list[list[Tensor]] = [[] for _ in folders]

    def project() -> None:
        if rows:
            stacked = {name: torch.stack([row[name] for row in rows]) for name in parameters}
            for projector, found in zip(projectors, projected, strict=True):
                found.append(projector.project(stacked, 0).cpu())
            rows.clear()

    def save(count: int) -> None:
        project()
        for folder, found in zip(folders, projected, strict=True):
            if found:
                _write(torch.cat(found), folder / f"grads-{count}.pt")
                found.clear()

    count = 0
    for batch in dataloader:
        if max_samples is not None and count >= max_samples:
            break
        count += 1
        if count <= done:
            continue
        model.zero_grad()
        model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
        rows.append({name: _entries(name, p, gradient_type, states) for name, p in parameters.items()})
        model.zero_grad()
        if count % _PROJECTED == 0:
            project()
        if count % _SAVED == 0:
            save(count)
    save(count)
    for folder in folders:
        parts = [torch.load(path, weights_only=True) for _, path in _files(folder)]
        if not parts:
            raise InputError("dataloader: expected at least one sample")
        _write(torch.cat([nn.functional.normalize(part, dim=1) for part in parts]), folder / "all_orig.pt")
        _write(torch.cat(parts), folder / "all_unormalized.pt")


def _states(parameters: Mapping[str, Tensor], given: Mapping[str, Any] | None) -> dict[str, AdamState]:
    states = {}
    for name, parameter in parameters.items():
        state = (given or {}).get(name, {})
        moments = [state.get(key) for key in ("exp_avg", "exp_avg_sq")]
        if any(moment is None or moment.numel() != parameter.numel() for moment in moments):
            raise InputError(f"adam_optimizer_state: expected exp_avg and exp_avg_sq of {parameter.numel()} for {name}")
        m, v = (moment.to(parameter.device).reshape(1, -1) for moment in moments)
        states[name] = AdamState(m, v)
    return states


def _entries(name: str, parameter: nn.Parameter, kind: str, states: Mapping[str, AdamState]) -> Tensor:
    # A parameter that the loss does not reach has a gradient of 0, so that all rows have the same columns.
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    flat = grad.detach().reshape(1, -1)
    if kind == "adam":
        flat = states[name].update(flat[None])[0]
    return (flat.sign() if kind == "sign" else flat)[0].half()


def _files(folder: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"grads-(\d+)\.pt", path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def _write(rows: Tensor, path: Path) -> None:
    # Whole or not at all: what is there counts as done.
    partial = path.with_suffix(".partial")
    torch.save(rows, partial)
    partial.replace(path)
