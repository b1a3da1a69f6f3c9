"""Rows of tokens checked before the first forward, and cut into batches by a budget of tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from influence_fast._memory import free_memory
from influence_fast.data.tasks import (
    CLASS_LOSSES,
    IGNORED,
    LOSSES,
    SPAN,
    TARGETS,
    TOKEN_LOSSES,
    VOCABULARY_LOSSES,
    config_of,
    device_of,
    head_config,
    head_of,
    inputs_of,
    is_packed,
    longest_row,
    loss_of,
)
from influence_fast.errors import InputError

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
# How rows may share a batch: padded to the longest, with others of their length, or not at all.
PADDED, EQUAL_LENGTHS, ONE_ROW = "padded", "equal lengths", "one row"
_TOKEN_COLUMNS = ("input_ids", "token_type_ids", "position_ids")
# Columns of a data set that no model takes and nobody misses.
_NO_INPUTS = ("text", "label", "id", "idx", "length", "noise")
# Rows that tell which columns have one entry a token.
_SAMPLED = 64
# Where more tokens in a batch are no faster: activations leave a CPU's caches, and a GPU is busy.
_CPU_TOKENS, _GPU_TOKENS = 2048, 65536


def checked_rows(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    loss: str | Loss = "auto",
    ids: Sequence[int | str] | None = None,
    truncate: bool = False,
) -> tuple[Rows, str]:
    """The rows of a data set and the kind of loss that they call for; InputError names the first row that will not do.

    Rows that were checked before are handed back as they are, with the kind of then.
    """
    if isinstance(dataset, Rows) and dataset.kind:
        return dataset, dataset.kind
    if hasattr(dataset, "iterrows"):
        dataset = cast(Any, dataset).to_dict("records")
    elif not hasattr(dataset, "__len__"):
        # A stream of unknown length is read to its end.
        dataset = list(dataset)
    # A loss of one's own may name columns that it reads beside what the forward takes.
    inputs = inputs_of(model) | set(getattr(loss, "columns", ()))
    rows = Rows(dataset, ids, longest_row(model) if truncate else None, inputs, head_of(model) == "multiple-choice")
    kind = _loss_kind(loss, model, rows)
    rows.kind = kind
    _check(rows, model, kind)
    return rows, kind


class Rows:
    """The data set as clean samples: pads cut off, ids and labels as lists.

    A row holds what the model takes of its columns and what the loss needs. Columns with one entry a token are cut with the
    tokens; further ones than token ids, types and positions are tensors. ``attention_mask`` is there where it says more than
    which tokens are pads. The choices of a multiple-choice row are a list of rows under ``choices``.

    Attributes:
        kind: of the loss, once rows are checked.
        lengths: tokens of each row (all its choices; inputs and targets of seq2seq), and ``shapes``, a number that rows
            of equal lengths share; once they are scanned.
        fill: token id of pads, used by no row unless it is the model's own; None where every id is in use.
        side: where pads go, ``right`` or ``left``.
        together: which rows may share a batch, ``PADDED``, ``EQUAL_LENGTHS`` or ``ONE_ROW``.
        ignored: columns that the model does not take.
        several: whether a list of lists of token ids is one of choices, even where there is one.
    """

    def __init__(
        self,
        dataset: Sequence[Mapping[str, Any]],
        ids: Sequence[int | str] | None,
        cut: int | None = None,
        inputs: frozenset[str] = frozenset(_TOKEN_COLUMNS),
        several: bool = True,
    ) -> None:
        self.dataset = dataset
        self.cut, self.several = cut, several
        if len(dataset) == 0:
            raise InputError("dataset: expected at least one row, got none")
        self.ids: Sequence[int | str] = range(len(dataset)) if ids is None else ids
        if len(self.ids) != len(dataset):
            raise InputError(f"ids: expected one for each of the {len(dataset)} rows, got {len(self.ids)}")
        if ids is not None and len(set(ids)) != len(ids):
            seen: dict[int | str, int] = {}
            twice = next(row for row, name in enumerate(ids) if seen.setdefault(name, row) != row)
            raise InputError(
                f"ids: expected no two rows to share one, and rows {seen[ids[twice]]} and {twice} are both {ids[twice]!r}"
            )
        first = dataset[0]
        if "input_ids" not in first or ("labels" not in first and not set(SPAN) <= set(first)):
            needed = "labels" if "input_ids" in first else "input_ids"
            raise InputError(f"dataset: column {needed!r} is missing; there are {', '.join(map(repr, first))}")
        self._taken = inputs | {*TARGETS, "attention_mask", "input_ids"}
        self.ignored = [
            name
            for name, value in first.items()
            if name not in self._taken and name not in _NO_INPUTS and not isinstance(value, str | None)
        ]
        self.kind = ""
        self.lengths, self.shapes = array("l"), array("l")
        self.fill: int | None = None
        self.side, self.together = "right", PADDED
        self._per_token = self._columns_per_token()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._raw(index)
        mask = row.pop("attention_mask", None)
        if not isinstance(row.get("input_ids"), list):
            raise InputError(f"dataset: 'input_ids' of row {self.ids[index]!r} should be a list of token ids")
        if row["input_ids"] and isinstance(row["input_ids"][0], list):
            return self._with_choices(index, row, mask)
        self._cut_pads(index, row, mask)
        labels = row.get("labels")
        if self.kind in ("regression", "multi-label") and labels is not None:
            numbers = labels if isinstance(labels, list) else [labels]
            if all(isinstance(number, int) for number in numbers):
                row["labels"] = list(map(float, labels)) if isinstance(labels, list) else float(labels)
        return row

    def _raw(self, index: int) -> dict[str, Any]:
        given = self.dataset[index]
        row = {name: value for name, value in given.items() if name in self._taken and value is not None}
        listed = (*_TOKEN_COLUMNS, *TARGETS, "attention_mask")
        row = {name: _listed(value) if name in listed else torch.as_tensor(value) for name, value in row.items()}
        ids = row.get("input_ids")
        if not self.several and isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
            # A tokenizer's return_tensors makes a batch of one of each row.
            row = {name: value[0] if _length(value) == 1 else value for name, value in row.items()}
        return row

    def _columns_per_token(self) -> frozenset[str]:
        """Columns, beyond the usual, that have one entry a token in each of some rows."""
        count = len(self.dataset)
        found = [self._raw(index) for index in range(0, count, -(-count // _SAMPLED))]
        candidates = set().union(*found) - {*_TOKEN_COLUMNS, *SPAN, "attention_mask"}
        return frozenset(_TOKEN_COLUMNS) | {
            name
            for name in candidates
            if all(_length(row.get(name)) == _length(row.get("input_ids")) for row in found)
            # Tokens of the decoder are counted by themselves.
            and not name.startswith("decoder_")
        }

    def _is_per_token(self, name: str) -> bool:
        known = name == "labels" and self.kind not in ("", "custom")
        return self.kind in (*TOKEN_LOSSES, "preference") if known else name in self._per_token

    def _cut_pads(self, index: int, row: dict[str, Any], mask: list[int] | None) -> None:
        """Take the pads off both ends of the columns with one entry a token, and what is behind the cut."""
        length = len(row["input_ids"])
        columns = [name for name in row if self._is_per_token(name)]
        for name in columns:
            if isinstance(row[name], int | float) or len(row[name]) != length:
                raise InputError(
                    f"dataset: {name!r} of row {self.ids[index]!r} should be a list as long as its input_ids"
                )
        begin, end = 0, length
        if mask is not None:
            if len(mask) != length:
                raise InputError(
                    f"dataset: 'attention_mask' of row {self.ids[index]!r} should be a list as long as its input_ids"
                )
            begin = next((place for place, real in enumerate(mask) if real), length)
            end = length - next((place for place, real in enumerate(reversed(mask)) if real), length)
        end = end if self.cut is None else min(end, begin + self.cut)
        for name in columns:
            row[name] = row[name][begin:end]
        if mask is not None and any(value != 1 for value in mask[begin:end]):
            row["attention_mask"] = mask[begin:end]
        if begin:
            row.update({name: row[name] - begin for name in SPAN if isinstance(row.get(name), int)})
        if self.kind == "seq2seq" and isinstance(row.get("labels"), list):
            row["labels"] = row["labels"][: self.cut]

    def _with_choices(self, index: int, row: dict[str, Any], mask: Any) -> dict[str, Any]:
        name, count = self.ids[index], len(row["input_ids"])
        if self.kind not in ("multiple-choice", "preference", "custom", ""):
            raise InputError(f"dataset: 'input_ids' of row {name!r} is a list of lists; expected one list of token ids")
        of_choices = (*_TOKEN_COLUMNS, "labels") if self.kind == "preference" else _TOKEN_COLUMNS
        columns = [column for column in of_choices if column in row]
        if any(len(row[column]) != count for column in columns) or (mask is not None and len(mask) != count):
            raise InputError(f"dataset: row {name!r} should have as many lists in each column as choices, {count}")
        choices = [{column: row[column][choice] for column in columns} for choice in range(count)]
        for choice, part in enumerate(choices):
            self._cut_pads(index, part, None if mask is None else mask[choice])
        return {**{column: value for column, value in row.items() if column not in columns}, "choices": choices}

    def digest(self) -> str:
        """SHA-256 of everything that is fed to the model, so that a build resumes on the same rows alone."""
        return self._digest

    def scan(self) -> Iterator[tuple[int | str, dict[str, Any]]]:
        digest = hashlib.sha256()
        del self.lengths[:], self.shapes[:]
        known: dict[tuple[int, ...], int] = {}
        for index, name in enumerate(self.ids):
            row = self[index]
            self.lengths.append(self._tokens(row))
            self.shapes.append(known.setdefault(self._shape(row), len(known)))
            tensors = {column: value for column, value in row.items() if isinstance(value, Tensor)}
            digest.update(repr(sorted((c, v) for c, v in row.items() if c not in tensors)).encode())
            for column, value in sorted(tensors.items()):
                digest.update(f"{column} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
            yield name, row
        self._digest = digest.hexdigest()

    def _shape(self, row: dict[str, Any]) -> tuple[int, ...]:
        """The lengths of what is padded: tokens, those of each choice, and whatever else differs between rows."""
        tokens = [len(part["input_ids"]) for part in row.get("choices", [row])]
        beside = [name for name in row if name not in ("choices", "attention_mask") and not self._is_per_token(name)]
        return (*tokens, *(_length(row[name]) or 0 for name in sorted(beside)))

    def _tokens(self, row: dict[str, Any]) -> int:
        """Tokens of a row that is padded to its own longest choice; with seq2seq those of the decoder too."""
        parts = row.get("choices", [row])
        beside = (_length(row.get("labels")) or 0) if self.kind == "seq2seq" else 0
        return len(parts) * max((len(part["input_ids"]) for part in parts), default=0) + beside

    @property
    def batching(self) -> str:
        """How rows are put into batches, in words: ``padded``, ``padded left``, ``equal lengths`` or ``one row``."""
        return f"{PADDED} left" if (self.together, self.side) == (PADDED, "left") else self.together

    def batch(self, chosen: Iterable[int], model: nn.Module) -> dict[str, Tensor]:
        """Some rows as a batch for the model."""
        return collate([self[index] for index in chosen], model, self.fill, self.side)


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


def _length(value: Any) -> int | None:
    """Entries of a list or a tensor; None of anything else."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    return len(value) if isinstance(value, list) else None


