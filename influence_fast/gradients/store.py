"""Reading a gradient store; ``store_format`` describes its bytes, ``store_writer`` writes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from influence_fast import _records as records
from influence_fast._blocks import BLOCK, BlockFile, HashedFile, PlainFile, sha256_of
from influence_fast._files import atomic_path, disk_errors, make_folder
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.row_ids import TYPES, RowIds
from influence_fast.gradients.shard import DTYPES, Shard
from influence_fast.gradients.store_format import FORMAT, JOURNAL, MANIFEST, VERSION

Rows = slice | Sequence[int] | Tensor | None
_VERIFY = [True]


@contextmanager
def unverified() -> Iterator[None]:
    """Stores and indexes that are opened within are read without checking their content, sizes and headers aside."""
    before, _VERIFY[0] = _VERIFY[0], False
    try:
        yield
    finally:
        _VERIFY[0] = before


def verifying(verify: bool | None = None) -> bool:
    """Whether to check: as told, or unless within :func:`unverified`."""
    return _VERIFY[0] if verify is None else verify


class GradientStore:
    """A finished store, read as far as it is asked for: see :meth:`open`.

    Attributes:
        path: the folder.
        layers: names in the model's order; ``dims`` and ``shapes`` give numbers per row and the weight's ``(out, in)``.
        ids: name of each row; its number unless the build was given others. Names are read from disk when asked for.
        meta: the manifest, and ``shards``: ``file``, ``rows``, ``bytes`` and ``sha256`` of each.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], lines: list[dict[str, Any]], verify: bool) -> None:
        self.path = path
        self.meta = {**manifest, "shards": lines}
        self.layers: list[str] = list(manifest["layers"])
        self.dims: dict[str, int] = {name: layer["dim"] for name, layer in manifest["layers"].items()}
        self.shapes: dict[str, tuple[int, int]] = {
            name: (layer["shape"][0], layer["shape"][1]) for name, layer in manifest["layers"].items()
        }
        self._ids_file = None if manifest["version"] == 1 else _ids_file(path, manifest, verify)
        self.ids: Sequence[int | str] = _ids(manifest, self._ids_file)
        self._shards = [_shard(path, manifest, line, self.dims, verify) for line in lines]

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool | None = None) -> GradientStore:
        """Open a finished store.

        What is read is checked when it is first read, whoever reads, and StoreError names the file, layers and rows that
        are damaged; ``verify=False`` leaves that out. :meth:`verify` checks all at once.

        Raises:
            StoreError: there is none, its manifest or journal is damaged or of another version, the build is unfinished,
                or a shard is missing or cut short.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        lines = read_lines(folder, manifest)
        done = sum(line["rows"] for line in lines)
        if done != manifest["rows"]:
            raise StoreError(f"{folder}: unfinished, {done} of {manifest['rows']} rows; build it again to go on")
        store = cls(folder, manifest, lines, verifying(verify))
        store.check_sizes()
        return store

    def __len__(self) -> int:
        return self.meta["rows"]

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
        return torch.cat([shard.tensor(f"@sqnorm/{layer}") for shard in self._shards])

    @property
    def columns(self) -> list[str]:
        """Names of what is kept of each row beside its gradients."""
        return self._shards[0].columns

    def column(self, name: str) -> Tensor:
        """``loss`` (float32), ``correct`` (bool) or ``prediction`` (int64) of every row: ``(n,)``.

        Raises:
            InputError: the store has no such column; lists those it has.
        """
        if name not in self.columns:
            raise InputError(f"column: the store has no {name!r}; it has {', '.join(self.columns)}")
        return torch.cat([shard.tensor(f"@column/{name}") for shard in self._shards])

    def verify(self) -> None:
        """Check every byte of the store, and what it says; :class:`StoreError` names the first thing that is damaged."""
        for damage in self._damage():
            raise damage

    def _damage(self) -> Iterator[StoreError]:
        for line in self.meta["shards"]:
            try:
                checked = GradientStore(self.path, self.meta, [line], verify=True)
                checked.check_shards()
                _check_hash(cast(PlainFile, checked._shards[0].file), line["sha256"])
            except StoreError as error:
                yield error
        try:
            GradientStore(self.path, self.meta, [], verify=True).check_ids()
        except StoreError as error:
            yield error

    def check_sizes(self) -> None:
        """StoreError names the first file that is missing or not as long as it was written."""
        for shard in self._shards:
            shard.file.check_size()
        if self._ids_file is not None:
            self._ids_file.check_size()

    def check_shards(self) -> None:
        """Check every byte of the shards by their blocks, unless the store was opened without, and their headers."""
        for shard in self._shards:
            shard.check_all()

    def check_ids(self) -> None:
        """Check the names of the rows."""
        if self._ids_file is not None:
            self._ids_file.check_all()
            for _ in self.ids:
                pass

    def check_rows(self, layers: Sequence[str], rows: np.ndarray) -> None:
        """Check what :meth:`addresses` give of some rows, int64 in any order, unless that was done before.

        Raises:
            StoreError: names the file, layers and rows that are damaged.
        """
        numbers = np.unique(rows)
        edges = np.searchsorted(numbers, self.firsts)
        names = [*layers, *(f"@scale/{name}" for name in layers)]
        for shard, low, high in zip(self._shards, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if low < high:
                shard.ensure([name for name in names if name in shard.places], numbers[low:high] - shard.first)

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of the shards: tells stores apart without reading them."""
        return hashlib.sha256("".join(line["sha256"] for line in self.meta["shards"]).encode()).hexdigest()

    def shard_of(self, row: int) -> Path:
        """The file that holds a row."""
        return self._shards[int(np.searchsorted(self.firsts, row, "right")) - 1].path

    @cached_property
    def firsts(self) -> np.ndarray:
        """Number of the first row of each shard, and behind them the number of rows: int64 ``(shards + 1,)``."""
        return np.cumsum([0, *(shard.rows for shard in self._shards)], dtype=np.int64)

    def addresses(self, name: str) -> np.ndarray:
        """Where a tensor begins in each shard's mapped memory, while the store lives: int64 ``(shards,)``, 0 for none.

        What stands there is unchecked until :meth:`check_rows`.
        """
        return np.array([shard.address(name) if name in shard.places else 0 for shard in self._shards], np.int64)

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
        kinds = {type(name) for name in self.ids} if not isinstance(self.ids, range) else {int}
        if len(kinds) > 1:
            raise InputError("ids: a column is of one type; these are numbers and names")
        target = Path(path)
        make_folder(target.parent)
        with disk_errors(target), atomic_path(target) as temporary, ExitStack() as stack:
            writer: Any = None
            for shard, begin in zip(self._shards, self.firsts, strict=False):
                columns = {"id": pa.array(list(self.ids[begin : begin + shard.rows]))}
                for name in names:
                    values = pa.array(shard.gradients(name, slice(0, shard.rows)).flatten().numpy())
                    columns[name] = pa.FixedSizeListArray.from_arrays(values, self.dims[name])
                    columns[f"sqnorm/{name}"] = pa.array(shard.tensor(f"@sqnorm/{name}").numpy())
                for name in self.columns:
                    columns[name] = pa.array(shard.tensor(f"@column/{name}").numpy())
                table = pa.table(columns)
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(temporary, table.schema))
                writer.write_table(table, row_group_size=shard.rows)

    def _check_layer(self, layer: str) -> None:
        if layer not in self.dims:
            raise InputError(f"layer: the store has no {layer!r}; it has {', '.join(self.layers)}")

    def _gather(self, layer: str, rows: Rows) -> Tensor:
        wanted = _row_numbers(rows, len(self))
        out = torch.empty(len(wanted), self.dims[layer], dtype=torch.float32, device="cpu")
        numbers = None if isinstance(wanted, range) and wanted.step == 1 else np.asarray(wanted, dtype=np.int64)
        for shard, begin in zip(self._shards, self.firsts.tolist(), strict=False):
            end = begin + shard.rows
            if numbers is None:
                low, high = max(wanted.start, begin), min(wanted.stop, end)  # type: ignore[union-attr]
                if low < high:
                    place = out[low - wanted.start : high - wanted.start]  # type: ignore[union-attr]
                    shard.gradients(layer, slice(low - begin, high - begin), place)
            else:
                places = np.flatnonzero((numbers >= begin) & (numbers < end))
                if len(places):
                    out[torch.from_numpy(places)] = shard.gradients(layer, numbers[places] - begin)
        return out


