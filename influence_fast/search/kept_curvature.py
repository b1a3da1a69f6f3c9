"""Curvature beside an index: what queries are preconditioned by, so that the same index answers other methods.

A file ``curvature-00000.safetensors``, ... holds one layer's for one method (``attribution/curvature.py``); ``index.json``
names it with its checksums and with what rows it is of. It is read when it is first asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from influence_fast._files import atomic_path
from influence_fast.attribution.curvature import METHODS, Factors, LayerCurvature, Together, alone
from influence_fast.attribution.preconditioners import Damping, damping_by_layer
from influence_fast.errors import InputError, StoreError
from influence_fast.search.index_files import IndexFolder, check_files, describe
from influence_fast.search.stored_rows import Rows

FILE = "curvature-{:05d}.safetensors"
_BLOCK_BYTES = 32 << 20
_log = logging.getLogger("influence_fast")


@dataclass
class _Kept:
    """One layer's curvature for one method: in memory, in a file, or in both."""

    of: str
    damping: float
    share: float
    curvature: LayerCurvature | None
    path: Path | None = None
    about: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Preconditioned:
    """What a search is made with in place of the queries.

    Attributes:
        values: float32 ``(m, dims of the layers)``.
        queries: float64 ``(m,)`` that the scores of each query are divided by, or None.
        rows: float64 ``(rows,)`` that the scores of each row are divided by, or None.
    """

    values: Tensor
    queries: Tensor | None = None
    rows: np.ndarray | None = None


