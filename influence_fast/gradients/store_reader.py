"""Reading a gradient store: what :class:`~influence_fast.GradientStore` does beside changing it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from influence_fast._blocks import PlainFile
from influence_fast._files import atomic_path, disk_errors, make_folder
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.row_factors import sides
from influence_fast.gradients.shard import Shard
from influence_fast.gradients.store_records import (
    State,
    dims_of,
    dtype_of,
    outs_of,
    read_manifest,
    read_state,
    settled,
    verifying,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Rows = slice | Sequence[int] | Tensor | None


class StoreReader:
    """A finished store, read as far as it is asked for: see :meth:`open`.

    Attributes:
        path: the folder.
        layers: names in the model's order; ``dims`` and ``shapes`` give numbers per row and the weight's ``(out, in)``.
        ids: name of each row; its number unless the build was given others. Names are read from disk when asked for.
        meta: the manifest, with ``dtype`` as it was built with, and ``shards``: ``file``, ``rows``, ``bytes`` and
            ``sha256`` of each.
    """

    def __init__(self, path: Path, state: State, verify: bool) -> None:
        self.path = path
        self._verify = verify
        self.state = state
        lines = [{**line, "file": part.label + line["file"]} for part in state.parts for line in part.lines]
        self.meta = {**state.manifest, "dtype": dtype_of(state.manifest), "rows": state.rows, "shards": lines}
        self.layers: list[str] = list(state.manifest["layers"])
        self.dims: dict[str, int] = dims_of(state.manifest)
        self.shapes: dict[str, tuple[int, int]] = {
            name: (layer["shape"][0], layer["shape"][1]) for name, layer in state.manifest["layers"].items()
        }
        self._ids_files = [part.ids_file(verify) for part in state.parts]
        self.ids: Sequence[int | str] = state.ids(self._ids_files)
        self.shards = [part.shard(line, verify) for part in state.parts for line in part.lines]
        for file in (*(cast(PlainFile, shard.file) for shard in self.shards), *self._ids_files):
            if file is not None:
                file.gone = self._gone

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool | None = None) -> Self:
        """Open a finished store, without the rows that were deleted.

        What is read is checked when it is first read, whoever reads, and StoreError names the file, layers and rows that
        are damaged; ``verify=False`` leaves that out. :meth:`verify` checks all at once. Rows that another process appends
        or deletes later are seen by who opens the store again.

        Raises:
            StoreError: there is none, its manifest or journal is damaged or of another version, the build is unfinished,
                or a shard is missing or cut short.
        """
        folder = Path(path)

        def opened(_: object) -> Any:
            store = cls(folder, read_state(folder, verifying(verify)), verifying(verify))
            store.check_sizes()
            return store

        return settled(folder, opened)

    def __len__(self) -> int:
        return self.state.rows

    def __repr__(self) -> str:
        return (
            f"GradientStore({str(self.path)!r}: {len(self)} rows, {len(self.layers)} layers, "
            f"{self.meta['projection']}, {self.meta['dtype']})"
        )

    def read(self, layer: str, rows: Rows = None) -> Tensor:
        """Gradients of ``layer``: float32 ``(len(rows), dim)``; all rows by default.

        ``rows`` is a slice, a sequence or tensor of row numbers (negative ones count from the end), or a boolean mask.
        Only the rows asked for are read.
        """
        self._check_layer(layer)
        return self._gather(layer, rows)

    def sqnorm(self, layer: str) -> Tensor:
        """Exact ``|g|^2`` of every row: float64 ``(n,)``, of the (projected) gradient before rounding to dtype."""
        self._check_layer(layer)
        return self._of_rows(f"@sqnorm/{layer}")

    @property
    def columns(self) -> list[str]:
        """Names of what is kept of each row beside its gradients."""
        return self.shards[0].columns

    def column(self, name: str) -> Tensor:
        """``loss`` (float32), ``correct`` (bool) or ``prediction`` (int64) of every row: ``(n,)``.

        Raises:
            InputError: the store has no such column; lists those it has.
        """
        if name not in self.columns:
            raise InputError(f"column: the store has no {name!r}; it has {', '.join(self.columns)}")
        return self._of_rows(f"@column/{name}")

    def _of_rows(self, name: str) -> Tensor:
        found = torch.cat([shard.tensor(name) for shard in self.shards])
        return found if self.state.live is None else found[torch.from_numpy(self.state.live)]

    def verify(self) -> None:
        """Check every byte of the store, and what it says; :class:`StoreError` names the first thing that is damaged."""
        for damage in self._damage():
            raise damage

    def _damage(self) -> Iterator[StoreError]:
        for part in self.state.parts:
            yield from part.damage()
        try:
            read_state(self.path, verify=True)
        except StoreError as error:
            yield error

    def check_sizes(self) -> None:
        """StoreError names the first file that is missing or not as long as it was written."""
        for shard in self.shards:
            shard.file.check_size()
        for file in self._ids_files:
            if file is not None:
                file.check_size()

    def check_shards(self) -> None:
        """Check every byte of the shards by their blocks, unless the store was opened without, and their headers."""
        for shard in self.shards:
            shard.check_all()

    def check_ids(self) -> None:
        """Check the names of the rows."""
        for part in self.state.parts:
            part.check_ids(self._verify)

    @cached_property
    def with_deleted(self) -> Self:
        """The same store with every row that is written, deleted ones among them: rows as the shards number them."""
        if self.state.live is None:
            return self
        return type(self)(self.path, replace(self.state, live=None), self._verify)

    @property
    def live(self) -> np.ndarray | None:
        """Numbers in :attr:`with_deleted` of the rows that are there: int64 ``(rows,)``; None where none is deleted."""
        return self.state.live

    def _gone(self) -> str:
        """What to say of a file that is missing: it may have been taken away since the store was opened."""
        try:
            changed = read_manifest(self.path) != self.state.manifest
        except StoreError:
            return ""
        return "; the store was compacted since it was opened: open it again" if changed else ""

    def check_rows(self, layers: Sequence[str], rows: np.ndarray) -> None:
        """Check what :meth:`addresses` give of some rows, int64 in any order, unless that was done before.

        Raises:
            StoreError: names the file, layers and rows that are damaged.
        """
        numbers = np.unique(self._as_written(rows))
        edges = np.searchsorted(numbers, self.firsts)
        names = [*layers, *(f"@scale/{name}" for name in layers)]
        for shard, low, high in zip(self.shards, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if low < high:
                shard.file.check_size()
                shard.ensure([name for name in names if name in shard.places], numbers[low:high] - shard.first)

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of the shards and what is deleted: tells stores apart without reading them."""
        return self.state.digest

    def digest_of(self, rows: int) -> str | None:
        """:attr:`digest` of the store when it had so many rows, deleted ones counted; None where no shard ended there."""
        if self.state.live is not None or rows not in self.firsts:
            return None
        lines = self.meta["shards"][: int(np.searchsorted(self.firsts, rows))]
        return hashlib.sha256("".join(line["sha256"] for line in lines).encode()).hexdigest()

    @property
    def numbered(self) -> bool:
        """Whether the ids of all rows are numbers."""
        return all(part.numbered for part in self.state.parts)

    def shard_of(self, row: int) -> Path:
        """The file that holds a row."""
        number = self._as_written(np.array([row]))[0]
        return self.shards[int(np.searchsorted(self.firsts, number, "right")) - 1].path

    def _as_written(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of rows as the shards count them."""
        return rows if self.state.live is None else self.state.live[rows]

    @cached_property
    def firsts(self) -> np.ndarray:
        """Number of the first row of each shard, deleted rows counted, and of rows in all: int64 ``(shards + 1,)``."""
        return np.cumsum([0, *(shard.rows for shard in self.shards)], dtype=np.int64)

    def addresses(self, name: str) -> np.ndarray:
        """Where a tensor begins in each shard's mapped memory, while the store lives: int64 ``(shards,)``, 0 for none.

        What stands there is unchecked until :meth:`check_rows`.
        """
        return np.array([shard.address(name) if name in shard.places else 0 for shard in self.shards], np.int64)

    @property
    def factors(self) -> int:
        """Rank that rows are kept with; 0 where they are whole."""
        return self.state.manifest.get("factors", 0)

    @property
    def outs(self) -> dict[str, int]:
        """Numbers of the outputs' side of each layer that is kept as factors."""
        return outs_of(self.state.manifest)

    def read_factors(self, layer: str, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """What a layer's gradients are the products of: float32 ``(n, factors, out)`` and ``(n, factors, in)``.

        Raises:
            InputError: a layer that is kept whole.
        """
        self._check_layer(layer)
        if layer not in self.outs:
            raise InputError(f"layer: {layer!r} is kept whole, not as factors")
        begin, end, _ = rows.indices(len(self))
        found = []
        for shard, first, last, inside in self._rows_by_shard():
            low, high = max(begin, first) - first, min(end, last) - first
            if low < high:
                within = inside[low:high] if isinstance(inside, np.ndarray) else slice(low, high)
                found.append(shard.stored(layer, within))
        width = self.factors * (self.outs[layer] + self.dims[layer] // self.outs[layer])
        return sides(torch.cat(found) if found else torch.empty(0, width), self.outs[layer], self.factors)

    def to_parquet(self, path: str | os.PathLike[str], layers: Sequence[str] | None = None) -> None:
        """Write one Parquet file, for a vector database or data frames: a row group per shard.

        Columns: ``id``, each layer as a fixed-size list of float32, ``|g|^2`` of each as ``sqnorm/LAYER``, and what is
        kept beside (``loss``, ``correct``, ``prediction``). InputError: a layer that the store lacks, or ids of both kinds.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = self.layers if layers is None else list(layers)
        for name in names:
            self._check_layer(name)
        kinds = {int} if isinstance(self.ids, range) else {type(name) for name in self.ids}
        if len(kinds) > 1:
            raise InputError("ids: a column is of one type; these are numbers and names")
        target = Path(path)
        make_folder(target.parent)
        with disk_errors(target), atomic_path(target) as temporary, ExitStack() as stack:
            writer: Any = None
            for shard, begin, end, rows in self._rows_by_shard():
                columns = {"id": pa.array(list(self.ids[begin:end]))}
                for name in names:
                    values = pa.array(shard.gradients(name, rows).flatten().numpy())
                    columns[name] = pa.FixedSizeListArray.from_arrays(values, self.dims[name])
                    columns[f"sqnorm/{name}"] = pa.array(shard.tensor(f"@sqnorm/{name}", rows).numpy())
                for name in self.columns:
                    columns[name] = pa.array(shard.tensor(f"@column/{name}", rows).numpy())
                table = pa.table(columns)
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(temporary, table.schema))
                writer.write_table(table, row_group_size=end - begin)

    def _check_layer(self, layer: str) -> None:
        if layer not in self.dims:
            raise InputError(f"layer: the store has no {layer!r}; it has {', '.join(self.layers)}")

    def _rows_by_shard(self) -> Iterator[tuple[Shard, int, int, slice | np.ndarray]]:
        """Each shard that has rows: numbers of the first and behind the last of them, and which they are in the shard."""
        at = 0
        for shard, first in zip(self.shards, self.firsts.tolist(), strict=False):
            rows: slice | np.ndarray = slice(0, shard.rows)
            count = shard.rows
            if self.state.live is not None:
                low, high = np.searchsorted(self.state.live, [first, first + shard.rows]).tolist()
                rows, count = self.state.live[low:high] - first, high - low
            if count:
                yield shard, at, at + count, rows
            at += count

    def _gather(self, layer: str, rows: Rows) -> Tensor:
        wanted = _row_numbers(rows, len(self))
        out = torch.empty(len(wanted), self.dims[layer], dtype=torch.float32, device="cpu")
        run = isinstance(wanted, range) and wanted.step == 1
        if run and self.state.live is None:
            for shard, begin in zip(self.shards, self.firsts.tolist(), strict=False):
                low, high = max(wanted.start, begin), min(wanted.stop, begin + shard.rows)  # type: ignore[union-attr]
                if low < high:
                    place = out[low - wanted.start : high - wanted.start]  # type: ignore[union-attr]
                    shard.gradients(layer, slice(low - begin, high - begin), place)
            return out
        numbers = self._as_written(np.asarray(wanted, dtype=np.int64))
        order = None if run else np.argsort(numbers, kind="stable")
        ascending = numbers if order is None else numbers[order]
        edges = np.searchsorted(ascending, self.firsts).tolist()
        for shard, low, high in zip(self.shards, edges, edges[1:], strict=False):
            if low < high:
                found = shard.gradients(layer, ascending[low:high] - shard.first)
                out[slice(low, high) if order is None else torch.from_numpy(order[low:high])] = found
        return out


def find_damage(path: Path) -> Iterator[StoreError]:
    """Everything that is wrong with a store, one file at a time; what :meth:`StoreReader.verify` raises first."""
    try:
        state = read_state(path, verify=True, unfinished=True)
    except StoreError as error:
        yield error
        return
    for part in state.parts:
        if part.done != part.rows:
            yield StoreError(f"{part.folder}: unfinished, {part.done} of {part.rows} rows; build it again to go on")
        yield from part.damage()


def _row_numbers(rows: Rows, count: int) -> range | list[int]:
    if rows is None:
        return range(count)
    if isinstance(rows, slice):
        return range(count)[rows]
    if isinstance(rows, range):
        numbers: Iterable[int] = rows
    else:
        array = rows.tolist() if isinstance(rows, Tensor | np.ndarray) else list(rows)
        if array and all(isinstance(value, bool) for value in array):
            if len(array) != count:
                raise InputError(f"rows: a mask needs one value for each of the {count} rows, got {len(array)}")
            array = [i for i, keep in enumerate(array) if keep]
        numbers = cast(list[int], array)
    out = []
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not -count <= number < count:
            raise InputError(f"rows: expected numbers from {-count} to {count - 1}, got {number!r}")
        out.append(number % count)
    return out
