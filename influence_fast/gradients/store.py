"""Per-sample gradients on disk: written shard by shard, resumed, verified, memory-mapped.

A store is a folder of ``manifest.json`` and shards ``shard-00000.safetensors``, ``shard-00001.safetensors``, ... Every
shard but the last holds ``shard_rows`` consecutive rows. Nothing is ever unpickled.

**Shard**, byte by byte (the safetensors format):

=================  =========================================================================================
bytes              content
=================  =========================================================================================
0 .. 8             H, the length of the header: unsigned, little-endian
8 .. 8 + H         header: JSON ``{name: {"dtype": .., "shape": [..], "data_offsets": [begin, end]}}``
8 + H + begin ..   the tensor: C-contiguous, little-endian, offsets counted from the header's end
=================  =========================================================================================

==============================  ==========  ==================================================================
tensor                          dtype       content
==============================  ==========  ==================================================================
``LAYER``                       F32 F16     ``(rows, dim)`` gradients, each out-major ``(k_out, k_in)``, a sketch,
                                BF16 I8     or the whole ``(out, in)`` gradient
``@scale/LAYER``                F32         ``(rows,)`` int8 and float16, powers of two there: gradient = scale * number;
                                            absent in float16 shards of version 0.1, where it is 1
``@sqnorm/LAYER``               F64         ``(rows,)`` ``|g|^2`` of the gradient before it was rounded to dtype
``@column/NAME``                any         ``(rows,)`` ``loss``, ``correct``, ``prediction``
==============================  ==========  ==================================================================

**Manifest**: ``format``, ``version``, ``model`` (SHA-256 of the weights), ``projection`` (text), ``layers`` (by name:
``shape`` (out, in), ``dim``, ``matrices`` with the identifier of each random matrix), ``dtype``, ``loss``, ``rows``,
``shard_rows``, ``ids`` (null: row numbers), ``settings`` of the build, ``facts`` (optional: which rows capture was verified
on, how many trained numbers the layers cover of how many), and ``shards``: ``file``, ``rows``, ``bytes`` and
``sha256`` of each.

A shard is written aside, fsynced and renamed; the manifest follows. So what the manifest names is whole, and a build
that was killed goes on with the shards that are missing. A reader in plain NumPy::

    import json, pathlib
    import numpy as np


    def read_store(folder, layer):
        folder = pathlib.Path(folder)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        parts = []
        for shard in manifest["shards"]:
            raw = np.memmap(folder / shard["file"], dtype=np.uint8, mode="r")
            size = int(raw[:8].view("<u8")[0])
            header = json.loads(bytes(raw[8 : 8 + size]))
            entry = header[layer]
            begin, end = entry["data_offsets"]
            data = raw[8 + size + begin : 8 + size + end]
            dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1"}[entry["dtype"]]
            rows = data.view(dtype).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                rows = (rows.astype("<u4") << 16).view("<f4")
            if (scale := header.get("@scale/" + layer)) is not None:
                begin, end = scale["data_offsets"]
                rows = rows * raw[8 + size + begin : 8 + size + end].view("<f4")[:, None]
            parts.append(rows)
        return np.concatenate(parts)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from influence_fast._files import atomic_path, sha256
from influence_fast.errors import InputError, StoreError

FORMAT, VERSION = "influence_fast.gradients", 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
Rows = slice | Sequence[int] | Tensor | None


class GradientStore:
    """A finished store, read through memory maps: see :meth:`open`.

    Attributes:
        path: the folder.
        layers: names in the model's order; ``dims`` and ``shapes`` give numbers per row and the weight's ``(out, in)``.
        ids: name of each row; its number unless the build was given others.
        meta: the manifest.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], verify: bool = False) -> None:
        self.path = path
        self.meta = manifest
        self._verify = verify
        self.layers: list[str] = list(manifest["layers"])
        self.dims: dict[str, int] = {name: layer["dim"] for name, layer in manifest["layers"].items()}
        self.shapes: dict[str, tuple[int, int]] = {
            name: (layer["shape"][0], layer["shape"][1]) for name, layer in manifest["layers"].items()
        }
        self.ids: Sequence[int | str] = range(manifest["rows"]) if manifest["ids"] is None else manifest["ids"]

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> GradientStore:
        """Open a finished store.

        With ``verify`` the first read of a shard, whoever reads, hashes it and raises StoreError where it is damaged:
        one more pass over the bytes that a job streams. :meth:`verify` does the same at once.

        Raises:
            StoreError: there is none, its manifest is damaged or of another version, the build is unfinished, or a
                shard is missing or cut short.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        done = sum(shard["rows"] for shard in manifest["shards"])
        if done != manifest["rows"]:
            raise StoreError(f"{folder}: unfinished, {done} of {manifest['rows']} rows; build it again to go on")
        store = cls(folder, manifest, verify)
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
        return [name.removeprefix("@column/") for name in self._shards[0].entries if name.startswith("@column/")]

    def column(self, name: str) -> Tensor:
        """``loss`` (float32), ``correct`` (bool) or ``prediction`` (int64) of every row: ``(n,)``.

        Raises:
            InputError: the store has no such column; lists those it has.
        """
        if name not in self.columns:
            raise InputError(f"column: the store has no {name!r}; it has {', '.join(self.columns)}")
        return torch.cat([shard.tensor(f"@column/{name}") for shard in self._shards])

    def verify(self) -> None:
        """Hash every shard and check what it holds; :class:`StoreError` names the first that is damaged."""
        for shard in self._shards:
            shard.check_bytes()
            shard.check_entries(self.dims, self.meta["dtype"])

    def check_sizes(self) -> None:
        """StoreError names the first shard that is missing or not as long as it was written."""
        for shard in self._shards:
            shard.check_size()

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of the shards in the manifest: tells stores apart without reading them."""
        return hashlib.sha256("".join(shard.sha256 for shard in self._shards).encode()).hexdigest()

    def shard_of(self, row: int) -> Path:
        """The file that holds a row."""
        return self._shards[int(np.searchsorted(self.firsts, row, "right")) - 1].path

    @cached_property
    def firsts(self) -> np.ndarray:
        """Number of the first row of each shard, and behind them the number of rows: int64 ``(shards + 1,)``."""
        return np.cumsum([0, *(shard.rows for shard in self._shards)], dtype=np.int64)

    def addresses(self, name: str) -> np.ndarray:
        """Where a tensor begins in each shard's mapped memory, while the store lives: int64 ``(shards,)``, 0 for none."""
        return np.array([shard.address(name) if name in shard.entries else 0 for shard in self._shards], np.int64)

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
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary, ExitStack() as stack:
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

    @cached_property
    def _shards(self) -> list[_Shard]:
        return [_Shard(self.path / shard["file"], **shard, verify=self._verify) for shard in self.meta["shards"]]

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


