"""From influence per layer and query to one score per training sample: lowest = most harmful.

With ``r[l, v, i]`` the rank of sample i among all n for layer l and query v (0 = most harmful, ties get their average):

============  =======================================================================================================
``mean``      mean of ``I[l, v, i]`` over layers and queries
``rank``      mean of ``r[l, v, i]``
``vote``      ``-sum over (l, v) of max(k - r[l, v, i], 0)``, ``k = round(fraction * n)``
``min``       lowest ``I[l, v, i]``
``median``    median of ``I[l, v, i]`` (of an even count: the mean of the middle two)
``trimmed``   mean of ``I[l, v, i]`` without the lowest and the highest ``trim`` share
============  =======================================================================================================

``-c`` behind a name uses only the queries that the model predicts correctly (``rank-c`` and ``vote-c`` are the Rank and
Vote of arXiv 2511.04715). Votes tie often: ``evaluation.metrics.order`` breaks their ties by ``rank``, then by row.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from typing_extensions import TypedDict

from influence_fast import _distributed as processes
from influence_fast import _records as records
from influence_fast import ops
from influence_fast._files import atomic_write, make_folder
from influence_fast.attribution.aggregation_names import METHODS
from influence_fast.attribution.influence_matrix import InfluenceMatrix, Matrix, as_matrix
from influence_fast.errors import InputError, StoreError

_STREAMED = ("mean", "rank", "vote")
_SAVE_SECONDS = 10.0
Layers = Sequence[str] | Mapping[str, float]


def aggregate(
    matrix: Matrix | Mapping[str, Tensor],
    method: str = "rank",
    *,
    fraction: float = 0.2,
    queries: Tensor | Sequence[bool] | Sequence[int] | None = None,
    layers: Layers | None = None,
    trim: float = 0.1,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Tensor:
    """One score per training sample: float64 ``(n,)``, lowest = most harmful.

    Args:
        matrix: an :class:`~influence_fast.InfluenceMatrix`, or ``{layer: (m, n)}``.
        method: see the table above.
        fraction: share of the samples that a layer and query may vote against (``vote``).
        queries: a boolean mask ``(m,)`` or row numbers: only these count. The ``-c`` methods take it for the correctly
            predicted ones; without it they take ``matrix.query_correct``.
        layers: names of the layers that count, or a weight for each (``mean``, ``rank``, ``vote``).
        trim: share cut off at each end (``trimmed``).
        checkpoint: a folder for partial sums of ``rank`` and ``vote``: a job that was stopped goes on from them. They are
            kept until the job is done, and are of no use to another one.

    Raises:
        InputError: unknown method or layer, no query left, values out of range; NaN or infinity names layer and query.
    """
    groups = {"scores": layers if layers is not None else as_matrix(matrix).layers}
    found = aggregate_many(
        matrix, [method], groups, fraction=fraction, queries=queries, trim=trim, checkpoint=checkpoint
    )
    return found["scores"][method]


def aggregate_many(
    matrix: Matrix | Mapping[str, Tensor],
    methods: Iterable[str],
    groups: Mapping[str, Layers] | None = None,
    *,
    fraction: float = 0.2,
    queries: Tensor | Sequence[bool] | Sequence[int] | None = None,
    trim: float = 0.1,
    checkpoint: str | os.PathLike[str] | None = None,
    together: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """``{group: {method: (n,)}}`` for many groups of layers and methods, in one pass over the matrix.

    Arguments and errors as of :func:`aggregate`; ``groups`` is ``{name: layers or weights}``, one of all layers by default.
    With ``together`` every process of the process group calls this alike, takes a share of the layers and queries, and
    returns the whole: ``rank`` and ``vote`` have the bits of one process, ``mean`` may differ in the last one. There is no
    ``checkpoint`` then, and ``min``, ``median`` and ``trimmed`` are computed by each.
    """
    matrix, methods = as_matrix(matrix), list(dict.fromkeys(methods))
    n = matrix.shape[1]
    for method in methods:
        if method not in METHODS:
            raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < fraction <= 1:
        raise InputError(f"fraction: expected a share above 0 and up to 1, got {fraction!r}")
    if not 0 <= trim < 0.5:
        raise InputError(f"trim: expected a share from 0 to below 0.5, got {trim!r}")
    k = round(fraction * n)
    if k == 0 and any(method.startswith("vote") for method in methods):
        raise InputError(f"fraction: {fraction!r} of {n} samples rounds to no vote at all")
    weights = {name: _weights(layers, matrix.layers) for name, layers in (groups or {"all": matrix.layers}).items()}
    chosen = {correct: _mask(matrix, queries, correct) for correct in {method.endswith("-c") for method in methods}}
    out = {group: {method: torch.zeros(n, dtype=torch.float64) for method in methods} for group in weights}
    streamed = [method for method in methods if _base(method) in _STREAMED]
    if streamed:
        if together and checkpoint is not None:
            raise InputError("checkpoint: expected None where processes work together")
        _stream(matrix, streamed, weights, chosen, k, out, checkpoint, processes.here() if together else (0, 1))
    if len(streamed) < len(methods):
        _by_columns(matrix, [method for method in methods if method not in streamed], weights, chosen, trim, out)
    return out


def _stream(
    matrix: Matrix,
    methods: list[str],
    weights: dict[str, dict[str, float]],
    chosen: dict[bool, Tensor],
    k: int,
    out: dict[str, dict[str, Tensor]],
    checkpoint: str | os.PathLike[str] | None,
    place: tuple[int, int],
) -> None:
    """``mean``, ``rank`` and ``vote``: sums over blocks of whole rows; ``mean`` by mean queries where there are some."""
    used = [layer for layer in matrix.layers if any(layer in members for members in weights.values())]
    means = [method for method in methods if _base(method) == "mean"] if isinstance(matrix, InfluenceMatrix) else []
    rank, ranks = place
    for layer in used[rank::ranks] if means else []:
        found = matrix.mean(layer, torch.stack([chosen[method.endswith("-c")] for method in means]))  # type: ignore
        for method, values in zip(means, found, strict=True):
            _add(out, weights, layer, method, values * int(chosen[method.endswith("-c")].sum()))
    summed = [method for method in methods if method not in means]
    if summed:
        _sum_blocks(matrix, summed, weights, chosen, used, k, out, checkpoint, place)
    if ranks > 1:
        for found in out.values():
            for method in methods:
                found[method] = processes.added(found[method])
    for group, members in weights.items():
        for method in methods:
            if _base(method) != "vote":
                out[group][method] /= sum(members.values()) * int(chosen[method.endswith("-c")].sum())


def _add(
    out: dict[str, dict[str, Tensor]], weights: dict[str, dict[str, float]], layer: str, method: str, values: Tensor
) -> None:
    for group, members in weights.items():
        if layer in members:
            out[group][method].add_(values, alpha=members[layer])


def _sum_blocks(
    matrix: Matrix,
    methods: list[str],
    weights: dict[str, dict[str, float]],
    chosen: dict[bool, Tensor],
    used: list[str],
    k: int,
    out: dict[str, dict[str, Tensor]],
    checkpoint: str | os.PathLike[str] | None,
    place: tuple[int, int],
) -> None:
    bases = {_base(method) for method in methods}
    kinds = sorted({method.endswith("-c") for method in methods})
    partial = _Partial(checkpoint, matrix, out, methods, (methods, weights, k, {c: chosen[c].tolist() for c in kinds}))
    rank, ranks = place
    for layer, rows, read in partial.left(itertools.islice(_pieces(matrix), rank, None, ranks), used):
        # Disjoint sets of rows, each ranked once: those of every method, and those of the plain ones alone.
        masks = {c: chosen[c][rows] for c in kinds}
        common = torch.stack(list(masks.values())).all(0)
        sets = [(kinds, common), *(([c], mask & ~common) for c, mask in masks.items())]
        values = some = read()
        _check_finite(values, layer, rows.start)
        for of, keep in sets:
            if not keep.any():
                continue
            some = values if keep.all() else values[keep]
            found: dict[str, Tensor] = {}
            if "mean" in bases:
                found["mean"] = some.sum(0, dtype=torch.float64)
            if bases >= {"rank", "vote"}:
                found["rank"], found["vote"] = ops.rank_and_vote(some, k)
            elif "vote" in bases:
                found["vote"] = ops.vote(some, k)
            elif "rank" in bases:
                found["rank"] = ops.rank_and_vote(some, 1)[0]
            for method in methods:
                if method.endswith("-c") in of:
                    _add(out, weights, layer, method, found[_base(method)])
        # Before the next block is made.
        del values, some
        partial.save(layer, rows)
    partial.remove()


def _pieces(matrix: Matrix) -> Iterator[tuple[str, slice, Callable[[], Tensor]]]:
    """Blocks of the matrix, computed when called."""
    if isinstance(matrix, InfluenceMatrix):
        for layer, rows in matrix.pieces():
            yield layer, rows, functools.partial(matrix.piece, layer, rows)
    else:
        for layer, rows, values in matrix:
            yield layer, rows, functools.partial(lambda block: block, values)


class _Partial:
    """Partial sums in a folder: which blocks are in them, and of what job."""

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        matrix: Matrix,
        out: dict[str, dict[str, Tensor]],
        methods: list[str],
        settings: Any,
    ) -> None:
        self.path = None if folder is None else Path(folder) / "partial.safetensors"
        self.sums = {f"{group}/{method}": out[group][method] for group in out for method in methods}
        self.done: list[list[Any]] = []
        self.saved = time.monotonic()
        if self.path is None:
            return
        if not isinstance(matrix, InfluenceMatrix):
            raise InputError("checkpoint: needs an InfluenceMatrix; influence in memory is summed at once")
        self.job = hashlib.sha256(json.dumps([matrix.digest, settings]).encode()).hexdigest()
        make_folder(self.path.parent)
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        assert self.path is not None
        found, tensors = read_partial(self.path)
        if found["job"] != self.job:
            raise StoreError(f"{self.path}: partial sums of another job; choose another checkpoint folder")
        if {name: sums.shape for name, sums in self.sums.items()} != {n: t.shape for n, t in tensors.items()}:
            raise StoreError(f"{self.path}: damaged partial sums, of other samples; remove them to begin again")
        for name, tensor in tensors.items():
            self.sums[name].copy_(tensor)
        self.done = found["done"]

    def left(
        self, pieces: Iterator[tuple[str, slice, Callable[[], Tensor]]], used: list[str]
    ) -> Iterator[tuple[str, slice, Callable[[], Tensor]]]:
        """Blocks that are not in the sums yet; a block that is partly in them is cut."""
        for layer, rows, read in pieces:
            if layer not in used:
                continue
            begin = max((stop for name, stop in self.done if name == layer), default=0)
            if begin <= rows.start:
                yield layer, rows, read
            elif begin < rows.stop:
                yield (
                    layer,
                    slice(begin, rows.stop),
                    functools.partial(lambda r, skip: r()[skip:], read, begin - rows.start),
                )

    def save(self, layer: str, rows: slice) -> None:
        self.done = [entry for entry in self.done if entry[0] != layer] + [[layer, rows.stop]]
        if self.path is None or time.monotonic() - self.saved < _SAVE_SECONDS:
            return
        entry = {"job": self.job, "done": self.done, "sha256": _digest(self.sums)}
        atomic_write(self.path, save(self.sums, metadata={"sums": records.seal(entry).decode()}))
        self.saved = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class _Entry(TypedDict):
    job: records.Sha256
    done: list[Any]
    sha256: records.Sha256


_ENTRY = records.Schema(_Entry)
_DONE = records.Schema(tuple[records.Text, records.Whole])


def read_partial(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file of partial sums says of itself, and the sums; StoreError where it is damaged."""
    where = f"{path}: its header"
    try:
        with safe_open(path, "pt") as file:
            sealed = (file.metadata() or {})["sums"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        found = records.unseal(where, sealed.encode())
        _ENTRY.check(where, found)
        for pair in found["done"]:
            _DONE.check(f"{where}: done", tuple(pair) if isinstance(pair, list) else pair)
        if _digest(tensors) != found["sha256"]:
            raise StoreError(f"{path}: the sums are not those that were written")
    except (SafetensorError, OSError, KeyError, StoreError, RuntimeError, ValueError) as error:
        raise StoreError(f"{path}: damaged partial sums ({error}); remove them to begin again") from None
    return found, tensors


def aggregated(
    matrix: Matrix | Mapping[str, Tensor],
    aggregations: Sequence[str] | None,
    groups: Mapping[str, Sequence[str]],
    fraction: float,
) -> Iterator[tuple[str, str, Tensor]]:
    """``(group, aggregation, scores)``. A matrix with layers of its own has groups of its own: each layer, and all."""
    there = list(matrix) if isinstance(matrix, Mapping) else matrix.layers
    correct = None if isinstance(matrix, Mapping) else matrix.query_correct
    own = {name: [layer for layer in layers if layer in there] for name, layers in groups.items()}
    own = {name: layers for name, layers in own.items() if layers}
    if not own:
        own = {name: [name] for name in there} | {"all": there}
    suffix = "-c" if correct is not None else ""
    wanted = list(aggregations) if aggregations else ["mean", f"rank{suffix}", f"vote{suffix}"]
    if correct is None:
        wanted = list(dict.fromkeys(name.removesuffix("-c") for name in wanted))
    for group, found in aggregate_many(matrix, wanted, own, fraction=fraction).items():
        for aggregation, values in found.items():
            yield group, aggregation, values


def find_damage(path: Path) -> Iterator[StoreError]:
    """What is wrong with a folder of partial sums."""
    try:
        read_partial(path / "partial.safetensors")
    except StoreError as error:
        yield error


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(str(tensors[name].dtype).encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _by_columns(
    matrix: Matrix,
    methods: list[str],
    weights: dict[str, dict[str, float]],
    chosen: dict[bool, Tensor],
    trim: float,
    out: dict[str, dict[str, Tensor]],
) -> None:
    """``min``, ``median`` and ``trimmed``: they need all values of a training sample at once."""
    for group, members in weights.items():
        if len(set(members.values())) > 1:
            raise InputError(f"layers: weights have no meaning for {methods[0]!r} (group {group!r})")
    for train, values in matrix.columns():
        for layer, block in zip(matrix.layers, values, strict=True):
            _check_finite(block, layer, 0, train.start)
        for group, members in weights.items():
            inside = torch.tensor([layer in members for layer in matrix.layers])
            for method in methods:
                flat = values[inside][:, chosen[method.endswith("-c")]].flatten(0, 1)
                out[group][method][train] = _reduce(flat, _base(method), trim)


def _reduce(values: Tensor, base: str, trim: float) -> Tensor:
    if base == "min":
        return values.amin(0).double()
    ordered = values.sort(0).values
    count = len(ordered)
    if base == "median":
        return (ordered[(count - 1) // 2].double() + ordered[count // 2].double()) / 2
    cut = int(trim * count)
    return ordered[cut : count - cut].mean(0, dtype=torch.float64)


def _base(method: str) -> str:
    return method.removesuffix("-c")


def _check_finite(values: Tensor, layer: str, query: int, train: int = 0) -> None:
    # In one pass that writes nothing of the block's size.
    low, high = values.aminmax(dim=1)
    finite = low.isfinite() & high.isfinite()
    if not finite.all():
        place = int(finite.logical_not().nonzero()[0])
        bad = values[place].isfinite().logical_not().nonzero()
        # A bad query spoils its whole row, a bad training row one place of each.
        if len(bad) < values.shape[1]:
            raise InputError(f"influence: layer {layer!r} has NaN or infinity for training row {train + int(bad[0])}")
        raise InputError(f"influence: layer {layer!r} has NaN or infinity for query {query + place}")


def _weights(layers: Layers, there: list[str]) -> dict[str, float]:
    if isinstance(layers, str):
        raise InputError(f"layers: expected a list of names or a mapping to weights, got the string {layers!r}")
    weights = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, 1.0)
    unknown = [name for name in weights if name not in there]
    if unknown:
        raise InputError(f"layers: no layer is named {unknown[0]!r}; there are {', '.join(there)}")
    if not weights or not all(0 <= weight < float("inf") for weight in weights.values()) or not sum(weights.values()):
        raise InputError(f"layers: expected at least one layer and weights that are not negative, got {layers!r}")
    return {name: float(weight) for name, weight in weights.items()}


def _mask(matrix: Matrix, queries: Tensor | Sequence[bool] | Sequence[int] | None, correct: bool) -> Tensor:
    m = matrix.shape[0]
    if queries is None and correct:
        if matrix.query_correct is None:
            raise InputError("queries: a '-c' method needs to know which queries the model predicts correctly")
        queries = matrix.query_correct
    if queries is None:
        return torch.ones(m, dtype=torch.bool)
    given = torch.as_tensor(queries).cpu()
    if given.dtype == torch.bool and given.shape == (m,):
        mask = given
    elif given.dim() == 1 and not given.dtype.is_floating_point and given.dtype != torch.bool:
        if len(given) and not (int(given.min()) >= 0 and int(given.max()) < m):
            raise InputError(
                f"queries: expected numbers from 0 to {m - 1}, got {int(given.min())} to {int(given.max())}"
            )
        mask = torch.zeros(m, dtype=torch.bool)
        mask[given.long()] = True
    else:
        raise InputError(
            f"queries: expected a boolean mask ({m},) or row numbers, got {given.dtype} {tuple(given.shape)}"
        )
    if not mask.any():
        raise InputError("queries: none is left; the model predicts no query correctly, or the mask is empty")
    return mask
