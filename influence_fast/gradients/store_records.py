"""What a store says of itself: its manifest, its journal, the segments that were appended and the rows that were deleted.

All of it is held against what a store can be before anything is believed; ``store_format`` describes the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import numpy as np
from pydantic import AfterValidator, Field
from typing_extensions import NotRequired, TypedDict

from influence_fast import _records as records
from influence_fast._blocks import BLOCK, BlockFile, BlockSums, HashedFile, PlainFile, block_count, root_of, sha256_of
from influence_fast.errors import StoreError
from influence_fast.gradients import block_scales
from influence_fast.gradients.row_ids import TYPES, JoinedIds, RowIds
from influence_fast.gradients.shard import Shard
from influence_fast.gradients.shard import row_bytes as bytes_of_row
from influence_fast.gradients.store_format import FORMAT, JOURNAL, MANIFEST, VERSION

T = TypeVar("T")
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


# Folders of segments, by what made them, and files of tombstones; a number is used once.
SEGMENT = r"(segment|compacted)-\d{5,10}"
TOMBSTONES = r"deleted-\d{5,10}\.bin"
_KNOWN = {"block_scales", "factors", "segments", "tombstones"}
# Of these none tells of a change since the store was built.
BUILT = {"block_scales", "factors"}
# What may change in a manifest while its shards stay: what it needs and names beside them.
_BESIDE = ("facts", "shards", "segments", "next", "tombstones")


class _Layer(TypedDict):
    shape: records.Pair
    dim: records.Positive
    matrices: dict[str, records.Text]
    kind: NotRequired[Literal["dense"]]
    out: NotRequired[Annotated[int, Field(ge=1, le=2**31)]]


class _File(TypedDict):
    file: records.PlainName
    bytes: records.Whole
    sha256: records.Sha256


class _Shard(_File):
    rows: records.Positive


class _Line(_Shard):
    segment: Annotated[int, Field(ge=0, le=0)]
    first: records.Whole
    blocks: records.Xxh3
    settings: records.Sha256


class _Ids(_File):
    type: Annotated[Any, records.one_of(*TYPES)]
    width: records.Whole | None
    blocks: records.Xxh3


class _Segment(TypedDict):
    folder: Annotated[Any, records.matching(rf"({SEGMENT})?", "the folder of a segment")]
    rows: records.Positive
    settings: records.Sha256


class _Tombstones(TypedDict):
    file: Annotated[Any, records.matching(TOMBSTONES, "the name of a file of tombstones")]
    rows: records.Positive
    bytes: Annotated[records.Whole, Field(ge=1)]
    blocks: records.Xxh3


class _BlockScales(TypedDict):
    bits: Literal[4, 8]
    numbers: Annotated[int, Field(ge=block_scales.NUMBERS, le=block_scales.NUMBERS)]


class _Shared(TypedDict):
    model: records.Text
    projection: records.Text
    layers: Annotated[dict[records.Text, _Layer], Field(min_length=1)]
    dtype: Annotated[Any, records.one_of("float32", "float16", "bfloat16", "int8")]
    loss: records.Text
    rows: records.Positive
    shard_rows: records.Positive
    facts: NotRequired[dict[Any, Any]]


def _id(value: Any) -> Any:
    if type(value) not in (int, str):
        raise ValueError("a number or text")
    return value


class _Version1(_Shared):
    ids: list[Annotated[Any, AfterValidator(_id)]] | None
    shards: list[_Shard]
    settings: NotRequired[dict[Any, Any]]


class _Version2(_Shared):
    requires: list[records.Text]
    ids: _Ids | None
    block: Annotated[int, Field(ge=BLOCK, le=BLOCK)]
    settings: dict[Any, Any]
    factors: NotRequired[Annotated[int, Field(ge=1, le=2**16)]]
    block_scales: NotRequired[_BlockScales]
    segments: NotRequired[list[_Segment]]
    next: NotRequired[Annotated[int, Field(ge=1, le=2**31)]]
    tombstones: NotRequired[_Tombstones]


_VERSION_1, _VERSION_2, _LINE = map(records.Schema, (_Version1, _Version2, _Line))


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
        _VERSION_1.check(where, manifest)
        if manifest["ids"] is not None and len(manifest["ids"]) != manifest["rows"]:
            raise StoreError(f"{where} is damaged: {len(manifest['ids'])} ids for {manifest['rows']} rows")
        return manifest
    manifest = records.unseal(where, raw)
    _VERSION_2.check(where, manifest)
    if unknown := [name for name in manifest["requires"] if name not in _KNOWN]:
        raise StoreError(f"{folder}: needs a later version of this library, which knows {unknown[0]!r}")
    there = {name for name in _KNOWN if name in manifest}
    if set(manifest["requires"]) != there or (there - BUILT and not {"segments", "next"} <= manifest.keys()):
        raise StoreError(f"{where} is damaged: it requires {manifest['requires']}, and has {sorted(there)}")
    for name, layer in manifest["layers"].items():
        out = layer.get("out")
        exact = manifest["dtype"] == "float32" or "block_scales" in manifest
        if out is not None and (layer["dim"] % out or "factors" not in manifest or not exact):
            raise StoreError(f"{where} is damaged: layer {name!r} has no factors with {out} outputs")
    if "block_scales" in manifest and manifest["dtype"] != "int8":
        raise StoreError(f"{where} is damaged: numbers of {manifest['dtype']} have no scales of blocks")
    return manifest


def dtype_of(manifest: Mapping[str, Any]) -> str:
    """How rows are kept, one of ``DTYPES``: the manifest calls ``int8`` all whose codes need scales."""
    if (scales := manifest.get("block_scales")) is None:
        return cast(str, manifest["dtype"])
    return next(name for name, bits in block_scales.BITS.items() if bits == scales["bits"])


def dtype_entries(dtype: str) -> dict[str, Any]:
    """What a manifest says of a dtype."""
    if (bits := block_scales.BITS.get(dtype)) is None:
        return {"dtype": dtype}
    return {"dtype": "int8", "block_scales": {"bits": bits, "numbers": block_scales.NUMBERS}}


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Tells stores apart: SHA-256 of what a manifest of version 2 said when its shards were written, facts aside."""
    content = {key: value for key, value in manifest.items() if key not in _BESIDE}
    if content.get("requires"):
        content["requires"] = []
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
        settings = fingerprint(manifest)
        for line in chain.entries:
            check_line(where, settings, line)
        lines = sorted(chain.entries, key=lambda line: line["first"])
    if len({line["file"] for line in lines}) != len(lines):
        raise StoreError(f"{where} is damaged: a shard is named twice")
    for line, after in pairwise(lines):
        if line["first"] + line["rows"] > after["first"]:
            raise StoreError(f"{where} is damaged: {line['file']} and {after['file']} hold the same rows")
    width = row_bytes(manifest)
    for line in lines:
        if line["first"] + line["rows"] > manifest["rows"] or line["rows"] * width > line["bytes"]:
            raise StoreError(f"{where} is damaged: {line['file']} cannot hold rows {line['first']} and on")
    return lines