def _loss_kind(loss: str | Loss, model: nn.Module, rows: Rows) -> str:
    if callable(loss):
        return getattr(loss, "kind", "custom")
    if loss not in LOSSES:
        raise InputError(f"loss: expected a callable or one of {', '.join(LOSSES)}, got {loss!r}")
    first = rows[0]
    if loss == "auto":
        return loss_of(model, first)
    labels = first.get("labels")
    fits = isinstance(labels, list)
    if loss in CLASS_LOSSES:
        fits = not fits
    elif loss == "preference":
        fits = fits and isinstance(labels, list) and list(map(type, labels)) == [list, list]
    elif loss == "regression":
        fits = labels is not None
    elif loss == "question-answering":
        fits = all(name in first for name in SPAN)
    if not fits:
        given = {name: first[name] for name in SPAN if name in first} if labels is None else labels
        raise InputError(f"loss: {loss!r} does not fit labels such as {given!r}")
    return loss


def _check(rows: Rows, model: nn.Module, kind: str) -> None:
    """Everything that can be wrong with a row, before the first forward; and a token id for pads."""
    longest, vocabulary = longest_row(model), _vocabulary(model)
    # Any other head need not have as many outputs as the config says.
    counted = kind == "classification" or head_of(model) in ("classification", "token-classification")
    outputs = getattr(head_config(model), "num_labels", None) if counted else None
    if kind == "classification" and outputs == 1:
        raise InputError("model: its config has num_labels=1; cross entropy needs at least two classes")
    used: set[int] = set()
    first: dict[str, Any] = {}
    for name, row in rows.scan():
        first = first or row
        if lacking := (set(row) ^ set(first)) - {"attention_mask"}:
            column = min(lacking)
            which = (name, rows.ids[0]) if column in first else (rows.ids[0], name)
            raise InputError(f"dataset: row {which[0]!r} has no {column!r}, as row {which[1]!r} has")
        for ids in [part["input_ids"] for part in row.get("choices", [row])]:
            if not ids:
                raise InputError(f"dataset: row {name!r} has no tokens")
            if longest is not None and len(ids) > longest:
                raise InputError(
                    f"dataset: row {name!r} has {len(ids)} tokens, the model takes {longest}; "
                    "truncate=True cuts such rows"
                )
            if vocabulary is not None and not (min(ids) >= 0 and max(ids) < vocabulary):
                bad = next(token for token in ids if not 0 <= token < vocabulary)
                raise InputError(f"dataset: row {name!r} has token id {bad}, the vocabulary ends at {vocabulary - 1}")
            used.update(ids)
        _check_targets(name, row, kind, outputs, vocabulary)
        if "choices" in row and len(row["choices"]) != len(first["choices"]):
            raise InputError(
                f"dataset: row {name!r} has {len(row['choices'])} choices, row {rows.ids[0]!r} {len(first['choices'])}"
            )
    own = _pad_id(model)
    free = (token for token in range(len(used) + 1) if token not in used and (vocabulary is None or token < vocabulary))
    rows.fill = next(free, None) if own is None else own


