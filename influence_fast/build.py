"""A data set through a model into a gradient store: checks, batches by token budget, losses, resume.

Rows are taken shard by shard. Within a shard they are sorted by length and cut into batches of at most
``batch_tokens`` tokens, padding included; results go back to data-set order before the shard is written, so what a
store holds depends on its settings alone, and a build that was killed goes on from the last whole shard. The ranks
of one job (``torchrun``) take shards in turn. Two shards at most are in memory, whatever the number of rows.
"""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from influence_fast import losses, processes
from influence_fast.capture import GradientCapture
from influence_fast.errors import InfluenceError, InputError
from influence_fast.layers import uncompiled
from influence_fast.losses import IGNORED, Loss
from influence_fast.projection import Projection
from influence_fast.store import DTYPES, GradientStore, StoreWriter, recorded

__all__ = ["Estimate", "build_store", "estimate_build", "fingerprint"]

LOSSES = ("auto", "classification", "causal-lm", "causal-lm-sum")
_TOKEN_COLUMNS = ("input_ids", "token_type_ids", "position_ids")
_SHARD_BYTES = 32 << 20
_SHARD_ROWS = 1 << 16
# Where more tokens in a batch are no faster: activations leave a CPU's caches, and a GPU is busy.
_CPU_TOKENS, _GPU_TOKENS = 2048, 65536
_SAMPLED = 8

_log = logging.getLogger("influence_fast")


def build_store(
    path: str | PathLike[str],
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    layers: str | Iterable[str] = "all",
    projection: Projection | str = Projection(),  # noqa: B008 (frozen)
    loss: str | Loss = "auto",
    batch_tokens: int | str = "auto",
    resume: bool = True,
    progress: bool = True,
    *,
    ids: Sequence[int | str] | None = None,
    dtype: str = "float32",
    shard_rows: int | str = "auto",
    truncate: bool = False,
    bias: bool = False,
    precision: str | None = None,
) -> GradientStore:
    """Per-sample gradients of ``model`` on every row of ``dataset``, kept in a folder.

    Args:
        path: the store's folder; made if missing. With ``resume`` an unfinished build of the same model, rows and
            settings goes on from its last whole shard and ends in the same bytes.
        model: a Hugging Face model or anything called like one. Runs in eval mode on the device where it is; flags and
            modes are put back afterwards. In a process group every rank calls with the same arguments and a shared
            folder, and writes its own shards; the bytes are those of one process with as many threads. A model
            sharded by FSDP2 (``fully_shard``) runs on all ranks in step.
        dataset: a ``datasets.Dataset`` or sequence of dicts with ``input_ids`` and ``labels`` (an int per row, or one
            per token with -100 where there is no target); ``attention_mask`` and ``token_type_ids`` if there are any.
        layers, projection, bias: see :class:`~influence_fast.GradientCapture`.
        loss: ``auto`` tells by the labels; ``classification`` is cross entropy; ``causal-lm`` the mean and
            ``causal-lm-sum`` the sum of cross entropy over a row's target tokens; or ``loss(model, batch) -> (N,)``.
        batch_tokens: largest number of tokens in a batch, padding included. ``auto`` follows from the memory that is
            free when the build begins, and is kept for its resumption. When memory runs out it is halved, for the rest
            of the run. Gradients do not depend on it beyond the rounding of their last bits; two builds are the same
            to the bit where it is the same number and no batch ran out of memory.
        ids: names of the rows; their numbers by default.
        dtype: float32, float16, bfloat16 or int8 on disk.
        precision: None runs the model as it is; ``bfloat16`` or ``float16`` runs forward and backward under autocast
            (projections and sums stay float32). float16 loses gradients below 6e-8: prefer bfloat16.
        truncate: cut rows that are longer than the model's context instead of refusing them.

    Returns:
        The finished store, with columns ``loss`` (float32) and, for classification, ``correct`` and ``prediction``.

    Raises:
        InputError: an empty set, a missing column, labels out of range, token ids beyond the vocabulary, rows that are
            empty or longer than the model's context, non-finite losses or gradients (names layer and row).
        StoreError: ``path`` holds a store of another model, projection or data set.
    """
    job = _job(
        model, dataset, layers, projection, loss, batch_tokens, ids, dtype, shard_rows, truncate, bias, precision, path
    )
    rank, world = processes.here()
    with (
        as_evaluated(model),
        _writing(path, job, resume) as writer,
        tqdm(total=len(job.rows), unit="sample", delay=2, disable=None if progress and rank == 0 else True) as bar,
        ThreadPoolExecutor(1) as background,
        job.capture,
    ):
        writing: Future[None] | None = None
        missing = writer.missing
        bar.update(len(job.rows) - sum(len(writer.span(number)) for number in missing))
        # The bar is rank 0's: the others are as far, give or take a shard.
        advance = partial(_advance, bar, world)
        for number in missing[rank::world]:
            shard = job.compute(writer.span(number), advance)
            if writing is not None:
                writing.result()
            # The next shard is computed while this one is hashed and written; never more than two are in memory.
            writing = background.submit(writer.write, number, shard.gradients, shard.columns)
            del shard
        job.keep_step([[writer.span(number) for number in missing[r::world]] for r in range(world)])
        if writing is not None:
            writing.result()
    return GradientStore.open(path)


