"""A build made concrete: batches by token budget, losses, shards, resume.

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
from dataclasses import dataclass, replace
from functools import cached_property, partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from influence_fast import _distributed as processes
from influence_fast._memory import GiveBack
from influence_fast.data.batching import Loss, Rows, batches, checked_rows, token_budget
from influence_fast.data.tasks import device_of
from influence_fast.errors import InfluenceError, InputError, StoreError
from influence_fast.gradients import losses
from influence_fast.gradients.adam_updates import AdamUpdates, digest_of
from influence_fast.gradients.capture import GradientCapture
from influence_fast.gradients.differences import Probe, best_rows, difference, probe_difference, recorded_identity
from influence_fast.gradients.factored_layers import factored_layers
from influence_fast.gradients.identity import identity_of, probe_of, tolerance_of
from influence_fast.gradients.layers import select_layers
from influence_fast.gradients.model_state import as_evaluated, autocast, fingerprint, is_out_of_memory, is_sharded
from influence_fast.gradients.row_checks import check_own_loss, settle_batches
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_records import dtype_of
from influence_fast.gradients.store_writer import StoreWriter, recorded_facts

_SHARD_BYTES = 32 << 20
_SHARD_ROWS = 1 << 16

_log = logging.getLogger("influence_fast")
# Gradients and columns of some rows.
_Results = tuple[dict[str, Tensor], dict[str, Tensor]]
# Called with the numbers of a batch's rows, the batch, and a classifier's logits of it ``(N, classes)``.
Watch = Callable[[list[int], dict[str, Tensor], Tensor], None]


def write_store(path: str | PathLike[str], job: Job, resume: bool = True, progress: bool = True) -> GradientStore:
    """Compute and write the shards that are missing; the store, once all are there."""
    model = job.model
    rank, world = processes.here()
    with (
        as_evaluated(model),
        _writing(path, job, resume) as writer,
        tqdm(total=len(job.rows), unit="sample", delay=2, disable=None if progress and rank == 0 else True) as bar,
        ThreadPoolExecutor(1) as background,
        job.capture,
    ):
        writing: Future[None] | None = None
        give_back = GiveBack()
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
            give_back()
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
    # What is there is read once: to the other ranks a manifest that rank 0 has just begun would be an earlier one.
    earlier = processes.agree(lambda: recorded_facts(path))
    now = job.computed_facts(earlier)
    settings = {**job.store_settings(), "facts": {**job.facts, **now}}
    with ExitStack() as stack:
        entered: list[StoreWriter] = []

        def begin() -> None:
            writer = StoreWriter.create(
                path, **settings, resume=resume or rank > 0, leads=rank == 0, together=world > 1
            )
            if earlier is not None and rank == 0:
                job.check_same(path, earlier, now)
            entered.append(stack.enter_context(writer))

        processes.agree(begin)
        if rank > 0:
            begin()
        processes.wait()
        yield entered[0]
        processes.wait()


@dataclass
class Budget:
    """Most tokens in a batch, padding included. What memory did not hold is not tried again."""

    tokens: int
    one_row: bool = False
    """Whether a batch holds one row, whatever its length."""

    def batches(self, rows: Rows, span: Iterable[int]) -> list[list[int]]:
        """The rows of a span in batches."""
        return batches(rows, span, 1 if self.one_row else self.tokens)


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
    facts: dict[str, Any]
    whole_loss: Loss
    """The loss by operations that ``torch.func`` can follow, for layers that autograd differentiates."""
    tokenizer: Any = None
    watch: Watch | None = None
    """Sees the logits of what is computed; not of rows that an earlier build has left in the store."""

    def store_settings(self) -> dict[str, Any]:
        """Arguments of :meth:`StoreWriter.create`."""
        given = self.settings
        return {
            "projection": str(given.projection),
            "loss": getattr(given.loss, "__qualname__", "custom") if callable(given.loss) else self.kind,
            "dtype": given.dtype,
            "factors": given.factors,
            "outs": self._factored(),
            "settings": {
                "data": self.rows.digest(),
                "batch_tokens": self.budget.tokens,
                "truncate": given.truncate,
                "bias": given.bias,
                "precision": given.precision,
                # Stores of rows that may be padded, as nearly all may, are as they were before anything else was known.
                **({} if self.rows.batching == "padded" else {"batching": self.rows.batching}),
                # Absent where the fast way is right, as in stores of version 0.1.
                **({"exact": list(self.capture.exact)} if self.capture.exact or self.budget.one_row else {}),
                **({"one_row": True} if self.budget.one_row else {}),
            },
            "layers": self.capture.shapes,
            "dims": self.capture.dims,
            "ids": self.rows.ids,
            "identifiers": self.capture.identifiers,
            "model": fingerprint(self.model),
            "shard_rows": self.shard_rows,
        }

    def _factored(self) -> dict[str, int]:
        given, shapes = self.settings, self.capture.shapes
        if given.factors is None:
            return {}
        return factored_layers(str(given.projection), shapes, self.capture.dims, given.factors)

    def computed_facts(self, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
        """Identity of what is computed, and a probe of it: of the rows that an earlier build took, else of two."""
        rows = [row["row"] for row in (earlier or {}).get("probe", []) if row["row"] < len(self.rows)]
        if not rows:
            by_length = sorted(range(len(self.rows)), key=lambda i: (self.rows.lengths[i], i))
            rows = sorted({0, by_length[0], by_length[len(by_length) // 2], len(by_length) - 1})
            return {"identity": self.identity, "probe": best_rows(self._probe(rows))}
        return {"identity": self.identity, "probe": self._probe(rows)}

    def check_appends(self, path: str | PathLike[str], manifest: Mapping[str, Any]) -> None:
        """Raise StoreError unless these rows belong behind those of a store."""
        now = self.store_settings()
        layers = {
            name: {"shape": list(shape), "dim": now["dims"][name], "matrices": dict(now["identifiers"].get(name, {}))}
            for name, shape in now["layers"].items()
        }
        there = {
            name: {key: layer[key] for key in ("shape", "dim", "matrices")}
            for name, layer in manifest["layers"].items()
        }
        earlier = {**manifest, "dtype": dtype_of(manifest)}
        found = next(
            (f"another {key}" for key in ("model", "projection", "loss", "dtype") if now[key] != earlier[key]), None
        )
        if found is None and now["factors"] != manifest.get("factors"):
            found = "another number of factors"
        if found is None and layers != there:
            found = "other layers"
        found = found or difference(recorded_identity(manifest), self.identity)
        if found is not None:
            raise StoreError(f"{path}: was built with something else than is appended ({found}); choose a new folder")

    def check_same(self, path: str | PathLike[str], earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Raise StoreError where an earlier build computed something else."""
        names = list(self.capture.dims)
        tolerance, dtype = tolerance_of(self.model, self.settings.precision)
        found = difference(earlier.get("identity", {}), now["identity"])
        probe, again = earlier.get("probe"), now["probe"]
        if found is None and probe is None:
            # Of a version that kept no probe: held against its rows, as far as their dtype goes.
            probe, rounded = _stored_probe(path, [row["row"] for row in again], names)
            again, tolerance = again[: len(probe)], tolerance + rounded
        found = found or probe_difference(probe or [], again, names, tolerance, dtype)
        if found is not None:
            raise StoreError(f"{path}: was built by another computation ({found}); choose a new folder")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells the computation apart."""
        given = self.settings.loss
        found = identity_of(self.model, given if callable(given) else None, self.tokenizer)
        # Absent of plain gradients, as in stores of version 0.1.
        if self.settings.adam is not None:
            found["adam"] = digest_of(self.settings.adam, list(self.capture.dims))
        return found

    def _probe(self, numbers: list[int]) -> Probe:
        """Each row alone, in the way that the build takes."""
        found: list[_Results] = []
        with as_evaluated(self.model), self.capture:
            for number in numbers:
                alone = Budget(self.budget.tokens, one_row=True)
                found += [results for _, results in self._run([number], alone)]
        names = list(self.capture.dims)
        gradients = {name: torch.cat([gradient[name].cpu() for gradient, _ in found]) for name in names}
        return probe_of(numbers, names, gradients, torch.cat([columns["loss"].cpu() for _, columns in found]))

    def _run(
        self, span: Iterable[int], budget: Budget, watch: Watch | None = None
    ) -> Iterator[tuple[list[int], _Results]]:
        precision = self.settings.precision
        return run(self.model, self.capture, self.loss, self.rows, span, budget, precision, self.whole_loss, watch)

    def step(self, chosen: list[int]) -> _Results:
        return _step(self.model, self.capture, self.loss, self.rows, chosen, self.settings.precision, self.whole_loss)

    def compute(self, span: range | list[int], advance: Callable[[int], None] = lambda count: None) -> _Shard:
        """Gradients and columns of some rows, in their order."""
        shard = _Shard(self.rows, span, self.capture.dims)
        copies = _Copies(device_of(self.model))
        results = self._run(span, self.budget, self.watch)
        for arrived in copies.behind(results):
            shard.put(*arrived)
            advance(len(arrived[0]))
        return shard

    def keep_step(self, spans: list[list[range]]) -> None:
        """Run spare batches until the rank with most is done: the ranks of a sharded model compute together."""
        if not has_shards(self.model):
            return
        counts = [sum(len(self.budget.batches(self.rows, span)) for span in own) for own in spans]
        spare = [int(np.argmin(self.rows.lengths))]
        for _ in range(max(counts) - counts[processes.here()[0]]):
            self.step(spare)


class _AdamCapture(AdamUpdates, GradientCapture):
    """A capture of Adam's updates."""


