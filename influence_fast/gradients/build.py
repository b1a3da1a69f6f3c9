"""A data set through a model into a gradient store: checks, batches by token budget, losses, resume.

Rows are taken shard by shard. Within a shard they are sorted by length and cut into batches of at most
``batch_tokens`` tokens, padding included; results go back to data-set order before the shard is written, so what a
store holds depends on its settings alone, and a build that was killed goes on from the last whole shard. The ranks
of one job (``torchrun``) take shards in turn. Two shards at most are in memory, whatever the number of rows.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from influence_fast import _distributed as processes
from influence_fast.data.batching import Loss, Rows, batches, checked_rows, token_budget
from influence_fast.data.tasks import device_of
from influence_fast.errors import InfluenceError, InputError
from influence_fast.gradients import losses
from influence_fast.gradients.capture import GradientCapture
from influence_fast.gradients.model_state import as_evaluated, autocast, fingerprint, is_out_of_memory, is_sharded
from influence_fast.gradients.row_checks import check_own_loss, settle_batches
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_writer import StoreWriter, recorded
from influence_fast.ops.projections import Projection

_SHARD_BYTES = 32 << 20
_SHARD_ROWS = 1 << 16

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
            per token with -100 where there is no target; what else a loss takes: below), and any other column that the
            model's forward names. An ``attention_mask`` is passed on, with pads at both ends cut off.
        layers, projection, bias: see :class:`~influence_fast.GradientCapture`.
        loss: ``auto`` is the model's own, told by its head, its config and the labels, and refused where it is none of:
            ``classification`` (cross entropy), ``causal-lm`` and ``causal-lm-sum`` (mean and sum of cross entropy over
            a row's target tokens, each predicted one token before), ``masked-lm`` and ``token-classification`` (the mean,
            each at its own place), ``seq2seq`` (``labels`` of any length, from which the model makes its decoder's
            inputs), ``question-answering`` (``start_positions`` and ``end_positions``), ``multiple-choice``
            (``input_ids`` a list for each choice), ``multi-label`` (a list of 0 and 1) and ``regression`` (a number
            or a list), both the mean over outputs; or ``loss(model, batch) -> (N,)``.
        batch_tokens: largest number of tokens in a batch, padding included. ``auto`` follows from the memory that is
            free when the build begins, and is kept for its resumption. When memory runs out it is halved, for the rest
            of the run. Gradients do not depend on it beyond the rounding of their last bits; two builds are the same
            to the bit where it is the same number and no batch ran out of memory. Where padding or other rows change
            a row's loss, as a few tiny forwards find out, batches hold rows of equal lengths, or one; the log says so.
        ids: names of the rows; their numbers by default.
        dtype: float32, float16, bfloat16 or int8 on disk.
        precision: None runs the model as it is; ``bfloat16`` or ``float16`` runs forward and backward under autocast
            (projections and sums stay float32). float16 loses gradients below 6e-8: prefer bfloat16.
        truncate: cut rows that are longer than the model's context instead of refusing them.

    Returns:
        The finished store, with columns ``loss`` (float32) and, for classes and choices, ``correct`` and ``prediction``.

    Raises:
        InputError: an empty set, a missing column, labels out of range, token ids beyond the vocabulary, rows that are
            empty or longer than the model's context, non-finite losses or gradients (names layer and row).
        StoreError: ``path`` holds a store of another model, projection or data set.
    """
    settings = BuildSettings(
        layers, Projection.parse(projection), loss, batch_tokens, dtype, shard_rows, truncate, bias, precision
    )
    return build_from(path, model, dataset, settings, ids=ids, resume=resume, progress=progress)