class Curvatures:
    """All curvature of one index, by method and layer; safe to ask from any number of threads."""

    def __init__(self, verify: bool = True) -> None:
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._lengths: dict[Any, np.ndarray] = {}
        self._verify = verify
        self._lock = RLock()

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """By method and layer, the share of the trace that is kept."""
        out: dict[str, dict[str, float]] = {}
        for (method, layer), kept in self._kept.items():
            out.setdefault(method, {})[layer] = kept.share
        return out

    def make(
        self,
        method: str,
        rows: Rows,
        layers: Sequence[str],
        of: str,
        damping: Damping,
        rank: int | None,
        factors: Mapping[str, Factors],
        together: Together = alone,
    ) -> None:
        """Read the rows for a method; ``of`` tells them, and those of the processes that ``together`` adds, from others."""
        if method not in METHODS:
            raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        dampings = damping_by_layer(damping, layers)
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise InputError(f"rank: expected a positive int, got {rank!r}")
        with self._lock:
            made = {}
            for name in layers:
                out, in_ = rows.stores[0][0].shapes[name]
                found = LayerCurvature.made(
                    method,
                    name,
                    rows.dims[name],
                    out * in_,
                    dampings[name],
                    _blocks(rows, name),
                    rank,
                    factors.get(name),
                    together,
                )
                made[method, name] = _Kept(of, dampings[name], found.share, found)
            self._kept.update(made)
            self._lengths = {}

    def update(self, rows: Rows, of: str, before: int | None, was: str) -> None:
        """Follow the rows: those behind the first ``before``, which ``was`` tells from others, are new; with None all are.

        Where only new rows came, ``trak`` and ``ekfac`` read these alone; what ``trackstar`` and ``datainf`` divide by rests
        on all rows.
        """
        with self._lock:
            for (method, name), kept in self._kept.items():
                if kept.of == of:
                    continue
                known = self._read(method, name, rows)
                if before is not None and kept.of == was and known.grows:
                    copied = {key: tensor.clone() for key, tensor in known.tensors.items()}
                    found = LayerCurvature(method, name, known.weights, known.damping, copied)
                    found.extend(_blocks(rows, name, before)())
                else:
                    found = known.remade(_blocks(rows, name))
                self._kept[method, name] = _Kept(of, kept.damping, found.share, found)
            self._lengths = {}

    def taken_over(self, other: Curvatures, rows: Rows, of: str) -> None:
        """Make anew, of these rows, what ``other`` has."""
        for (method, name), kept in other._kept.items():
            found = other._read(method, name, rows).remade(_blocks(rows, name))
            self._kept[method, name] = _Kept(of, kept.damping, found.share, found)

    def serves(self, method: str, layers: Sequence[str], of: str | None = None) -> bool:
        """Whether there is curvature of all these layers for a method, and of these rows."""
        found = [self._kept.get(self._key(method, name)) for name in layers]
        return all(kept is not None and of in (None, kept.of) for kept in found)

    def precondition(
        self, method: str, rows: Rows, values: Tensor, weights: Mapping[str, float], of: str
    ) -> Preconditioned:
        """Queries for a search by a method; ``values`` float32 ``(m, dims of the layers)``.

        Raises:
            StoreError: damaged files, or curvature of other rows than the index finds now.
        """
        parts, square = [], torch.zeros(len(values), dtype=torch.float64)
        with self._lock:
            for name, part in zip(weights, values.split([rows.dims[name] for name in weights], 1), strict=True):
                key = self._key(method, name)
                if self._kept[key].of != of:
                    raise StoreError(
                        f"index: its curvature for {method} is of other rows than it finds now; bring it up to date "
                        "(influence-fast index STORE --out INDEX --update)"
                    )
                solved = self._read(*key, rows).precondition(part)
                square += weights[name] * (solved * part.double()).sum(1)
                parts.append(solved.float())
            found = torch.cat(parts, 1)
            if not found.isfinite().all():
                row = int(found.isfinite().all(1).logical_not().nonzero()[0])
                raise InputError(f"queries: row {row} is too long for {method}: preconditioned it is not finite")
            if method != "trackstar":
                return Preconditioned(found)
            return Preconditioned(found, square.clamp_min(0).sqrt(), self._row_lengths(rows, weights))

    def save(self, folder: IndexFolder, rows: Rows) -> list[dict[str, Any]]:
        """Write what is not there yet; what ``index.json`` says of all."""
        entries = []
        for (method, name), kept in self._kept.items():
            if kept.path is None or not folder.has(kept.path):
                found, path = self._read(method, name, rows), folder.new(FILE)
                with atomic_path(path) as temporary:
                    tensors = {key: tensor.contiguous() for key, tensor in found.tensors.items()}
                    safetensors.torch.save_file(tensors, str(temporary))
                kept.path, kept.about = path, describe(path)
            about = {"method": method, "layer": name, "damping": kept.damping, "share": kept.share, "of": kept.of}
            entries.append({**about, "data": kept.about})
        return entries

    @classmethod
    def open(
        cls, folder: Path, entries: Sequence[Mapping[str, Any]], layers: Sequence[str], verify: bool
    ) -> Curvatures:
        """What :meth:`save` wrote; StoreError for layers that the index has not, or twice the same."""
        found = cls(verify)
        for entry in entries:
            key = entry["method"], entry["layer"]
            if entry["layer"] not in layers or key in found._kept or not 0 < entry["damping"] < float("inf"):
                raise StoreError(f"{folder}: damaged index, its curvature for {key[0]} names layer {key[1]!r}")
            path = (folder / entry["data"]["file"]).resolve()
            found._kept[key] = _Kept(entry["of"], entry["damping"], entry["share"], None, path, entry["data"])
        return found

    def load_all(self, rows: Rows) -> None:
        """Read all files into memory, before they are removed."""
        for method, name in self._kept:
            self._read(method, name, rows)

    def _key(self, method: str, layer: str) -> tuple[str, str]:
        # A whitened cosine has all that the inner product takes.
        if method == "trak" and (method, layer) not in self._kept:
            return "trackstar", layer
        return method, layer

    def _read(self, method: str, name: str, rows: Rows) -> LayerCurvature:
        kept = self._kept[method, name]
        if kept.curvature is None:
            try:
                if self._verify:
                    check_files(kept.path.parent, [dict(kept.about)])  # type: ignore[union-attr, arg-type]
                tensors = safetensors.torch.load_file(str(kept.path))
            except FileNotFoundError:
                raise StoreError(f"{kept.path}: missing; load the index again") from None
            except (SafetensorError, OSError, ValueError) as error:
                raise StoreError(f"{kept.path}: damaged index ({error})") from None
            _check_tensors(str(kept.path), method, rows.dims[name], tensors)
            out, in_ = rows.stores[0][0].shapes[name]
            kept.curvature = LayerCurvature(method, name, out * in_, kept.damping, tensors)
        return kept.curvature

    def _row_lengths(self, rows: Rows, weights: Mapping[str, float]) -> np.ndarray:
        """Whitened lengths of all rows over some layers; 0 of rows that are deleted."""
        key = tuple(weights.items())
        if key not in self._lengths:
            live = rows.count if rows.live is None else len(rows.live)
            square = np.zeros(live)
            for name, weight in weights.items():
                found = self._read("trackstar", name, rows).tensors["lengths"].numpy()
                if found.shape != (live,):
                    raise StoreError(f"index: damaged, its curvature has {len(found)} lengths of {live} rows")
                square += weight * found
            out = np.zeros(rows.count)
            out[slice(None) if rows.live is None else rows.live] = np.sqrt(square)
            # Of the layers and weights asked for last.
            self._lengths = {key: out}
        return self._lengths[key]