def _check_targets(
    name: int | str, row: dict[str, Any], kind: str, outputs: int | None, vocabulary: int | None
) -> None:
    labels = row.get("labels")
    if kind == "preference":
        if len(row.get("choices", [])) != 2:
            raise InputError(
                f"dataset: 'input_ids' of row {name!r} should be two lists, of the chosen and the rejected answer"
            )
        for part in row["choices"]:
            _check_targets(name, part, "causal-lm", outputs, vocabulary)
        return
    if kind in CLASS_LOSSES:
        classes = len(row["choices"]) if "choices" in row else outputs if kind == "classification" else None
        if kind == "multiple-choice" and classes is None:
            raise InputError(f"dataset: 'input_ids' of row {name!r} should be a list of token ids for each choice")
        if isinstance(labels, bool) or not isinstance(labels, int) or (classes and not 0 <= labels < classes):
            raise InputError(
                f"dataset: row {name!r} has label {labels!r}, expected an int from 0 to {(classes or 0) - 1}"
            )
    elif kind in TOKEN_LOSSES or kind == "seq2seq":
        if not isinstance(labels, list):
            raise InputError(f"dataset: row {name!r} has labels {labels!r}, expected a list of them")
        shifted = kind.startswith("causal-lm")
        targets = [label for label in labels[shifted:] if label != IGNORED]
        if not targets:
            where = "all labels after the first" if shifted else "all labels"
            raise InputError(f"dataset: row {name!r} has no target token ({where} are {IGNORED})")
        limit = vocabulary if kind in VOCABULARY_LOSSES else outputs
        if limit is not None and not (min(targets) >= 0 and max(targets) < limit):
            raise InputError(f"dataset: row {name!r} has a label outside 0 .. {limit - 1} and {IGNORED}")
    elif kind == "question-answering":
        for column in SPAN:
            place, length = row.get(column), len(row["input_ids"])
            if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < length:
                raise InputError(
                    f"dataset: row {name!r} has {column} {place!r}, expected an int from 0 to {length - 1}"
                )
    elif kind in ("regression", "multi-label"):
        values: list[Any] = labels if isinstance(labels, list) else [labels]
        if not all(isinstance(value, int | float) for value in values) or (outputs or len(values)) != len(values):
            raise InputError(
                f"dataset: row {name!r} has labels {labels!r}, expected {outputs or 'some'} numbers for {kind}"
            )
        if kind == "multi-label" and not all(0 <= value <= 1 for value in values):
            raise InputError(f"dataset: row {name!r} has labels {labels!r}, expected numbers from 0 to 1")