def check_line(where: str, settings: str, line: Mapping[str, Any]) -> None:
    """StoreError unless a line of a journal is a shard of the store with this :func:`fingerprint`."""
    if line.get("kind") != "shard":
        raise StoreError(f"{where}: has a line of kind {line.get('kind')!r}, which this library does not know")
    _LINE.check(where, line)
    if line["settings"] != settings:
        raise StoreError(f"{where} is damaged: {line['file']} belongs to another store")


def row_bytes(manifest: Mapping[str, Any]) -> int:
    """Bytes of a row at least, columns aside."""
    dtype, widths = dtype_of(manifest), widths_of(manifest).values()
    # Version 0.1 had no scales of half precision.
    return sum(bytes_of_row(dtype, width) - (4 if dtype == "float16" else 0) for width in widths)


def named(line: Mapping[str, Any]) -> dict[str, str]:
    """What a shard's header says of the shard itself."""
    return {key: str(line[key]) for key in ("file", "first", "rows", "settings")}


@dataclass(frozen=True)
class Part:
    """Rows that were built together: those of a store that nothing was appended to, or of one segment.

    Attributes:
        folder: where the files are.
        manifest: what was begun there.
        lines: of the journal, in the order of the rows.
        first: number of the first row within the store, deleted rows counted.
        label: the folder within the store, with a slash, or nothing.
    """

    folder: Path
    manifest: dict[str, Any]
    lines: list[dict[str, Any]]
    first: int = 0
    label: str = ""

    @property
    def rows(self) -> int:
        return self.manifest["rows"]

    @property
    def done(self) -> int:
        """Rows that are written."""
        return sum(line["rows"] for line in self.lines)

    @property
    def numbered(self) -> bool:
        """Whether all ids are numbers."""
        about = self.manifest["ids"]
        if self.manifest["version"] == 1:
            return about is None or all(type(name) is int for name in about)
        return about is None or about["type"] == "int64"

    def shard(self, line: Mapping[str, Any], verify: bool) -> Shard:
        """One of the shards, whose rows are numbered as those of the store."""
        path, size = records.inside(self.folder, line["file"]), line["bytes"]
        if not verify:
            file = PlainFile(path, size)
        elif self.manifest["version"] == 1:
            file = HashedFile(path, size, line["sha256"])
        else:
            file = BlockFile(path, size, line["blocks"])
        about = None if self.manifest["version"] == 1 else named(line)
        return Shard(
            file,
            self.first + line["first"],
            line["rows"],
            dims_of(self.manifest),
            dtype_of(self.manifest),
            about,
            self.manifest.get("factors", 0),
            outs_of(self.manifest),
        )

    def ids_file(self, verify: bool) -> PlainFile | None:
        """The file of the names, None where they are numbers or in the manifest."""
        about = self.manifest["ids"]
        if about is None or self.manifest["version"] == 1:
            return None
        path, size = records.inside(self.folder, about["file"]), about["bytes"] + 8 * -(-about["bytes"] // BLOCK)
        file = BlockFile(path, size, about["blocks"]) if verify else PlainFile(path, size)
        file.where = lambda begin, end: "names of rows"
        return file

    def ids(self, file: PlainFile | None) -> Sequence[int | str]:
        """Names of the rows, read from their file when they are asked for."""
        about = self.manifest["ids"]
        if about is None:
            return range(self.rows)
        if file is None:
            return about
        return RowIds(file, self.rows, about["type"], about["width"], about["bytes"])

    def check_ids(self, verify: bool) -> None:
        """StoreError where the names of the rows are damaged."""
        file = self.ids_file(verify)
        if file is not None:
            file.check_all()
            for _ in self.ids(file):
                pass

    def damage(self) -> Iterator[StoreError]:
        """Everything that is wrong with the shards and names, one file at a time, whatever was told about checking."""
        for line in self.lines:
            try:
                shard = self.shard(line, verify=True)
                shard.file.check_size()
                shard.check_all()
                _check_hash(cast(PlainFile, shard.file), line["sha256"])
            except StoreError as error:
                yield error
        try:
            self.check_ids(verify=True)
        except StoreError as error:
            yield error


@dataclass(frozen=True)
class State:
    """What a store is at one moment.

    Attributes:
        manifest: of the store.
        parts: in the order of the rows.
        live: numbers of the rows that are not deleted, int64 ascending; None where none is.
    """

    manifest: dict[str, Any]
    parts: list[Part]
    live: np.ndarray | None

    @property
    def rows(self) -> int:
        """Rows that are there, deleted ones aside."""
        return self.written if self.live is None else len(self.live)

    @property
    def written(self) -> int:
        """Rows that are written, deleted ones among them."""
        return sum(part.rows for part in self.parts)

    @property
    def built(self) -> int:
        """Rows that were ever built into the store, also those that are gone."""
        return sum(part.manifest.get("settings", {}).get("built", part.rows) for part in self.parts)

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of the shards, and the rows that are deleted of them."""
        digest = hashlib.sha256("".join(line["sha256"] for part in self.parts for line in part.lines).encode())
        if self.live is not None:
            digest.update(self.live.astype("<i8").tobytes())
        return digest.hexdigest()

    def ids(self, files: Sequence[PlainFile | None]) -> Sequence[int | str]:
        """Names of the rows, from the files of the parts' names."""
        names = [part.ids(file) for part, file in zip(self.parts, files, strict=True)]
        return names[0] if len(names) == 1 and self.live is None else JoinedIds(names, self.live)


def read_state(folder: Path, verify: bool, unfinished: bool = False) -> State:
    """What a store is now: as it was before a change that is under way, or as it is after it.

    Raises:
        StoreError: there is no store, its manifest or a journal is damaged or of another version, a build is unfinished
            (unless ``unfinished``).
    """
    return settled(folder, lambda manifest: _state(folder, manifest, verify, unfinished))


def settled(folder: Path, read: Callable[[dict[str, Any]], T]) -> T:
    """What ``read`` makes of a manifest; once more where the store was changed meanwhile, so that files were gone."""
    manifest = read_manifest(folder)
    while True:
        try:
            return read(manifest)
        except StoreError:
            now = read_manifest(folder)
            if now == manifest:
                raise
            manifest = now


def _state(folder: Path, manifest: dict[str, Any], verify: bool, unfinished: bool) -> State:
    parts, first = [], 0
    for entry in manifest.get("segments") or [{"folder": "", "rows": manifest["rows"]}]:
        part = _part(folder, manifest, entry, first)
        if part.done != part.rows and not unfinished:
            raise StoreError(f"{part.folder}: unfinished, {part.done} of {part.rows} rows; build it again to go on")
        parts.append(part)
        first += part.rows
    return State(manifest, parts, _live(folder, manifest, first, verify))


def _part(folder: Path, manifest: dict[str, Any], entry: Mapping[str, Any], first: int) -> Part:
    if not entry["folder"]:
        inner, own, label = folder, manifest, ""
    else:
        inner, label = folder / entry["folder"], f"{entry['folder']}/"
        if inner.is_symlink():
            raise StoreError(f"{inner}: is a link, expected a folder")
        own = read_manifest(inner)
        for key in ("version", "model", "projection", "layers", "dtype", "block_scales", "factors", "loss"):
            if own.get(key) != manifest.get(key):
                raise StoreError(f"{inner}: damaged, its {key} is not that of the store")
    if "settings" in entry and (own["rows"], fingerprint(own)) != (entry["rows"], entry["settings"]):
        raise StoreError(f"{inner}: damaged, its {MANIFEST} is not the one that the store names")
    return Part(inner, own, read_lines(inner, own), first, label)


def _live(folder: Path, manifest: Mapping[str, Any], rows: int, verify: bool) -> np.ndarray | None:
    about = manifest.get("tombstones")
    if about is None:
        return None
    path = records.inside(folder, about["file"])
    # One bit a row; rows that were appended later have none.
    size = about["bytes"] - 8 * block_count(about["bytes"])
    if not 0 < size <= -(-rows // 8) or about["rows"] >= rows:
        raise StoreError(f"{path}: damaged, {about['bytes']} bytes cannot delete {about['rows']} of {rows} rows")
    file = BlockFile(path, about["bytes"], about["blocks"]) if verify else PlainFile(path, about["bytes"])
    file.where = lambda begin, end: "which rows are deleted"
    file.check_size()
    dead = np.unpackbits(np.frombuffer(file.read(0, size), np.uint8), bitorder="little")
    if int(dead.sum()) != about["rows"] or dead[rows:].any():
        raise StoreError(f"{path}: damaged, it does not delete {about['rows']} of {rows} rows")
    live = np.ones(rows, bool)
    live[: len(dead)] = dead[:rows] == 0
    return np.flatnonzero(live)


def tombstone_bytes(live: np.ndarray, rows: int) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a file that leaves the rows ``live`` of ``rows``, and what a manifest says of it beside its name."""
    bits = np.ones(rows, np.uint8)
    bits[live] = 0
    data = np.packbits(bits, bitorder="little").tobytes()
    sums = BlockSums()
    sums.add(memoryview(data))
    table = sums.table()
    return data + table, {"rows": rows - len(live), "bytes": len(data) + len(table), "blocks": root_of(table)}


def dims_of(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Numbers per row of each layer."""
    return {name: layer["dim"] for name, layer in manifest["layers"].items()}


def outs_of(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of the outputs' side of each layer that is kept as factors."""
    return {name: layer["out"] for name, layer in manifest["layers"].items() if "out" in layer}


def widths_of(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Numbers on disk per row of each layer."""
    outs, factors = outs_of(manifest), manifest.get("factors", 0)
    return {
        name: factors * (outs[name] + dim // outs[name]) if name in outs else dim
        for name, dim in dims_of(manifest).items()
    }


def _check_hash(file: PlainFile, expected: str) -> None:
    found = sha256_of(file)
    if found != expected:
        raise file.damaged(f"its SHA-256 is {found}, {expected} was written", 0, file.size)