def layer_scores(ready: Preconditioned, rows: Mapping[str, Tensor], numbers: Tensor, cosine: bool) -> dict[str, Tensor]:
    """What each layer adds to the scores of some rows: ``rows`` float64 ``(n, dim)`` by layer -> float64 ``(m, n)``."""
    widths = [values.shape[1] for values in rows.values()]
    parts = dict(zip(rows, ready.values.double().split(widths, 1), strict=True))
    out = {name: part @ rows[name].T for name, part in parts.items()}
    if cosine:
        of_query, of_rows = (
            torch.stack([side.square().sum(1) for side in sides.values()]).sum(0).sqrt() for sides in (parts, rows)
        )
    elif ready.queries is not None and ready.rows is not None:
        of_query, of_rows = ready.queries, torch.from_numpy(ready.rows)[numbers]
    else:
        return out
    length = of_query[:, None] * of_rows
    return {name: torch.where(length > 0, part / length, 0) for name, part in out.items()}


def _blocks(rows: Rows, layer: str, first: int = 0) -> Callable[[], Iterator[Tensor]]:
    """Gradients of the rows that are not deleted, from row ``first`` on, block by block, as often as they are asked for."""

    def read() -> Iterator[Tensor]:
        alive, step = rows.alive, max(1, _BLOCK_BYTES // (4 * rows.dims[layer]))
        for begin in range(first, rows.count, step):
            end = min(begin + step, rows.count)
            values = rows.read(layer, begin, end)
            yield values if alive is None else values[alive[begin:end]]

    return read


def _check_tensors(path: str, method: str, dim: int, tensors: Mapping[str, Tensor]) -> None:
    """StoreError unless these are the tensors of a layer of ``dim`` numbers."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fits = shapes.get("rows") == shapes.get("square") == () and float(tensors["rows"]) >= 1
    if method == "ekfac":
        left, right = shapes.get("left", ()), shapes.get("right", ())
        fits = fits and len(left) == len(right) == 2 and left[0] == left[1] and right[0] == right[1]
        fits = fits and left[0] * right[0] == dim and shapes.get("squares") == (left[0], right[0])
    elif "moment" in shapes:
        fits = fits and shapes["moment"] == (dim, dim)
    else:
        sketch = shapes.get("sketch", ())
        fits = fits and len(sketch) == 2 and sketch[0] == dim and 1 <= sketch[1] <= dim
        fits = fits and (method != "datainf" or shapes.get("trace") == ())
    if method == "trackstar":
        fits = fits and len(shapes.get("lengths", ())) == 1
    if not fits or any(tensor.dtype != torch.float64 for tensor in tensors.values()):
        raise StoreError(f"{path}: damaged index, its curvature for {method} does not fit a layer of {dim} numbers")
