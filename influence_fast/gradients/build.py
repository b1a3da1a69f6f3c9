"""A data set through a model into a gradient store: checks, batches by token budget, losses, resume.

Rows are taken shard by shard. Within a shard they are sorted by length and cut into batches of at most
``batch_tokens`` tokens, padding included; results go back to data-set order before the shard is written, so what a
store holds depends on its settings alone, and a build that was killed goes on from the last whole shard. The ranks
of one job (``torchrun``) take shards in turn. Two shards at most are in memory, whatever the number of rows.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from influence_fast import _distributed as processes
from influence_fast._memory import peak_memory
from influence_fast.data.batching import Loss, Rows, batches, checked_rows, collate, device_of, token_budget
from influence_fast.errors import InfluenceError, InputError
from influence_fast.gradients import losses
from influence_fast.gradients.capture import GradientCapture
from influence_fast.gradients.layers import uncompiled
from influence_fast.gradients.store import DTYPES, GradientStore
from influence_fast.gradients.store_writer import StoreWriter, recorded
from influence_fast.ops.projections import Projection

__all__ = ["Estimate", "build_store", "estimate_build", "fingerprint"]

_SHARD_BYTES = 32 << 20
_SHARD_ROWS = 1 << 16
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
        memory_bytes=peak_memory() + held,
        device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


def gradients_of(
    model: nn.Module, dataset: Sequence[Mapping[str, Any]], layers: Iterable[str], projection: Projection | str
) -> dict[str, Tensor]:
    """Gradients of a few rows, such as one query, in memory: ``{layer: (rows, dim)}`` as :func:`build_store` keeps them."""
    rows, kind = checked_rows(model, dataset)
    with as_evaluated(model), GradientCapture(model, layers, projection) as capture:
        shard = _Shard(rows, range(len(rows)), capture.dims)
        budget = Budget(token_budget("auto", model))
        for chosen, results in run(model, capture, _loss(kind, capture), rows, range(len(rows)), budget):
            shard.put(chosen, results)
    return shard.gradients


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
    earlier = recorded(path, "batch_tokens") if batch_tokens == "auto" else None
    tokens = processes.agree(lambda: earlier or token_budget(batch_tokens, model))
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


def _loss(kind: str, capture: GradientCapture) -> Loss:
    if kind == "classification":
        return losses.classification
    return losses.CausalLM(mean=kind == "causal-lm", part=capture.part)


def _sharded(model: nn.Module) -> bool:
    return any(losses.is_sharded(parameter) for parameter in model.parameters())


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
