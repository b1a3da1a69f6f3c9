"""A data set through a model into a gradient store: checks, batches by token budget, losses, resume.

Rows are taken shard by shard. Within a shard they are sorted by length and cut into batches of at most
``batch_tokens`` tokens, padding included; results go back to data-set order before the shard is written, so what a
store holds depends on its settings alone, and a build that was killed goes on from the last whole shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from influence_fast import losses
from influence_fast.capture import GradientCapture
from influence_fast.errors import InfluenceError, InputError
from influence_fast.layers import uncompiled
from influence_fast.losses import IGNORED, Loss
from influence_fast.projection import Projection
from influence_fast.store import GradientStore, StoreWriter

__all__ = ["build_store", "fingerprint"]

LOSSES = ("auto", "classification", "causal-lm", "causal-lm-sum")
_TOKEN_COLUMNS = ("input_ids", "token_type_ids", "position_ids")
_SHARD_BYTES = 256 << 20
_SHARD_ROWS = 1 << 16
_CPU_TOKENS, _GPU_TOKENS = 2048, 16384


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
            modes are put back afterwards.
        dataset: a ``datasets.Dataset`` or sequence of dicts with ``input_ids`` and ``labels`` (an int per row, or one
            per token with -100 where there is no target); ``attention_mask`` and ``token_type_ids`` if there are any.
        layers, projection, bias: see :class:`~influence_fast.GradientCapture`.
        loss: ``auto`` tells by the labels; ``classification`` is cross entropy; ``causal-lm`` the mean and
            ``causal-lm-sum`` the sum of cross entropy over a row's target tokens; or ``loss(model, batch) -> (N,)``.
        batch_tokens: largest number of tokens in a batch, padding included; halved when memory runs out.
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
    projection = Projection.parse(projection) if isinstance(projection, str) else projection
    rows, kind = checked_rows(model, dataset, loss, ids, truncate)
    tokens = _token_budget(batch_tokens, model)
    autocast(model, precision)
    capture = GradientCapture(model, layers, projection, bias=bias)
    if shard_rows == "auto":
        shard_rows = max(1, min(_SHARD_ROWS, _SHARD_BYTES // (4 * sum(capture.dims.values()))))
    elif isinstance(shard_rows, bool) or not isinstance(shard_rows, int) or shard_rows < 1:
        raise InputError(f"shard_rows: expected 'auto' or a positive int, got {shard_rows!r}")
    writer = StoreWriter.create(
        path,
        layers=capture.shapes,
        dims=capture.dims,
        ids=rows.ids,
        projection=str(projection),
        identifiers=capture.identifiers,
        model=fingerprint(model),
        loss=kind if isinstance(loss, str) else getattr(loss, "__qualname__", "custom"),
        dtype=dtype,
        shard_rows=shard_rows,
        settings={
            "data": rows.digest(),
            "batch_tokens": tokens,
            "truncate": truncate,
            "bias": bias,
            "precision": precision,
        },
        resume=resume,
    )
    function = loss if callable(loss) else _loss(kind, capture)
    with (
        _as_evaluated(model),
        writer,
        tqdm(total=len(rows), unit="sample", delay=2, disable=None if progress else True) as bar,
        ThreadPoolExecutor(1) as background,
        capture,
    ):
        writing: Future[None] | None = None
        bar.update(len(rows) - sum(len(writer.span(number)) for number in writer.missing))
        for number in writer.missing:
            span = writer.span(number)
            shard = _Shard({name: torch.empty(len(span), dim) for name, dim in capture.dims.items()}, {})
            for chosen, results in run(model, capture, function, rows, span, tokens, precision):
                shard.put(torch.tensor(chosen) - span.start, *results)
                bar.update(len(chosen))
            if writing is not None:
                writing.result()
            # The next shard is computed while this one is hashed and written; never more than two are in memory.
            writing = background.submit(writer.write, number, shard.gradients, shard.columns)
        if writing is not None:
            writing.result()
    return GradientStore.open(path)


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
        if len(set(self.ids)) != len(self.ids):
            raise InputError("ids: expected no two rows to share one")
        columns = list(dataset[0])
        for needed in ("input_ids", "labels"):
            if needed not in columns:
                raise InputError(f"dataset: column {needed!r} is missing; there are {', '.join(map(repr, columns))}")
        self.lengths: list[int] = []

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
        self.lengths.clear()
        for index, name in enumerate(self.ids):
            row = self[index]
            self.lengths.append(len(row["input_ids"]))
            digest.update(repr(sorted(row.items())).encode())
            yield name, row
        self._digest = digest.hexdigest()


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


@dataclass
class _Shard:
    gradients: dict[str, Tensor]
    columns: dict[str, Tensor]

    def put(self, rows: Tensor, gradients: dict[str, Tensor], columns: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            self.gradients[name][rows] = gradient.to(self.gradients[name])
        for name, column in columns.items():
            total = len(next(iter(self.gradients.values())))
            self.columns.setdefault(name, torch.empty(total, dtype=column.dtype))[rows] = column.cpu()


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


def _token_budget(batch_tokens: int | str, model: nn.Module) -> int:
    if batch_tokens == "auto":
        return _GPU_TOKENS if _device(model).type == "cuda" else _CPU_TOKENS
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise InputError(f"batch_tokens: expected 'auto' or a positive int, got {batch_tokens!r}")
    return batch_tokens


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def _as_evaluated(model: nn.Module) -> Iterator[None]:
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
    span: range,
    tokens: int,
    precision: str | None = None,
) -> Iterator[tuple[list[int], tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    """Gradients and columns of every batch of a shard; a batch that does not fit in memory is halved."""
    waiting = batches(rows, span, tokens)[::-1]
    while waiting:
        chosen = waiting.pop()
        try:
            results = _step(model, capture, loss, rows, chosen, precision)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if len(chosen) == 1:
                raise InfluenceError(
                    f"row {rows.ids[chosen[0]]!r} ({rows.lengths[chosen[0]]} tokens) does not fit in memory alone"
                ) from error
            results = None
        if results is None:
            # Outside the handler, so that the failed batch's tensors are free before the halves run.
            capture.clear()
            half = len(chosen) // 2
            waiting += [chosen[half:], chosen[:half]]
        else:
            yield chosen, results


def autocast(model: nn.Module, precision: str | None) -> AbstractContextManager[Any]:
    """Autocast of the model's device; no context for None."""
    if precision is None:
        return nullcontext()
    if precision not in ("bfloat16", "float16"):
        raise InputError(f"precision: expected None, 'bfloat16' or 'float16', got {precision!r}")
    return torch.autocast(_device(model).type, getattr(torch, precision))


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _step(
    model: nn.Module, capture: GradientCapture, loss: Loss, rows: Rows, chosen: list[int], precision: str | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batch = collate([rows[index] for index in chosen], model)
    batch = {name: tensor.to(_device(model)) for name, tensor in batch.items()}
    columns: dict[str, Tensor] = {}
    with autocast(model, precision):
        if loss is losses.classification:
            logits = losses.logits(model, batch)
            each = losses.cross_entropy(logits, batch["labels"])
            columns["prediction"] = logits.detach().argmax(-1)
            columns["correct"] = columns["prediction"] == batch["labels"]
        else:
            each = loss(model, batch)
    if each.shape != (len(chosen),):
        raise InputError(f"loss: expected one value per sample, shape ({len(chosen)},), got {tuple(each.shape)}")
    finite = each.detach().isfinite()
    if not finite.all():
        raise InputError(
            f"loss: row {rows.ids[chosen[int(finite.logical_not().nonzero()[0])]]!r} has a non-finite loss"
        )
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