class _Shard:
    """One shard file. Runs of rows are read, rows here and there through a memory map."""

    def __init__(self, path: Path, file: str, rows: int, bytes: int, sha256: str, verify: bool = False) -> None:
        self.path, self.rows, self.bytes, self.sha256 = path, rows, bytes, sha256
        self._verify = verify

    def check_size(self) -> None:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise StoreError(f"{self.path}: missing") from None
        if size != self.bytes:
            raise StoreError(f"{self.path}: damaged, {size} bytes long where the manifest says {self.bytes}")

    def check_bytes(self) -> None:
        self.check_size()
        found = sha256(self.path)
        if found != self.sha256:
            raise StoreError(f"{self.path}: damaged, its SHA-256 is {found}, the manifest says {self.sha256}")

    def check_entries(self, dims: Mapping[str, int], dtype: str) -> None:
        for layer, dim in dims.items():
            entry = self.entries.get(layer)
            if entry is None or entry["shape"] != [self.rows, dim] or _TORCH[entry["dtype"]] != DTYPES[dtype]:
                raise StoreError(f"{self.path}: expected {dtype} ({self.rows}, {dim}) for {layer!r}, found {entry}")
            if not self.tensor(f"@sqnorm/{layer}").isfinite().all():
                raise StoreError(f"{self.path}: gradients of {layer!r} are not finite")

    @cached_property
    def _bytes(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        try:
            return np.memmap(self.path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path}: cannot be read ({error})") from None

    @cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        if self._verify:
            self.check_bytes()
        try:
            # Read, not mapped: touching a map of each of many shards would keep pages of all of them in memory.
            with open(self.path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > os.fstat(file.fileno()).st_size:
                    raise ValueError(f"its length is {size} bytes")
                header = json.loads(file.read(size))
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read ({error})") from None
        except ValueError as error:
            raise StoreError(f"{self.path}: damaged header ({error})") from None
        header.pop("__metadata__", None)
        return 8 + size, header

    @property
    def entries(self) -> dict[str, Any]:
        return self._header[1]

    def address(self, name: str) -> int:
        start, _, _ = self._place(name)
        return int(self._bytes.ctypes.data) + start

    def array(self, name: str, rows: slice | np.ndarray = slice(None)) -> Tensor:
        """A copy of some rows of a tensor, in its own dtype."""
        start, shape, dtype = self._place(name)
        width = dtype.itemsize * math.prod(shape[1:])
        if not isinstance(rows, slice):
            flat = self._bytes[start : start + shape[0] * width].reshape(shape[0], width)
            return torch.from_numpy(flat[rows]).view(dtype).reshape(-1, *shape[1:])
        begin, end, _ = rows.indices(shape[0])
        out = torch.empty(end - begin, *shape[1:], dtype=dtype, device="cpu")
        self._read(out, start + begin * width)
        return out

    def tensor(self, name: str) -> Tensor:
        return self.array(name)

    def gradients(self, layer: str, rows: slice | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Rows of a layer in float32, into ``out`` if given."""
        start, shape, dtype = self._place(layer)
        if out is not None and isinstance(rows, slice) and dtype == torch.float32:
            self._read(out, start + rows.start * 4 * shape[1])
            return out
        values = self.array(layer, rows).float()
        if f"@scale/{layer}" in self.entries:
            values = values * self.array(f"@scale/{layer}", rows)[:, None]
        return values if out is None else out.copy_(values)

    def _place(self, name: str) -> tuple[int, list[int], torch.dtype]:
        start, header = self._header
        if name not in header:
            raise StoreError(f"{self.path}: has no {name!r}")
        begin, _ = header[name]["data_offsets"]
        return start + begin, header[name]["shape"], _TORCH[header[name]["dtype"]]

    def _read(self, out: Tensor, at: int) -> None:
        """Fill a contiguous tensor; a file that has become shorter is an error here, and a crash through a map."""
        view = out.view(torch.uint8).numpy().reshape(-1).data
        try:
            with open(self.path, "rb", buffering=0) as file:
                while len(view):
                    count = os.preadv(file.fileno(), [view], at)
                    if count == 0:
                        raise StoreError(f"{self.path}: damaged, it ends at {at} where there should be rows")
                    view, at = view[count:], at + count
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read ({error})") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store, finished or not; StoreError where there is none, or it is damaged or of another version."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{folder}: no gradient store (no manifest.json)") from None
    except (ValueError, OSError) as error:
        raise StoreError(f"{folder}: manifest.json is damaged ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{folder}: manifest.json is not that of a gradient store")
    if manifest.get("version") != VERSION:
        raise StoreError(f"{folder}: store version {manifest.get('version')}, this library reads {VERSION}")
    missing = {"model", "projection", "layers", "dtype", "loss", "rows", "shard_rows", "ids", "shards"} - set(manifest)
    if missing:
        raise StoreError(f"{folder}: manifest.json is damaged, it lacks {', '.join(sorted(missing))}")
    return manifest


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
