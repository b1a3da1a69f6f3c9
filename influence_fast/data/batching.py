"""Rows of tokens checked before the first forward, and cut into batches by a budget of tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_fast._memory import free_memory
from influence_fast.errors import InputError

# Label of a token that is no target.
IGNORED = -100
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
LOSSES = ("auto", "classification", "causal-lm", "causal-lm-sum")
_TOKEN_COLUMNS = ("input_ids", "token_type_ids", "position_ids")
# Where more tokens in a batch are no faster: activations leave a CPU's caches, and a GPU is busy.
_CPU_TOKENS, _GPU_TOKENS = 2048, 65536


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


def token_budget(batch_tokens: int | str, model: nn.Module) -> int:
    """Tokens of a batch, padding included: as given, or for ``auto`` what fits in memory."""
    if batch_tokens == "auto":
        return _tokens_in_memory(model)
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
    fitting = free_memory(device) // 2 // bytes_per_token
    return min(most, 1 << max(4, fitting.bit_length() - 1))


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


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