def find_damage(path: Path) -> Iterator[StoreError]:
    """Everything that is wrong with a store, one file at a time; what :meth:`GradientStore.verify` raises first."""
    try:
        manifest = read_manifest(path)
        lines = read_lines(path, manifest)
        done = sum(line["rows"] for line in lines)
        if done != manifest["rows"]:
            yield StoreError(f"{path}: unfinished, {done} of {manifest['rows']} rows; build it again to go on")
        store = GradientStore(path, manifest, lines, verify=True)
    except StoreError as error:
        yield error
        return
    yield from store._damage()


# ------------------------------------------------------------------------------------------ what a store says of itself

_LAYER = records.record(
    {
        "shape": records.items(records.whole(), 2),
        "dim": records.whole(1, 2**40),
        "matrices": records.table(records.text()),
    },
    {"kind": records.one_of("dense")},
)
_SHARED = {
    "model": records.text(),
    "projection": records.text(),
    "layers": records.table(_LAYER, least=1),
    "dtype": records.one_of(*DTYPES),
    "loss": records.text(),
    "rows": records.whole(1, 2**40),
    "shard_rows": records.whole(1, 2**40),
}
_FREE = {"settings": records.table(), "facts": records.table()}
_FILE = {
    "file": records.text(records.PLAIN_NAME, "the name of a file in this folder"),
    "rows": records.whole(1, 2**40),
    "bytes": records.whole(),
    "sha256": records.text(records.SHA256, "64 hexadecimal digits"),
}
_IDS = records.record(
    {
        **{key: _FILE[key] for key in ("file", "bytes", "sha256")},
        "type": records.one_of(*TYPES),
        "width": records.maybe(records.whole()),
        "blocks": records.text(records.XXH3, "16 hexadecimal digits"),
    }
)


