"""The files of an index: a sealed ``index.json``, which names each file with its size and checksums, and those files.

``sha256`` and ``xxh3`` are of whole files, ``blocks`` (of version 4, where a file is checked as it is read) of the checksums
behind it (``influence_fast._blocks``).

A new index is written beside one that is there: its files have names of their own, ``index.json`` is replaced in one step,
and what it no longer names is removed. So an index is the old one or the new one, whatever stops the process.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict
from xxhash import xxh3_64

from influence_fast import _records as records
from influence_fast._files import atomic_write, locked, make_folder, remove_leftovers
from influence_fast.errors import InputError, StoreError

FORMAT, VERSIONS = "influence_fast.index", (3, 4)
DOCUMENT = "index.json"
_OURS = re.compile(r"scan-\d+\.bin|band-\d+\.(faiss|rows|npy)|curvature-\d+\.safetensors")
_READ = 1 << 20


class _File(TypedDict):
    file: Annotated[Any, records.matching(_OURS.pattern, "a file of an index")]
    bytes: records.Whole
    sha256: records.Sha256
    xxh3: records.Xxh3
    blocks: NotRequired[records.Xxh3]


class _Store(TypedDict):
    path: Annotated[Any, records.matching(r"[^/\0][^\0]*", "a path that begins at the index")]
    digest: records.Sha256
    rows: records.Pair
    written: NotRequired[records.Positive]


class _Segment(TypedDict):
    rows: Annotated[int, Field(ge=1, le=2**31 - 1)]
    data: _File


class _Partition(TypedDict):
    longest: records.Number
    whole: bool
    index: _File
    rows: _File


class _Curvature(TypedDict):
    method: Literal["datainf", "trak", "trackstar", "ekfac"]
    layer: records.Text
    damping: records.Number
    share: records.Number
    of: records.Sha256
    data: _File


class _Index(TypedDict):
    factory: records.Text
    metric: Literal["dot", "cosine"]
    layers: list[records.Text]
    dims: Annotated[dict[records.Text, records.Positive], Field(min_length=1)]
    projection: records.Text
    model: records.Text
    recall: records.Number
    breadth: Annotated[int, Field(ge=1, le=2**31)]
    stores: list[_Store]
    segments: list[_Segment]
    partitions: list[_Partition]
    curvature: NotRequired[list[_Curvature]]


_DOCUMENT = records.Schema(_Index)


def read_document(folder: Path) -> dict[str, Any]:
    """What ``index.json`` says.

    Raises:
        StoreError: there is none, it is damaged, or of another version; a file that it names is missing or of another size.
    """
    where = f"{folder}: {DOCUMENT}"
    raw = records.read_bytes(records.inside(folder, DOCUMENT), f"{folder}: no index (no {DOCUMENT})")
    try:
        document = records.parse(where, raw)
    except StoreError as error:
        raise StoreError(f"{error}; a damaged index: build it again") from None
    version = document.get("version") if isinstance(document, dict) else None
    if type(version) is not int:
        raise StoreError(f"{where} is not that of an index; a damaged index: build it again")
    if version not in VERSIONS or document.get("format") != FORMAT:
        known = " and ".join(map(str, VERSIONS))
        raise StoreError(f"{folder}: index version {version}, this library reads {known}; build it again")
    try:
        document = records.unseal(where, raw)
        _DOCUMENT.check(where, document)
    except StoreError as error:
        raise StoreError(f"{error}; a damaged index: build it again") from None
    for entry in files_of(document):
        path = records.inside(folder, entry["file"])
        if not path.exists():
            raise StoreError(f"{folder}: no index (no {entry['file']})")
        if path.stat().st_size != entry["bytes"]:
            raise StoreError(f"{path}: damaged index, {path.stat().st_size} bytes where {entry['bytes']} were written")
    return document


def files_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of all files that a document names."""
    parts = [part[key] for part in document["partitions"] for key in ("index", "rows")]
    kept = [part["data"] for part in document.get("curvature", [])]
    return [*(segment["data"] for segment in document["segments"]), *parts, *kept]