def build_from(
    path: str | PathLike[str],
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    settings: BuildSettings,
    *,
    ids: Sequence[int | str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> GradientStore:
    """:func:`build_store` with its settings as one object."""
    job = prepare_job(model, dataset, settings, ids, recorded(path, "batch_tokens"))
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
def _writing(path: str | PathLike[str], job: Job, resume: bool) -> Iterator[StoreWriter]:
    """The store, begun by rank 0 and left by all ranks together."""
    rank, world = processes.here()
    settings = job.store_settings()
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


def gradients_of(
    model: nn.Module, dataset: Sequence[Mapping[str, Any]], layers: Iterable[str], projection: Projection | str
) -> dict[str, Tensor]:
    """Gradients of a few rows, such as one query, in memory: ``{layer: (rows, dim)}`` as :func:`build_store` keeps them."""
    rows, kind = checked_rows(model, dataset)
    with as_evaluated(model), GradientCapture(model, layers, projection) as capture:
        shard = _Shard(rows, range(len(rows)), capture.dims)
        budget, loss = Budget(token_budget("auto", model)), losses.named(kind, capture.part)
        settle_batches(model, rows, loss, budget.tokens)
        for chosen, results in run(model, capture, loss, rows, range(len(rows)), budget):
            shard.put(chosen, results)
    return shard.gradients


@dataclass
class Budget:
    """Most tokens in a batch, padding included. What memory did not hold is not tried again."""

    tokens: int


@dataclass
class Job:
    """A build made concrete: everything but where it is written."""

    model: nn.Module
    rows: Rows
    capture: GradientCapture
    loss: Loss
    kind: str
    budget: Budget
    shard_rows: int
    settings: BuildSettings

    def store_settings(self) -> dict[str, Any]:
        """Arguments of :meth:`StoreWriter.create`."""
        given = self.settings
        return {
            "projection": str(given.projection),
            "loss": getattr(given.loss, "__qualname__", "custom") if callable(given.loss) else self.kind,
            "dtype": given.dtype,
            "settings": {
                "data": self.rows.digest(),
                "batch_tokens": self.budget.tokens,
                "truncate": given.truncate,
                "bias": given.bias,
                "precision": given.precision,
                # Stores of rows that may be padded, as nearly all may, are as they were before anything else was known.
                **({} if self.rows.batching == "padded" else {"batching": self.rows.batching}),
            },
            "layers": self.capture.shapes,
            "dims": self.capture.dims,
            "ids": self.rows.ids,
            "identifiers": self.capture.identifiers,
            "model": fingerprint(self.model),
            "shard_rows": self.shard_rows,
        }

    def step(self, chosen: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return _step(self.model, self.capture, self.loss, self.rows, chosen, self.settings.precision)

    def compute(self, span: range | list[int], advance: Callable[[int], None] = lambda count: None) -> _Shard:
        """Gradients and columns of some rows, in their order."""
        shard = _Shard(self.rows, span, self.capture.dims)
        copies = _Copies(device_of(self.model))
        results = run(self.model, self.capture, self.loss, self.rows, span, self.budget, self.settings.precision)
        for arrived in copies.behind(results):
            shard.put(*arrived)
            advance(len(arrived[0]))
        return shard

    def keep_step(self, spans: list[list[range]]) -> None:
        """Run spare batches until the rank with most is done: the ranks of a sharded model compute together."""
        if not has_shards(self.model):
            return
        counts = [sum(len(batches(self.rows, span, self.budget.tokens)) for span in own) for own in spans]
        spare = [int(np.argmin(self.rows.lengths))]
        for _ in range(max(counts) - counts[processes.here()[0]]):
            self.step(spare)


def prepare_job(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    settings: BuildSettings,
    ids: Sequence[int | str] | None = None,
    earlier_tokens: int | None = None,
) -> Job:
    """Check everything and decide what is left open; an earlier build's ``auto`` batches are kept."""
    rows, kind = checked_rows(model, dataset, settings.loss, ids, settings.truncate)
    autocast(model, settings.precision)
    capture = GradientCapture(model, settings.layers, settings.projection, bias=settings.bias)
    earlier = earlier_tokens if settings.batch_tokens == "auto" else None
    tokens = processes.agree(lambda: earlier or token_budget(settings.batch_tokens, model))
    shard_rows = settings.shard_rows
    if not isinstance(shard_rows, int):
        shard_rows = max(1, min(_SHARD_ROWS, _SHARD_BYTES // (4 * sum(capture.dims.values()))))
    loss = settings.loss if callable(settings.loss) else losses.named(kind, capture.part)
    if rows.ignored:
        _log.warning("dataset: %s does not take %s", type(model).__name__, ", ".join(map(repr, rows.ignored)))
    if settings.loss == "auto":
        check_own_loss(model, rows, loss, settings.precision)
    settle_batches(model, rows, loss, tokens, settings.precision)
    return Job(model, rows, capture, loss, kind, Budget(tokens), shard_rows, settings)


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


def has_shards(model: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in model.parameters())


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
            if not is_out_of_memory(error):
                raise
            if len(chosen) == 1:
                raise InfluenceError(
                    f"row {rows.ids[chosen[0]]!r} ({rows.lengths[chosen[0]]} tokens) does not fit in memory alone"
                ) from error
            if has_shards(model):
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


def _step(
    model: nn.Module, capture: GradientCapture, loss: Loss, rows: Rows, chosen: list[int], precision: str | None
) -> _Results:
    device = device_of(model)
    batch = rows.batch(chosen, model)
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    columns: dict[str, Tensor] = {}
    with autocast(model, precision):
        if loss is losses.classification:
            logits = losses.logits(model, batch)
            labels = batch["labels"].to(logits.device)
            each = losses.one_per_sample(losses.cross_entropy(logits, labels), len(chosen))
            columns["prediction"] = logits.detach().argmax(-1)
            columns["correct"] = columns["prediction"] == labels
        else:
            each = losses.one_per_sample(loss(model, batch), len(chosen))
    if each.requires_grad:
        each.sum().backward()
    columns["loss"] = each.detach().float()
    return capture.pop(), columns