def prepare_job(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    settings: BuildSettings,
    ids: Sequence[int | str] | None = None,
    earlier_tokens: int | None = None,
    facts: dict[str, Any] | None = None,
    tokenizer: Any = None,
    watch: Watch | None = None,
) -> Job:
    """Check everything and decide what is left open; an earlier build's ``auto`` batches are kept."""
    rows, kind = checked_rows(model, dataset, settings.loss, ids, settings.truncate)
    autocast(model, settings.precision)
    settings = replace(settings, layers=select_layers(model, settings.layers))
    earlier = earlier_tokens if settings.batch_tokens == "auto" else None
    tokens = processes.agree(lambda: earlier or token_budget(settings.batch_tokens, model))
    capture: GradientCapture
    if settings.adam is None:
        capture = GradientCapture(model, **settings.of_capture)
    else:
        capture = _AdamCapture(model, settings.adam, **settings.of_capture)
    shard_rows = settings.shard_rows
    if not isinstance(shard_rows, int):
        shard_rows = max(1, min(_SHARD_ROWS, _SHARD_BYTES // (4 * sum(capture.dims.values()))))
    loss = settings.loss if callable(settings.loss) else losses.named(kind, capture.part)
    whole_loss = settings.loss if callable(settings.loss) else losses.named(kind, chunked=False)
    if rows.ignored:
        _log.warning("dataset: %s does not take %s", type(model).__name__, ", ".join(map(repr, rows.ignored)))
    if settings.loss == "auto":
        check_own_loss(model, rows, loss, settings.precision)
    settle_batches(model, rows, loss, tokens, settings.precision)
    budget = Budget(tokens, settings.one_row)
    return Job(
        model, rows, capture, loss, kind, budget, shard_rows, settings, facts or {}, whole_loss, tokenizer, watch
    )


# How far a row that was rounded to a store's dtype may be from itself.
_ROUNDED = {"int4": 0.5, "int8_block": 5e-2, "int8": 5e-2, "bfloat16": 1e-2, "float16": 2e-3}


def _stored_probe(path: str | PathLike[str], numbers: Sequence[int], names: Sequence[str]) -> tuple[Probe, float]:
    """The probe that a finished store of a version without one would have, and how far its dtype rounds; else nothing."""
    try:
        store = GradientStore.open(path)
    except StoreError:
        return [], 0.0
    gradients = {name: store.read(name, numbers) for name in names}
    return probe_of(numbers, names, gradients, store.column("loss")[numbers]), _ROUNDED.get(store.meta["dtype"], 0.0)


class _Shard:
    """Gradients and columns of the rows ``span`` on the host, in the order of ``span``."""

    def __init__(self, rows: Rows, span: range | list[int], dims: Mapping[str, int]) -> None:
        self.rows = rows
        self.places = {row: place for place, row in enumerate(span)}
        self.gradients = {
            name: torch.empty(len(span), dim, dtype=torch.float32, device="cpu") for name, dim in dims.items()
        }
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
            self.columns.setdefault(name, torch.empty(len(self.places), dtype=column.dtype, device="cpu"))[places] = (
                column
            )


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
    whole_loss: Loss | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[list[int], _Results]]:
    """Gradients and columns of every batch of a shard; what does not fit in memory halves the budget of all that is
    left."""
    waiting = budget.batches(rows, span)[::-1]
    while waiting:
        chosen = waiting.pop()
        results = None
        try:
            results = _step(model, capture, loss, rows, chosen, precision, whole_loss, watch)
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
            waiting = budget.batches(rows, left)[::-1]
        else:
            yield chosen, results


def _step(
    model: nn.Module,
    capture: GradientCapture,
    loss: Loss,
    rows: Rows,
    chosen: list[int],
    precision: str | None,
    whole_loss: Loss | None,
    watch: Watch | None = None,
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
            if watch is not None:
                watch(chosen, batch, logits.detach())
        else:
            each = losses.one_per_sample(loss(model, batch), len(chosen))
    if each.requires_grad:
        each.sum().backward()
    with autocast(model, precision):
        capture.differentiate(whole_loss or loss, batch)
    columns["loss"] = each.detach().float()
    return capture.pop(), columns