def _advance(bar: Any, world: int, count: int) -> None:
    bar.update(min(count * world, bar.total - bar.n))


@contextmanager
def _writing(path: str | PathLike[str], job: _Job, resume: bool) -> Iterator[StoreWriter]:
    """The store, begun by rank 0 and left by all ranks together."""
    rank, world = processes.here()
    settings = job.settings()
    with ExitStack() as stack:
        entered: list[StoreWriter] = []

        def begin() -> None:
            writer = StoreWriter.create(
                path, **settings, resume=resume or rank > 0, leads=rank == 0, together=world > 1
            )
            entered.append(stack.enter_context(writer))

        processes.agree(begin)
        if rank > 0:
            begin()
        processes.wait()
        yield entered[0]
        processes.wait()


@dataclass(frozen=True)
class Estimate:
    """What a build would take, from a few of its batches.

    Attributes:
        rows, batches: how many there are.
        seconds: time of the whole build on this machine by this process alone, checks of the rows included.
        samples_per_s: ``rows / seconds``.
        disk_bytes: size of the finished store.
        memory_bytes: largest resident memory of the process.
        device_bytes: largest memory of tensors on the GPU, 0 without one.
    """

    rows: int
    batches: int
    seconds: float
    samples_per_s: float
    disk_bytes: int
    memory_bytes: int
    device_bytes: int