def _pad_id(model: nn.Module) -> int | None:
    """The model's own id for pads, if it is one of its vocabulary."""
    own, vocabulary = getattr(config_of(model), "pad_token_id", None), _vocabulary(model)
    return own if isinstance(own, int) and 0 <= own < (vocabulary or own + 1) else None


def _vocabulary(model: nn.Module) -> int | None:
    find = getattr(model, "get_input_embeddings", None)
    try:
        table = find() if callable(find) else None
    except NotImplementedError:
        # Models without one table of words, such as those of characters.
        return None
    return getattr(table, "num_embeddings", None)


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


def batches(rows: Rows, span: Iterable[int], tokens: int) -> list[list[int]]:
    """Rows of one shard, longest first, in batches of at most ``tokens`` tokens with padding (one row at least).

    Cut where it costs least, when a batch costs its padded tokens and ``tokens / 16`` for being one. Rows that change
    with the padding beside them are batched with those of their length, or alone, as ``rows.together`` says.
    """
    order = sorted(span, key=lambda i: (-rows.lengths[i], i))
    if rows.together == ONE_ROW:
        return [[row] for row in order]
    if rows.together == EQUAL_LENGTHS:
        return _alike(rows, order, tokens)
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


def _alike(rows: Rows, order: Iterable[int], tokens: int) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row in order:
        groups.setdefault(rows.shapes[row], []).append(row)
    out = []
    for group in groups.values():
        most = max(1, tokens // rows.lengths[group[0]])
        out += [group[begin : begin + most] for begin in range(0, len(group), most)]
    return out


def collate(
    samples: list[dict[str, Any]], model: nn.Module, fill: int | None = None, side: str = "right"
) -> dict[str, Tensor]:
    """Samples as one padded batch, with an ``attention_mask``.

    ``fill`` is the token id of pads; by default the model's own, or one that no sample uses. Tokens are padded at ``side``,
    whatever else differs in length at the right.
    """
    parts = [choice for sample in samples for choice in sample.get("choices", [sample])]
    vocabulary, own = _vocabulary(model), _pad_id(model)
    if fill is None:
        used = {token for part in parts for token in part["input_ids"]}
        free = (token for token in range(len(used) + 1) if token not in used and token < (vocabulary or token + 1))
        fill = next(free, None) if own is None else own
    config = config_of(model)
    if own is None and fill is not None and config is not None:
        # Pooling at the last token finds it by looking for pads: any id that no row uses will do.
        config.pad_token_id = fill
    batch = {}
    # Of a pair of answers each has its own labels.
    beside = [name for name in TARGETS if name not in parts[0] or len(parts) == len(samples)]
    for name in parts[0]:
        if name == "labels" and name not in beside:
            batch[name] = _padded(parts, name, IGNORED, side, model)
        elif name not in (*TARGETS, "attention_mask"):
            batch[name] = _padded(parts, name, (fill or 0) if name.endswith("input_ids") else 0, side, model)
    masked = [{**part, "attention_mask": part.get("attention_mask") or [1] * len(part["input_ids"])} for part in parts]
    if not any(map(is_packed, parts)):
        # Texts of one row are told apart by positions that begin anew, which counts where there is no mask alone.
        batch["attention_mask"] = _padded(masked, "attention_mask", 0, side, model)
    if len(parts) > len(samples):
        batch = {name: tensor.unflatten(0, (len(samples), -1)) for name, tensor in batch.items()}
        others = [name for name in samples[0] if name not in (*TARGETS, "choices", "attention_mask")]
        batch |= {name: _padded(samples, name, 0, "right", model) for name in others}
    return batch | {name: _padded(samples, name, IGNORED, side, model) for name in beside if name in samples[0]}


def _padded(parts: Sequence[Mapping[str, Any]], name: str, fill: int, side: str, model: nn.Module) -> Tensor:
    """One column as a tensor; entries beside the tokens get pads where the tokens do, the others at the right."""
    values = [part[name] for part in parts]
    kind = None
    if torch.as_tensor(values[0]).is_floating_point():
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        # A label is compared in float32 or wider.
        kind = kind if name not in TARGETS else torch.promote_types(kind, torch.float32)
    if not any(isinstance(value, Tensor) for value in values):
        sizes = {_length(value) for value in values}
        if len(sizes) == 1:
            return torch.tensor(values, dtype=kind)
        if not isinstance(values[0][0], list):
            # Lists of numbers, as nearly all columns are: padded as lists they become one tensor at once.
            width, left = max(map(len, values)), side == "left" and _beside_tokens(parts, name)
            gaps = [[fill] * (width - len(value)) for value in values]
            rows = [gap + value if left else value + gap for gap, value in zip(gaps, values, strict=True)]
            return torch.tensor(rows, dtype=kind)
    tensors = [torch.as_tensor(value, dtype=kind) for value in values]
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        return torch.stack(tensors)
    where = side if _beside_tokens(parts, name) else "right"
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=where)


def _beside_tokens(parts: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(_length(part[name]) == _length(part.get("input_ids")) for part in parts)


def mask_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The ``attention_mask (N, T)`` of a batch; without one (packed rows) the zeros that positions end in are pads."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask
    return ((batch["position_ids"] != 0).flip(-1).cumsum(-1).flip(-1) > 0).long()


def extent(mask: Tensor) -> Tensor:
    """Of an ``attention_mask (N, T)``, which positions are no padding: from a row's first real token to its last."""
    real = mask != 0
    return (real.cumsum(-1) > 0) & (real.flip(-1).cumsum(-1).flip(-1) > 0)
