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
Vote of arXiv 2511.04715). Votes tie often: :func:`order` breaks their ties by ``rank``, then by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from influence_fast import ops
from influence_fast.errors import InputError

BASES = ("mean", "rank", "vote", "min", "median", "trimmed")
METHODS = (*BASES, *(f"{base}-c" for base in BASES))
_STREAMED = ("mean", "rank", "vote")
Layers = Sequence[str] | Mapping[str, float]


class Matrix(Protocol):
    """What is aggregated; :class:`~influence_fast.InfluenceMatrix` is one."""

    @property
    def layers(self) -> list[str]: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def query_correct(self) -> Tensor | None: ...
    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]: ...
    def columns(self) -> Iterator[tuple[slice, Tensor]]: ...


def aggregate(
    matrix: Matrix | Mapping[str, Tensor],
    method: str = "rank",
    *,
    fraction: float = 0.2,
    queries: Tensor | Sequence[bool] | Sequence[int] | None = None,
    layers: Layers | None = None,
    trim: float = 0.1,
) -> Tensor:
    """One score per training sample: float64 ``(n,)``, lowest = most harmful.

    Args:
        matrix: an :class:`~influence_fast.InfluenceMatrix`, or ``{layer: (m, n)}``.
        method: see the table above.
        fraction: share of the samples that a layer and query may vote against (``vote``).
        queries: a boolean mask ``(m,)`` or row numbers: only these count. The ``-c`` methods take it for the correctly
            predicted ones, and without it ask ``matrix.query_correct``.
        layers: names of the layers that count, or a weight for each (``mean``, ``rank``, ``vote``).
        trim: share cut off at each end (``trimmed``).

    Raises:
        InputError: unknown method or layer, no query left, values out of range; NaN or infinity names layer and query.
    """
    groups = {"scores": layers if layers is not None else _wrapped(matrix).layers}
    return aggregate_many(matrix, [method], groups, fraction=fraction, queries=queries, trim=trim)["scores"][method]


def aggregate_many(
    matrix: Matrix | Mapping[str, Tensor],
    methods: Iterable[str],
    groups: Mapping[str, Layers] | None = None,
    *,
    fraction: float = 0.2,
    queries: Tensor | Sequence[bool] | Sequence[int] | None = None,
    trim: float = 0.1,
) -> dict[str, dict[str, Tensor]]:
    """``{group: {method: (n,)}}`` for many groups of layers and methods, in one pass over the matrix.

    Arguments and errors as of :func:`aggregate`; ``groups`` is ``{name: layers or weights}``, one of all layers by default.
    """
    matrix, methods = _wrapped(matrix), list(dict.fromkeys(methods))
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
        _stream(matrix, streamed, weights, chosen, k, out)
    if len(streamed) < len(methods):
        _by_columns(matrix, [method for method in methods if method not in streamed], weights, chosen, trim, out)
    return out


def order(scores: Tensor, tie: Tensor | None = None) -> Tensor:
    """Row numbers from most harmful to most helpful: int64 ``(n,)``, ties by ``tie`` (lowest first), then by row."""
    by_tie = torch.arange(len(scores)) if tie is None else tie.argsort(stable=True)
    return by_tie[scores[by_tie].argsort(stable=True)]


def _stream(
    matrix: Matrix,
    methods: list[str],
    weights: dict[str, dict[str, float]],
    chosen: dict[bool, Tensor],
    k: int,
    out: dict[str, dict[str, Tensor]],
) -> None:
    """``mean``, ``rank`` and ``vote``: sums over blocks of whole rows."""
    needed = {(_base(method), method.endswith("-c")) for method in methods}
    for layer, rows, values in matrix:
        if not any(layer in members for members in weights.values()):
            continue
        _check_finite(values, layer, rows)
        ranks: Tensor | None = None
        for base, correct in needed:
            keep = chosen[correct][rows]
            if not keep.any():
                continue
            if base == "mean":
                part = values[keep].sum(0, dtype=torch.float64)
            elif base == "vote" and not any(b == "rank" for b, _ in needed):
                part = ops.vote(values[keep], k)
            else:
                ranks = ops.rank(values) if ranks is None else ranks
                if base == "rank":
                    part = ranks[keep].sum(0, dtype=torch.float64)
                else:
                    part = (ranks[keep].double() - k).clamp_max_(0).sum(0)
            name = base + ("-c" if correct else "")
            for group, members in weights.items():
                if layer in members:
                    out[group][name] += members[layer] * part
    for group, members in weights.items():
        for method in methods:
            if _base(method) != "vote":
                out[group][method] /= sum(members.values()) * int(chosen[method.endswith("-c")].sum())


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
            _check_finite(block, layer, slice(0, len(block)))
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


def _check_finite(values: Tensor, layer: str, rows: slice) -> None:
    finite = values.isfinite().all(1)
    if not finite.all():
        row = rows.start + int(finite.logical_not().nonzero()[0])
        raise InputError(f"influence: layer {layer!r} has NaN or infinity for query {row}")


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


class InMemory:
    """``{layer: (m, n)}`` with the face of an influence matrix."""

    def __init__(self, values: Mapping[str, Tensor], query_correct: Tensor | None = None) -> None:
        self.query_correct = query_correct
        self.values = {name: torch.as_tensor(value) for name, value in values.items()}
        self.layers = list(self.values)
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        if len(set(shapes.values())) != 1 or any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
            raise InputError(f"matrix: expected layers of one shape (queries, samples), got {shapes}")
        m, n = next(iter(shapes.values()))
        self.shape = (m, n)

    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]:
        for name, value in self.values.items():
            yield name, slice(0, self.shape[0]), value

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self.shape[1]), torch.stack(list(self.values.values()))


def _wrapped(matrix: Matrix | Mapping[str, Tensor]) -> Matrix:
    return InMemory(matrix) if isinstance(matrix, Mapping) else matrix