def _name(file: str, key: str, value: Any) -> None:
    if type(value) not in (int, str):
        raise StoreError(f"{file} is damaged: {key}: expected a number or text, got {value!r}")


_VERSION_1 = records.record(
    {**_SHARED, "ids": records.maybe(records.items(_name)), "shards": records.items(records.record(_FILE))}, _FREE
)
_VERSION_2 = records.record(
    {
        **_SHARED,
        "requires": records.items(records.text()),
        "ids": records.maybe(_IDS),
        "block": records.one_of(BLOCK),
        "settings": records.table(),
    },
    {"facts": records.table()},
)
_LINE = records.record(
    {
        **_FILE,
        "segment": records.one_of(0),
        "first": records.whole(),
        "blocks": records.text(records.XXH3, "16 hexadecimal digits"),
        "settings": records.text(records.SHA256, "64 hexadecimal digits"),
    }
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store, finished or not; version 1 holds ``shards`` too.

    Raises:
        StoreError: there is none, it is damaged, or of another version.
    """
    where = f"{folder}: {MANIFEST}"
    raw = records.read_bytes(records.inside(folder, MANIFEST), f"{folder}: no gradient store (no {MANIFEST})")
    manifest = records.parse(where, raw)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{where} is not that of a gradient store")
    version = manifest.get("version")
    if type(version) is not int or version not in (1, VERSION):
        raise StoreError(f"{folder}: store version {version!r}, this library reads 1 and {VERSION}")
    if version == 1:
        _VERSION_1(where, "", manifest)
        if manifest["ids"] is not None and len(manifest["ids"]) != manifest["rows"]:
            raise StoreError(f"{where} is damaged: {len(manifest['ids'])} ids for {manifest['rows']} rows")
        return manifest
    manifest = records.unseal(where, raw)
    _VERSION_2(where, "", manifest)
    if manifest["requires"]:
        raise StoreError(f"{folder}: needs a later version of this library, which knows {manifest['requires'][0]!r}")
    return manifest


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Tells stores apart: SHA-256 of what a manifest of version 2 says, facts aside."""
    content = {key: value for key, value in manifest.items() if key not in ("facts", "shards")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_journal(folder: Path, manifest: Mapping[str, Any]) -> records.Chain:
    """The lines of a journal whose own checksum holds; none where there is no journal yet."""
    start = fingerprint(manifest)
    path = records.inside(folder, JOURNAL)
    if not path.exists():
        return records.Chain(start)
    raw = records.read_bytes(path, f"{folder}: no {JOURNAL}")
    return records.unchain(f"{folder}: {JOURNAL}", raw, start)


def read_lines(folder: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a store says of its shards, in the order of their rows, each with its ``first``.

    Raises:
        StoreError: a damaged journal, shards that overlap, or that are shorter than their rows are.
    """
    where = f"{folder}: {MANIFEST if manifest['version'] == 1 else JOURNAL}"
    if manifest["version"] == 1:
        firsts = np.cumsum([0, *(line["rows"] for line in manifest["shards"])]).tolist()
        lines = [{**line, "first": first} for line, first in zip(manifest["shards"], firsts, strict=False)]
    else:
        chain = read_journal(folder, manifest)
        if chain.damage is not None:
            raise StoreError(f"{chain.damage}; build the store again to mend it")
        for line in chain.entries:
            check_line(where, manifest, line)
        lines = sorted(chain.entries, key=lambda line: line["first"])
    if len({line["file"] for line in lines}) != len(lines):
        raise StoreError(f"{where} is damaged: a shard is named twice")
    for line, after in pairwise(lines):
        if line["first"] + line["rows"] > after["first"]:
            raise StoreError(f"{where} is damaged: {line['file']} and {after['file']} hold the same rows")
    for line in lines:
        if line["first"] + line["rows"] > manifest["rows"] or line["rows"] * row_bytes(manifest) > line["bytes"]:
            raise StoreError(f"{where} is damaged: {line['file']} cannot hold rows {line['first']} and on")
    return lines


def check_line(where: str, manifest: Mapping[str, Any], line: Mapping[str, Any]) -> None:
    """StoreError unless a line of a journal is one of this store's shards."""
    if line.get("kind") != "shard":
        raise StoreError(f"{where}: has a line of kind {line.get('kind')!r}, which this library does not know")
    _LINE(where, "", line)
    if line["settings"] != fingerprint(manifest):
        raise StoreError(f"{where} is damaged: {line['file']} belongs to another store")


def row_bytes(manifest: Mapping[str, Any]) -> int:
    """Bytes of a row, columns aside."""
    size = DTYPES[manifest["dtype"]].itemsize
    beside = 8 + (4 if manifest["dtype"] == "int8" else 0)
    return sum(layer["dim"] * size + beside for layer in manifest["layers"].values())


def named(line: Mapping[str, Any]) -> dict[str, str]:
    """What a shard's header says of the shard itself."""
    return {key: str(line[key]) for key in ("file", "first", "rows", "settings")}


def _shard(
    folder: Path, manifest: Mapping[str, Any], line: Mapping[str, Any], dims: Mapping[str, int], verify: bool
) -> Shard:
    path, size = records.inside(folder, line["file"]), line["bytes"]
    if not verify:
        file = PlainFile(path, size)
    elif manifest["version"] == 1:
        file = HashedFile(path, size, line["sha256"])
    else:
        file = BlockFile(path, size, line["blocks"])
    about = None if manifest["version"] == 1 else named(line)
    return Shard(file, line["first"], line["rows"], dims, manifest["dtype"], about)


def _ids_file(folder: Path, manifest: Mapping[str, Any], verify: bool) -> PlainFile | None:
    about = manifest["ids"]
    if about is None:
        return None
    path, size = records.inside(folder, about["file"]), about["bytes"] + 8 * -(-about["bytes"] // BLOCK)
    file = BlockFile(path, size, about["blocks"]) if verify else PlainFile(path, size)
    file.where = lambda begin, end: "names of rows"
    return file


def _ids(manifest: Mapping[str, Any], file: PlainFile | None) -> Sequence[int | str]:
    if manifest["ids"] is None:
        return range(manifest["rows"])
    if file is None:
        return manifest["ids"]
    about = manifest["ids"]
    return RowIds(file, manifest["rows"], about["type"], about["width"], about["bytes"])


def _check_hash(file: PlainFile, expected: str) -> None:
    found = sha256_of(file)
    if found != expected:
        raise file.damaged(f"its SHA-256 is {found}, {expected} was written", 0, file.size)


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
