"""Query losses of models that were retrained on some of the rows: in parallel, kept in a folder, gone on with after a kill.

A folder holds ``retrainings.json``, which says what the losses in it depend on, and one file for each retraining, named by
its rows and its seed. Files are sealed and appear whole, so a run that was stopped loses only what it was training.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import TypedDict

from influence_fast import _records as records
from influence_fast._files import atomic_write, locked, make_folder, remove_leftovers
from influence_fast.errors import InputError, StoreError

Train = Callable[[Tensor], Any]
Losses = Callable[[Any], Any]
_ABOUT = "retrainings.json"
_DIFFERENCES = {
    "rows": "number of training rows",
    "train": "code or data of `train`",
    "losses": "code or data of `losses`",
    "depends_on": "`depends_on`",
}


class Retraining(NamedTuple):
    """One model to train: numbers of its rows, int64 ascending, and a seed."""

    rows: Tensor
    seed: int

    @property
    def name(self) -> str:
        """SHA-256 of both."""
        return hashlib.sha256(self.rows.numpy().tobytes() + str(self.seed).encode()).hexdigest()


def retrained_losses(
    jobs: Sequence[Retraining],
    train: Train,
    losses: Losses,
    rows: int,
    *,
    folder: str | Path | None = None,
    processes: int = 1,
    depends_on: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Tensor:
    """``losses(train(rows))`` of every job: float64 ``(jobs, queries)``; a job that stands there twice is trained once.

    Arguments and errors as of :func:`~influence_fast.lds`; NaN and infinity are given back as they are.
    """
    if processes < 1:
        raise InputError(f"processes: expected at least 1, got {processes!r}")
    wanted = {job.name: job for job in jobs}
    with _kept_in(folder, _about(train, losses, rows, depends_on)) as path:
        found = {} if path is None else dict(_kept(path, wanted))
        missing = [job for name, job in wanted.items() if name not in found]
        with tqdm(
            total=len(wanted), initial=len(found), desc="retraining", unit="model", delay=2,
            disable=None if progress else True,
        ) as bar:  # fmt: skip
            for job, values in _trained(missing, train, losses, processes):
                if path is not None:
                    atomic_write(path / f"{job.name}.json", _document(job, values))
                found[job.name] = values
                bar.update()
    lengths = {name: len(values) for name, values in found.items()}
    if len(set(lengths.values())) > 1:
        few, most = min(lengths.values()), max(lengths.values())
        raise InputError(f"losses: expected as many for every model, got {few} of one and {most} of another")
    return torch.tensor([found[job.name] for job in jobs], dtype=torch.float64)


def fingerprint(value: Any) -> str:
    """SHA-256 that tells apart functions by source and by what they close over, tensors and arrays by their bytes, models
    by their weights, and plain values by what they print as; of other objects the attributes, or else the type alone.
    """
    digest = hashlib.sha256()
    _add(value, digest.update, {})
    return digest.hexdigest()


def _add(value: Any, add: Callable[[bytes], None], seen: dict[int, Any]) -> None:
    add(f"{type(value).__module__}.{type(value).__qualname__}:".encode())
    if value is None or isinstance(value, str | bytes | int | float | complex | Path | torch.dtype | np.generic):
        add(repr(value).encode() + b";")
        return
    if id(value) in seen:
        return
    # Held, so that no later object takes over its identity.
    seen[id(value)] = value
    parts: list[Any] = []
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        add(f"{value.dtype}{tuple(value.shape)}".encode())
        add(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        add(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, nn.Module):
        parts = [repr(value), dict(value.state_dict())]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif inspect.ismethod(value):
        parts = [value.__func__, value.__self__]
    elif inspect.isfunction(value):
        try:
            code = inspect.getsource(value)
        except (OSError, TypeError):
            code = value.__code__.co_code.hex() + repr(value.__code__.co_consts)
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        parts = [code, value.__defaults__, value.__kwdefaults__, *cells]
    elif isinstance(value, Mapping):
        parts = [part for key in sorted(value, key=repr) for part in (key, value[key])]
    elif isinstance(value, set | frozenset):
        parts = sorted(value, key=repr)
    elif isinstance(value, list | tuple | np.ndarray):
        parts = list(value)
    elif not inspect.isclass(value) and not inspect.ismodule(value):
        parts = [vars(value)] if hasattr(value, "__dict__") else []
    for part in parts:
        _add(part, add, seen)
    add(b".")


# What a name that is not bound yet has for a cell: its content cannot be read.
_EMPTY = type((lambda x: lambda: x)(0).__closure__[0])()  # type: ignore[index]


class _Kind(TypedDict):
    rows: records.Whole
    train: records.Text
    losses: records.Text
    depends_on: records.Text


class _Retrained(TypedDict):
    rows: records.Whole
    seed: records.Whole
    # JSON has no NaN.
    losses: list[records.Number | Literal["nan", "inf", "-inf"]]


_KIND, _RETRAINED = records.Schema(_Kind), records.Schema(_Retrained)


def _about(train: Train, losses: Losses, rows: int, depends_on: Mapping[str, Any] | None) -> dict[str, Any]:
    given = json.dumps(depends_on or {}, sort_keys=True, default=fingerprint)
    return {"rows": rows, "train": fingerprint(train), "losses": fingerprint(losses), "depends_on": given}


@contextmanager
def _kept_in(folder: str | Path | None, about: Mapping[str, Any]) -> Iterator[Path | None]:
    """The folder, locked, once it is seen to hold retrainings of this kind or nothing."""
    if folder is None:
        yield None
        return
    path = Path(folder)
    make_folder(path)
    with locked(path / ".lock"):
        remove_leftovers(path)
        there = path / _ABOUT
        if there.exists():
            found = records.unseal(str(there), records.read_bytes(there, f"{there}: is missing"))
            _KIND.check(str(there), found)
            other = [what for key, what in _DIFFERENCES.items() if found[key] != about[key]]
            if other:
                raise StoreError(
                    f"folder: {path} holds retrainings with another {', '.join(other)}; choose a new folder"
                )
        elif any(file.name != ".lock" for file in path.iterdir()):
            raise InputError(f"folder: {path} holds something else than retrainings; choose a new folder")
        else:
            atomic_write(there, records.seal(about))
        yield path


def _trained(
    jobs: Sequence[Retraining], train: Train, losses: Losses, processes: int
) -> Iterator[tuple[Retraining, list[float]]]:
    """Every job with its losses, as each is done."""
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield _retrain(job, train, losses)
        return
    from joblib import Parallel, cpu_count, delayed, parallel_config

    threads = max(1, cpu_count() // processes)
    with parallel_config("loky", n_jobs=processes, inner_max_num_threads=threads):
        tasks = (delayed(_retrain)(job, train, losses, threads) for job in jobs)
        yield from Parallel(return_as="generator_unordered")(tasks)


def _retrain(
    job: Retraining, train: Train, losses: Losses, threads: int | None = None
) -> tuple[Retraining, list[float]]:
    if threads is not None:
        torch.set_num_threads(threads)
    with _seeded(job.seed):
        found = torch.as_tensor(losses(train(job.rows.clone()))).detach().cpu().double()
    if found.dim() != 1 or not len(found):
        raise InputError(f"losses: expected one loss for each query, (m,), got shape {tuple(found.shape)}")
    return job, found.tolist()


def _document(job: Retraining, values: list[float]) -> bytes:
    # JSON has no NaN.
    losses = [value if math.isfinite(value) else str(value) for value in values]
    return records.seal({"rows": len(job.rows), "seed": job.seed, "losses": losses})


def _kept(folder: Path, wanted: Mapping[str, Retraining]) -> Iterator[tuple[str, list[float]]]:
    for name, job in wanted.items():
        if (folder / f"{name}.json").exists():
            yield name, _read(folder / f"{name}.json", job)


def _read(path: Path, job: Retraining) -> list[float]:
    found = records.unseal(str(path), records.read_bytes(path, f"{path}: is missing"))
    _RETRAINED.check(str(path), found)
    if (found["rows"], found["seed"]) != (len(job.rows), job.seed):
        raise StoreError(f"{path}: holds another retraining than its name says; remove it")
    return [float(value) for value in found["losses"]]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators of torch, NumPy and Python start from ``seed`` and are given back as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