def check_files(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """StoreError names the first file that is not as it was written, by its fast checksum."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        paths = [folder / entry["file"] for entry in entries]
        for path, entry, found in zip(paths, entries, pool.map(_xxh3, paths), strict=True):
            if found != entry["xxh3"]:
                raise StoreError(f"{path}: damaged index, its checksum is {found} and not {entry['xxh3']}")


def find_damage(path: Path) -> Iterator[StoreError]:
    """Everything that is wrong with the files of an index, each hashed as a whole."""
    try:
        entries = files_of(read_document(path))
    except StoreError as error:
        yield error
        return
    for entry in entries:
        found = describe(path / entry["file"])
        for name in ("xxh3", "sha256"):
            if found[name] != entry[name]:
                yield StoreError(
                    f"{path / entry['file']}: damaged index, its {name} is {found[name]} and not {entry[name]}"
                )
                break


def describe(path: Path) -> dict[str, Any]:
    """What a document says of a file."""
    sha, fast, size = hashlib.sha256(), xxh3_64(), 0
    with open(path, "rb") as file:
        while block := file.read(_READ):
            sha.update(block)
            fast.update(block)
            size += len(block)
    return {"file": path.name, "bytes": size, "sha256": sha.hexdigest(), "xxh3": fast.hexdigest()}


class IndexFolder:
    """A folder that an index is written into, by one process at a time; made by :func:`writing`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: list[Path] = []

    def new(self, name: str) -> Path:
        """A file that is not there yet, of a name such as ``scan-{:05d}.bin``."""
        number = 0
        while (path := self.path / name.format(number)).exists() or path in self.made:
            number += 1
        self.made.append(path)
        return path

    def has(self, path: Path | None) -> bool:
        """Whether a file is one of this folder."""
        return path is not None and path.parent == self.path and path.exists()

    def publish(self, document: dict[str, Any]) -> None:
        """Name the files of the new index in place of the old one's, and remove what is no longer named."""
        atomic_write(self.path / DOCUMENT, records.seal({"format": FORMAT, "version": VERSIONS[-1], **document}))
        self.made = []
        _remove_others(self.path, {entry["file"] for entry in files_of(document)})


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[IndexFolder]:
    """Hold a folder for an index; whatever fails within leaves it as it was.

    Raises:
        InputError: the folder holds something else than an index.
        StoreError: another process is writing there.
        InfluenceError: nothing can be written there; says why.
    """
    folder = Path(path)
    make_folder(folder)
    folder = folder.resolve()
    begun = (folder / DOCUMENT).exists()
    if not begun and any(not _is_ours(file) for file in folder.iterdir()):
        raise InputError(f"{folder}: is not empty and holds no index; choose a new folder")
    with locked(folder / ".lock"):
        remove_leftovers(folder)
        with suppress(StoreError):
            # What a process left that was killed; where index.json cannot be read it may still name them.
            _remove_others(folder, {entry["file"] for entry in files_of(read_document(folder))} if begun else set())
        place = IndexFolder(folder)
        try:
            yield place
        except BaseException:
            for file in place.made:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
            raise


def remove_unnamed(path: str | os.PathLike[str]) -> None:
    """Remove the old files of an index whose writer was killed behind its last step; raises as :func:`writing`."""
    with writing(path):
        pass


def _is_ours(file: Path) -> bool:
    name = file.name.removesuffix(".part")
    return name in (".lock", DOCUMENT) or _OURS.fullmatch(name) is not None


def _remove_others(folder: Path, kept: set[str]) -> None:
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name) and file.name not in kept:
            file.unlink(missing_ok=True)


def _xxh3(path: Path) -> str:
    # Through a map, which copies nothing: the search maps the same pages next.
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return xxh3_64().hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            return xxh3_64(view).hexdigest()