def estimate_build(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    layers: str | Iterable[str] = "all",
    projection: Projection | str = Projection(),  # noqa: B008 (frozen)
    loss: str | Loss = "auto",
    batch_tokens: int | str = "auto",
    *,
    ids: Sequence[int | str] | None = None,
    dtype: str = "float32",
    shard_rows: int | str = "auto",
    truncate: bool = False,
    bias: bool = False,
    precision: str | None = None,
) -> Estimate:
    """Time, disk and memory of :func:`build_store` with the same arguments; writes nothing.

    All rows are checked. Of the batches, sorted by what they cost, one of each eighth of the cost is run and stands for
    the others of its eighth.

    Raises:
        InputError: as :func:`build_store`.
    """
    begin = time.perf_counter()
    job = _job(
        model, dataset, layers, projection, loss, batch_tokens, ids, dtype, shard_rows, truncate, bias, precision, None
    )
    job.settings()
    checked = time.perf_counter() - begin
    device = device_of(model)
    rows, size = len(job.rows), job.shard_rows
    planned = [
        batch
        for first in range(0, rows, size)
        for batch in batches(job.rows, range(first, min(first + size, rows)), job.budget.tokens)
    ]
    cost = [len(batch) * job.rows.lengths[batch[0]] for batch in planned]
    order = sorted(range(len(planned)), key=lambda b: (-cost[b], -job.rows.lengths[planned[b][0]]))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    shares = np.cumsum([cost[b] for b in order]) / sum(cost)
    eighth = np.minimum(shares * _SAMPLED, _SAMPLED - 1).astype(int)
    groups = [[order[i] for i in np.flatnonzero(part == eighth)] for part in range(_SAMPLED)]
    seconds, columns, written = 0.0, 0, 0.0
    with as_evaluated(model), job.capture:
        job.step(planned[order[0]])
        for group in filter(None, groups):
            chosen = group[len(group) // 2]
            begin = time.perf_counter()
            shard = job.compute(planned[chosen])
            taken = time.perf_counter() - begin
            seconds += taken * sum(cost[b] for b in group) / cost[chosen]
            columns = sum(column.element_size() for column in shard.columns.values())
            begin = time.perf_counter()
            hashlib.sha256(b"".join(part.numpy().tobytes() for part in shard.gradients.values())).digest()
            written += (time.perf_counter() - begin) * sum(len(planned[b]) for b in group) / len(planned[chosen])
    # Writing goes on beside computing, but on a CPU it takes cores from it.
    seconds = checked + (max(seconds, written) if device.type == "cuda" else seconds + written)
    dims = job.capture.dims
    width = DTYPES[dtype].itemsize
    header = sum(150 + 2 * len(name) for name in dims) + 200
    shards = -(-rows // size)
    row_bytes = sum(dim * width + 8 + (4 if dtype == "int8" else 0) for dim in dims.values()) + columns
    held = min(size, rows) * (4 * sum(dims.values()) * min(2, shards) + row_bytes + 8 * max(dims.values()))
    return Estimate(
        rows=rows,
        batches=len(planned),
        seconds=seconds,
        samples_per_s=rows / seconds,
        disk_bytes=rows * row_bytes + shards * (header + 300) + 400 * len(dims),
        memory_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + held,
        device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


@dataclass
class Budget:
    """Most tokens in a batch, padding included. What memory did not hold is not tried again."""

    tokens: int


@dataclass
class _Job:
    """A build made concrete: everything but where it is written."""

    model: nn.Module
    rows: Rows
    capture: GradientCapture
    loss: Loss
    budget: Budget
    shard_rows: int
    precision: str | None
    named: dict[str, Any]
    """Settings of the store that were known from the start."""

    def settings(self) -> dict[str, Any]:
        """Arguments of :meth:`StoreWriter.create`."""
        return {
            **self.named,
            "layers": self.capture.shapes,
            "dims": self.capture.dims,
            "ids": self.rows.ids,
            "identifiers": self.capture.identifiers,
            "model": fingerprint(self.model),
            "shard_rows": self.shard_rows,
        }

    def step(self, chosen: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return _step(self.model, self.capture, self.loss, self.rows, chosen, self.precision)

    def compute(self, span: range | list[int], advance: Callable[[int], None] = lambda count: None) -> _Shard:
        """Gradients and columns of some rows, in their order."""
        shard = _Shard(self.rows, span, self.capture.dims)
        copies = _Copies(device_of(self.model))
        results = run(self.model, self.capture, self.loss, self.rows, span, self.budget, self.precision)
        for arrived in copies.behind(results):
            shard.put(*arrived)
            advance(len(arrived[0]))
        return shard

    def keep_step(self, spans: list[list[range]]) -> None:
        """Run spare batches until the rank with most is done: the ranks of a sharded model compute together."""
        if not _sharded(self.model):
            return
        counts = [sum(len(batches(self.rows, span, self.budget.tokens)) for span in own) for own in spans]
        spare = [int(np.argmin(self.rows.lengths))]
        for _ in range(max(counts) - counts[processes.here()[0]]):
            self.step(spare)


def _job(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    layers: str | Iterable[str],
    projection: Projection | str,
    loss: str | Loss,
    batch_tokens: int | str,
    ids: Sequence[int | str] | None,
    dtype: str,
    shard_rows: int | str,
    truncate: bool,
    bias: bool,
    precision: str | None,
    path: str | PathLike[str] | None,
) -> _Job:
    projection = Projection.parse(projection) if isinstance(projection, str) else projection
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    rows, kind = checked_rows(model, dataset, loss, ids, truncate)
    autocast(model, precision)
    capture = GradientCapture(model, layers, projection, bias=bias)
    tokens = processes.agree(lambda: token_budget(batch_tokens, model, path))
    if shard_rows == "auto":
        shard_rows = max(1, min(_SHARD_ROWS, _SHARD_BYTES // (4 * sum(capture.dims.values()))))
    elif isinstance(shard_rows, bool) or not isinstance(shard_rows, int) or shard_rows < 1:
        raise InputError(f"shard_rows: expected 'auto' or a positive int, got {shard_rows!r}")
    settings = {
        "data": rows.digest(),
        "batch_tokens": tokens,
        "truncate": truncate,
        "bias": bias,
        "precision": precision,
    }
    named = {
        "projection": str(projection),
        "loss": kind if isinstance(loss, str) else getattr(loss, "__qualname__", "custom"),
        "dtype": dtype,
        "settings": settings,
    }
    function = loss if callable(loss) else _loss(kind, capture)
    return _Job(model, rows, capture, function, Budget(tokens), shard_rows, precision, named)


def checked_rows(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    loss: str | Loss = "auto",
    ids: Sequence[int | str] | None = None,
    truncate: bool = False,
) -> tuple[Rows, str]:
    """The rows of a data set and the kind of loss that they call for; InputError names the first row that will not do."""
    rows = Rows(dataset, ids, _max_length(model) if truncate else None)
    kind = _loss_kind(loss, rows)
    _check(rows, model, kind)
    return rows, kind


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter and buffer that the model saves: name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if losses.is_sharded(tensor):
            tensor = cast(Any, tensor).full_tensor()
        digest.update(f"{uncompiled(name)} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Rows:
    """The data set as clean samples: pads cut off, ids and labels as lists."""

    def __init__(
        self, dataset: Sequence[Mapping[str, Any]], ids: Sequence[int | str] | None, cut: int | None = None
    ) -> None:
        self.dataset = dataset
        self.cut = cut
        if len(dataset) == 0:
            raise InputError("dataset: expected at least one row, got none")
        self.ids: Sequence[int | str] = range(len(dataset)) if ids is None else ids
        if len(self.ids) != len(dataset):
            raise InputError(f"ids: expected one for each of the {len(dataset)} rows, got {len(self.ids)}")
        if ids is not None and len(set(ids)) != len(ids):
            raise InputError("ids: expected no two rows to share one")
        columns = list(dataset[0])
        for needed in ("input_ids", "labels"):
            if needed not in columns:
                raise InputError(f"dataset: column {needed!r} is missing; there are {', '.join(map(repr, columns))}")
        self.lengths = array("l")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: _listed(self.dataset[index].get(name)) for name in (*_TOKEN_COLUMNS, "attention_mask", "labels")}
        mask, per_token = row.pop("attention_mask"), isinstance(row["labels"], list)
        columns = [c for c in (*_TOKEN_COLUMNS, *(["labels"] if per_token else [])) if row.get(c) is not None]
        length = len(row["input_ids"])
        for column in columns:
            if not isinstance(row[column], list) or len(row[column]) != length:
                raise InputError(
                    f"dataset: {column!r} of row {self.ids[index]!r} should be a list as long as its input_ids"
                )
            if mask is not None:
                row[column] = [value for value, real in zip(row[column], mask, strict=True) if real]
            row[column] = row[column][: self.cut]
        return {name: value for name, value in row.items() if value is not None}

    def digest(self) -> str:
        """SHA-256 of everything that is fed to the model, so that a build resumes on the same rows alone."""
        return self._digest

    def scan(self) -> Iterator[tuple[int | str, dict[str, Any]]]:
        digest = hashlib.sha256()
        del self.lengths[:]
        for index, name in enumerate(self.ids):
            row = self[index]
            self.lengths.append(len(row["input_ids"]))
            digest.update(repr(sorted(row.items())).encode())
            yield name, row
        self._digest = digest.hexdigest()


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


_Results = tuple[dict[str, Tensor], dict[str, Tensor]]


class _Shard:
    """Gradients and columns of the rows ``span`` on the host, in the order of ``span``."""

    def __init__(self, rows: Rows, span: range | list[int], dims: Mapping[str, int]) -> None:
        self.rows = rows
        self.places = {row: place for place, row in enumerate(span)}
        self.gradients = {name: torch.empty(len(span), dim) for name, dim in dims.items()}
        self.columns: dict[str, Tensor] = {}

    def put(self, chosen: list[int], results: _Results) -> None:
        gradients, columns = results
        finite = columns["loss"].isfinite()
        if not finite.all():
            name = self.rows.ids[chosen[int(finite.logical_not().nonzero()[0])]]
            raise InputError(f"loss: row {name!r} has a non-finite loss")
        places = torch.tensor([self.places[row] for row in chosen])
        for name, gradient in gradients.items():
            self.gradients[name][places] = gradient.to(self.gradients[name])
        for name, column in columns.items():
            self.columns.setdefault(name, torch.empty(len(self.places), dtype=column.dtype))[places] = column


class _Copies:
    """Copies of results to the host, on a stream beside the one that computes; a CPU's are there already."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def behind(self, results: Iterable[tuple[list[int], _Results]]) -> Iterator[tuple[list[int], _Results]]:
        """What came, one batch late, so that a batch is copied while the next is computed."""
        under_way: deque[tuple[list[int], _Results, Any]] = deque()
        for chosen, found in results:
            under_way.append((chosen, *self._start(found)))
            del found
            while len(under_way) > 1:
                yield self._finish(*under_way.popleft())
        while under_way:
            yield self._finish(*under_way.popleft())

    def _start(self, found: _Results) -> tuple[_Results, Any]:
        if self.stream is None:
            return ({n: t.cpu() for n, t in found[0].items()}, {n: t.cpu() for n, t in found[1].items()}), None
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            # To the CPU without blocking means into pinned memory.
            gradients, columns = ({n: t.to("cpu", non_blocking=True) for n, t in part.items()} for part in found)
        for part in found:
            for tensor in part.values():
                if tensor.is_cuda:
                    tensor.record_stream(self.stream)
        return (gradients, columns), self.stream.record_event()

    @staticmethod
    def _finish(chosen: list[int], found: _Results, event: Any) -> tuple[list[int], _Results]:
        if event is not None:
            event.synchronize()
        return chosen, found


def _loss_kind(loss: str | Loss, rows: Rows) -> str:
    if callable(loss):
        return "custom"
    if loss not in LOSSES:
        raise InputError(f"loss: expected a callable or one of {', '.join(LOSSES)}, got {loss!r}")
    per_token = isinstance(rows[0]["labels"], list)
    if loss == "auto":
        return "causal-lm" if per_token else "classification"
    if per_token != loss.startswith("causal-lm"):
        raise InputError(f"loss: {loss!r} does not fit labels such as {rows[0]['labels']!r}")
    return loss


def _loss(kind: str, capture: GradientCapture) -> Loss:
    if kind == "classification":
        return losses.classification
    return losses.CausalLM(mean=kind == "causal-lm", part=capture.part)


def _check(rows: Rows, model: nn.Module, kind: str) -> None:
    """Everything that can be wrong with a row, before the first forward."""
    longest, vocabulary = _max_length(model), _vocabulary(model)
    classes = getattr(getattr(model, "config", None), "num_labels", None) if kind == "classification" else None
    if classes == 1:
        raise InputError("model: its config has num_labels=1; cross entropy needs at least two classes")
    for name, row in rows.scan():
        ids, labels = row["input_ids"], row["labels"]
        if not ids:
            raise InputError(f"dataset: row {name!r} has no tokens")
        if longest is not None and len(ids) > longest:
            raise InputError(
                f"dataset: row {name!r} has {len(ids)} tokens, the model takes {longest}; truncate=True cuts such rows"
            )
        if vocabulary is not None and not (min(ids) >= 0 and max(ids) < vocabulary):
            bad = next(token for token in ids if not 0 <= token < vocabulary)
            raise InputError(f"dataset: row {name!r} has token id {bad}, the vocabulary ends at {vocabulary - 1}")
        if kind == "classification":
            if isinstance(labels, bool) or not isinstance(labels, int) or (classes and not 0 <= labels < classes):
                raise InputError(
                    f"dataset: row {name!r} has label {labels!r}, expected an int from 0 to {(classes or 0) - 1}"
                )
        elif kind.startswith("causal-lm"):
            targets = [label for label in labels[1:] if label != IGNORED]
            if not targets:
                raise InputError(
                    f"dataset: row {name!r} has no target token (all labels after the first are {IGNORED})"
                )
            if vocabulary is not None and not (min(targets) >= 0 and max(targets) < vocabulary):
                raise InputError(f"dataset: row {name!r} has a label outside 0 .. {vocabulary - 1} and {IGNORED}")


def _vocabulary(model: nn.Module) -> int | None:
    find = getattr(model, "get_input_embeddings", None)
    return getattr(find() if callable(find) else None, "num_embeddings", None)


def _max_length(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name.rsplit(".")[-1]:
            # RoBERTa numbers positions from behind the padding index.
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def token_budget(batch_tokens: int | str, model: nn.Module, path: str | PathLike[str] | None = None) -> int:
    if batch_tokens == "auto":
        return recorded(path, "batch_tokens") or _tokens_in_memory(model)
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise InputError(f"batch_tokens: expected 'auto' or a positive int, got {batch_tokens!r}")
    return batch_tokens


def _tokens_in_memory(model: nn.Module) -> int:
    """Tokens whose activations fill half of the free memory, as a power of two, and no more than are of use."""
    device = device_of(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    # Inputs, outputs and what is between them: twice what enters and leaves the weights, which a backward doubles.
    bytes_per_token = 4 * 4 * max(1, sum(m.in_features + m.out_features for m in linear if m.out_features < 1 << 15))
    most = _GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS
    fitting = _free_memory(device) // 2 // bytes_per_token
    return min(most, 1 << max(4, fitting.bit_length() - 1))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0]) // processes
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // processes


def _sharded(model: nn.Module) -> bool:
    return any(losses.is_sharded(parameter) for parameter in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode, no weight gradients, no key-value cache; everything as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = getattr(model, "config", None)
    cache, pad = getattr(config, "use_cache", None), getattr(config, "pad_token_id", None)
    model.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    if cache is not None:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        if cache is not None:
            config.use_cache = cache  # type: ignore[union-attr]
        if hasattr(config, "pad_token_id"):
            config.pad_token_id = pad  # type: ignore[union-attr]


def batches(rows: Rows, span: Iterable[int], tokens: int) -> list[list[int]]:
    """Rows of one shard, longest first, in batches of at most ``tokens`` tokens with padding (one row at least).

    Cut where it costs least, when a batch costs its padded tokens and ``tokens / 16`` for being one.
    """
    order = sorted(span, key=lambda i: (-rows.lengths[i], i))
    lengths = np.array([rows.lengths[i] for i in order])
    count = len(order)
    cost, begin = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)
    low = 0
    for end in range(1, count + 1):
        while low < end - 1 and lengths[low] * (end - low) > tokens:
            low += 1
        choices = cost[low:end] + lengths[low:end] * (end - np.arange(low, end))
        best = int(choices.argmin())
        cost[end], begin[end] = choices[best] + tokens / 16, low + best
    out, end = [], count
    while end:
        out.append(order[begin[end] : end])
        end = int(begin[end])
    return out[::-1]


def run(
    model: nn.Module,
    capture: GradientCapture,
    loss: Loss,
    rows: Rows,
    span: Iterable[int],
    budget: Budget,
    precision: str | None = None,
) -> Iterator[tuple[list[int], _Results]]:
    """Gradients and columns of every batch of a shard; what does not fit in memory halves the budget of all that is
    left."""
    waiting = batches(rows, span, budget.tokens)[::-1]
    while waiting:
        chosen = waiting.pop()
        results = None
        try:
            results = _step(model, capture, loss, rows, chosen, precision)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if len(chosen) == 1:
                raise InfluenceError(
                    f"row {rows.ids[chosen[0]]!r} ({rows.lengths[chosen[0]]} tokens) does not fit in memory alone"
                ) from error
            if _sharded(model):
                raise InfluenceError(
                    f"a batch of {len(chosen)} rows does not fit in memory, and the ranks of a sharded model cannot "
                    f"halve it on their own: give a batch_tokens below {budget.tokens}"
                ) from error
        if results is None:
            # Outside the handler, so that the failed batch's tensors are free before the halves run.
            capture.clear()
            budget.tokens = min(budget.tokens, rows.lengths[chosen[0]] * len(chosen)) // 2
            _log.warning("out of memory: going on with batches of at most %d tokens", budget.tokens)
            left = [row for batch in (chosen, *waiting) for row in batch]
            waiting = batches(rows, left, budget.tokens)[::-1]
        else:
            yield chosen, results


def autocast(model: nn.Module, precision: str | None) -> AbstractContextManager[Any]:
    """Autocast of the model's device; no context for None."""
    if precision is None:
        return nullcontext()
    if precision not in ("bfloat16", "float16"):
        raise InputError(f"precision: expected None, 'bfloat16' or 'float16', got {precision!r}")
    return torch.autocast(device_of(model).type, getattr(torch, precision))


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _step(
    model: nn.Module, capture: GradientCapture, loss: Loss, rows: Rows, chosen: list[int], precision: str | None
) -> _Results:
    device = device_of(model)
    batch = collate([rows[index] for index in chosen], model)
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    columns: dict[str, Tensor] = {}
    with autocast(model, precision):
        if loss is losses.classification:
            logits = losses.logits(model, batch)
            labels = batch["labels"].to(logits.device)
            each = losses.cross_entropy(logits, labels)
            columns["prediction"] = logits.detach().argmax(-1)
            columns["correct"] = columns["prediction"] == labels
        else:
            each = loss(model, batch)
    if each.shape != (len(chosen),):
        raise InputError(f"loss: expected one value per sample, shape ({len(chosen)},), got {tuple(each.shape)}")
    if each.requires_grad:
        each.sum().backward()
    columns["loss"] = each.detach().float()
    return capture.pop(), columns


def collate(samples: list[dict[str, Any]], model: nn.Module) -> dict[str, Tensor]:
    width = max(len(sample["input_ids"]) for sample in samples)
    config = getattr(model, "config", None)
    fill = getattr(config, "pad_token_id", None)
    if fill is None:
        used = {token for sample in samples for token in sample["input_ids"]}
        fill = next(token for token in range(len(used) + 1) if token not in used)
        if config is not None and not isinstance(samples[0]["labels"], list):
            # Pooling at the last token finds it by looking for pads: any id that no row uses will do.
            config.pad_token_id = fill if fill < (_vocabulary(model) or fill + 1) else 0

    def padded(values: list[int], with_: int) -> list[int]:
        return values + [with_] * (width - len(values))

    batch = {
        column: torch.tensor([padded(s[column], fill if column == "input_ids" else 0) for s in samples])
        for column in _TOKEN_COLUMNS
        if all(column in s for s in samples)
    }
    batch["attention_mask"] = torch.tensor([padded([1] * len(s["input_ids"]), 0) for s in samples])
    if isinstance(samples[0]["labels"], list):
        batch["labels"] = torch.tensor([padded(s["labels"], IGNORED) for s in samples])
    else:
        batch["labels"] = torch.tensor([s["labels"] for s in samples])
    return batch
