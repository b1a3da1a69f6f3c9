"""bergson's gradient stores: read as ``{layer: gradients}``, made into a store of ours, and written.

A folder with ``gradients.bin``, the rows of all modules side by side, and ``info.json``, which has their sizes in order and
the dtype; with ``offsets.npy`` the rows are tokens, and those of item ``i`` are ``offsets[i]:offsets[i + 1]``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from influence_fast._files import atomic_path, atomic_write, disk_errors, make_folder
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.store import GradientStore
from influence_fast.gradients.store_writer import StoreWriter
from influence_fast.ops.projections import Projection

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# What a float is called where a store has the type of each field.
_CODES = {"f2": "float16", "f4": "float32", "f8": "float64"}
_BLOCK_BYTES = 1 << 26
# Of its random matrices; others have other bits.
_PROJECTION_VERSION = 2


class BergsonStore(Mapping[str, Tensor]):
    """``{layer: (rows, dim)}`` of a store of bergson's, in its dtype and mapped, not read: what is used comes from disk.

    It goes wherever gradients in memory go, such as :func:`~influence_fast.influence`.

    Attributes:
        path: the folder.
        dims: numbers of a row by layer, in order.
        rows: how many there are; tokens where there are ``offsets``.
        offsets: int64 ``(items + 1,)``, the first token of each item; None where a row is an item.
        projection: what the gradients were projected with, as far as it is one of ours; None where it is not known.
    """

    def __init__(self, path: Path, info: Mapping[str, Any]) -> None:
        self.path = path
        self.dims: dict[str, int] = {str(name): int(size) for name, size in info["grad_sizes"].items()}
        self.rows = int(info["num_grads"])
        self.dtype = _dtype(path, info)
        self.offsets = _offsets(path, info, self.rows)
        self.projection = _projection(path)
        width = sum(self.dims.values())
        file, size = path / "gradients.bin", self.rows * width * self.dtype.itemsize
        if not self.dims or self.rows < 1 or min(self.dims.values()) < 1:
            raise StoreError(f"{path}: expected rows and modules, got {self.rows} rows of {self.dims}")
        found = file.stat().st_size if file.exists() else -1
        if found != size:
            raise StoreError(f"{file}: expected {size} bytes ({self.rows} rows of {width}), got {max(found, 0)}")
        # Private: what is written to the tensors never reaches the file.
        flat = torch.from_file(str(file), shared=False, size=self.rows * width, dtype=self.dtype)
        self._parts = dict(zip(self.dims, flat.view(self.rows, width).split(list(self.dims.values()), 1), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"BergsonStore({str(self.path)!r}: {self.rows} rows, {len(self)} layers, {self.dtype})"

    @property
    def layers(self) -> list[str]:
        """Names of the modules, in the order of their numbers."""
        return list(self.dims)

    @property
    def samples(self) -> int:
        """How many items there are."""
        return self.rows if self.offsets is None else len(self.offsets) - 1

    def per_item(self, name: str, items: range | None = None) -> Tensor:
        """Float32 ``(items, dim)`` of a layer: rows, or the sum of each item's tokens, which is its gradient."""
        chosen = range(self.samples) if items is None else items
        if self.offsets is None:
            return self[name][chosen.start : chosen.stop].float()
        bounds = self.offsets[chosen.start : chosen.stop + 1]
        tokens = self[name][int(bounds[0]) : int(bounds[-1])].float()
        owner = np.repeat(np.arange(len(chosen)), np.diff(bounds))
        return tokens.new_zeros(len(chosen), self.dims[name]).index_add_(0, torch.from_numpy(owner), tokens)


def open_store(path: str | os.PathLike[str]) -> BergsonStore:
    """Open a gradient store that bergson wrote, of items or of tokens, in any of its dtypes.

    Raises:
        StoreError: there is none, a file is damaged or cut short, or it has a dtype that is not known.
    """
    folder = Path(path)
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        if not isinstance(info, dict) or not isinstance(info["grad_sizes"], dict):
            raise TypeError("no sizes of modules")
        return BergsonStore(folder, info)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder}: expected a gradient store of bergson: {type(error).__name__}: {error}") from None


def import_store(
    source: str | os.PathLike[str] | BergsonStore,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    ids: Sequence[int | str] | None = None,
    model: str = "bergson",
    resume: bool = True,
) -> GradientStore:
    """Write a store of ours with the rows of bergson's, for whatever takes one, such as ``InfluenceIndex.build``.

    A row is an item: the tokens of one are added.

    Args:
        source: the folder, or what :func:`open_store` gave.
        path: a new folder.
        dtype: as of :func:`~influence_fast.build_store`.
        ids: names of the items; their numbers by default.
        model: what the store calls the model: stores of different ones are not searched with each other.
        resume: whether to go on with an import that was begun there.

    Raises:
        InputError: as many ids as there are no items; numbers that are not finite; something else is in ``path``.
        StoreError: as of :func:`open_store`.
    """
    found = source if isinstance(source, BergsonStore) else open_store(source)
    names = range(found.samples) if ids is None else ids
    if len(names) != found.samples:
        raise InputError(f"ids: expected one for each of the {found.samples} items, got {len(names)}")
    step = max(1, _BLOCK_BYTES // (4 * sum(found.dims.values())))
    about = (found.path / "info.json").read_bytes()
    with StoreWriter.create(
        path,
        layers={name: (dim, 1) for name, dim in found.dims.items()},
        dims=found.dims,
        ids=names,
        projection=str(found.projection or Projection("identity")),
        identifiers={},
        model=model,
        loss="bergson",
        dtype=dtype,
        shard_rows=step,
        settings={"data": hashlib.sha256(about).hexdigest(), "source": str(found.path.resolve())},
        resume=resume,
    ) as writer:
        for shard in writer.missing:
            rows = writer.span(shard)
            writer.write(shard, {name: found.per_item(name, rows) for name in found.layers}, {})
    return GradientStore.open(path)


def export_store(
    gradients: GradientStore | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    names: Mapping[str, str] | None = None,
    offsets: Sequence[int] | Tensor | None = None,
    projection: Projection | str | None = None,
) -> None:
    """Write gradients as a store that bergson reads: its ``load_gradients``, ``Attributor`` and FAISS index.

    ``processor_config.yaml`` beside it says how they were projected, where bergson can project so too.

    Args:
        gradients: a store, or ``{layer: (rows, dim)}``.
        path: a new folder, or one without ``info.json``.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``float64``.
        names: what bergson calls a layer, where it is something else.
        offsets: of a row for each token, the first row of each item and behind the last, ``(items + 1,)``.
        projection: of gradients in memory.

    Raises:
        InputError: an unknown dtype or layer, no rows, layers of different numbers of rows, offsets that do not fit, or a
            store there.
        InfluenceError: the disk is full.
    """
    if dtype not in _DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    store = gradients if isinstance(gradients, GradientStore) else None
    layers = list(gradients.layers if isinstance(gradients, GradientStore) else gradients)
    rows = _count(gradients)
    unknown = [name for name in names or {} if name not in layers]
    if unknown:
        raise InputError(f"names: expected some of {', '.join(layers)}, got {unknown[0]!r}")
    called = [(names or {}).get(name, name) for name in layers]
    if len(set(called)) < len(called):
        raise InputError(f"names: two layers have the same, got {called}")
    tokens = None if offsets is None else torch.as_tensor(offsets).to(torch.int64).numpy()
    if tokens is not None and (tokens.ndim != 1 or tokens[0] != 0 or tokens[-1] != rows or (np.diff(tokens) < 0).any()):
        raise InputError(f"offsets: expected ascending numbers from 0 to the {rows} rows, got {tokens[:8].tolist()}")
    folder = Path(path)
    if (folder / "info.json").exists():
        raise InputError(f"path: {folder} holds a store already; choose a new folder")

    def block(name: str, begin: int, end: int) -> Tensor:
        if store is not None:
            return store.read(name, slice(begin, end))
        return cast(Mapping[str, Tensor], gradients)[name][begin:end].detach().cpu()

    sizes = {new: block(name, 0, 1).shape[1] for new, name in zip(called, layers, strict=True)}
    make_folder(folder)
    step = max(1, _BLOCK_BYTES // (4 * sum(sizes.values())))
    with disk_errors(folder), atomic_path(folder / "gradients.bin") as temporary, open(temporary, "wb") as file:
        for begin in range(0, rows, step):
            parts = [block(name, begin, min(begin + step, rows)).to(_DTYPES[dtype]) for name in layers]
            file.write(torch.cat(parts, 1).contiguous().flatten().view(torch.uint8).numpy().data)
    if tokens is not None:
        atomic_write(folder / "offsets.npy", _npy(tokens))
    how = store.meta["projection"] if store is not None else projection
    _write_processor(folder, None if how is None else Projection.parse(how))
    info = {
        "attribute_tokens": tokens is not None,
        "num_items": rows if tokens is None else len(tokens) - 1,
        "num_grads": rows,
        "grad_sizes": sizes,
        "base_dtype": dtype,
    }
    # Last: what has it is whole.
    atomic_write(folder / "info.json", json.dumps(info, indent=2))


def _dtype(path: Path, info: Mapping[str, Any]) -> torch.dtype:
    name = info.get("base_dtype")
    if name is None:
        # As stores had it that were arrays of records: '(256,)<f4', or a scalar's.
        text = str(info["dtype"]["formats"][0]).split(")")[-1].lstrip("<=|")
        name = _CODES.get(text, text)
    if name not in _DTYPES:
        raise StoreError(f"{path}: expected dtype {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def _offsets(path: Path, info: Mapping[str, Any], rows: int) -> np.ndarray | None:
    if not info.get("attribute_tokens"):
        return None
    found = np.load(path / "offsets.npy", allow_pickle=False).astype(np.int64)
    if found.ndim != 1 or len(found) < 2 or found[0] != 0 or found[-1] != rows or (np.diff(found) < 0).any():
        raise StoreError(f"{path / 'offsets.npy'}: expected ascending numbers from 0 to the {rows} rows")
    return found


def _projection(path: Path) -> Projection | None:
    """What ``processor_config.yaml`` says, by its lines ``name: value``; None where it is no projection of ours."""
    try:
        lines = (path / "processor_config.yaml").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    size, seed = said.get("projection_dim", "null"), said.get("projection_seed", "null")
    if size in ("null", "0"):
        return Projection("identity")
    plain = said.get("projection_target") == "per_module" and said.get("reshape_to_square") == "false"
    ours = said.get("projection_scale") == "jl" and said.get("projection_version") == str(_PROJECTION_VERSION)
    kinds: dict[str, Any] = {"rademacher": "rademacher", "normal": "gaussian"}
    kind = kinds.get(said.get("projection_type", ""))
    if not (plain and ours and kind):
        return None
    return Projection(kind, (int(size), int(size)), None if seed == "null" else int(seed))


def _write_processor(folder: Path, projection: Projection | None) -> None:
    kinds = {"rademacher": "rademacher", "gaussian": "normal", "identity": "rademacher"}
    dim = () if projection is None or projection.kind == "identity" else projection.dim
    square = isinstance(dim, tuple) and len(set(dim)) < 2
    if projection is None or not square or projection.kind not in kinds:
        return
    settings = {
        "projection_dim": cast(tuple[int, int], dim)[0] if dim else None,
        "reshape_to_square": False,
        "projection_type": kinds[projection.kind],
        "projection_target": "per_module",
        "projection_scale": "jl",
        "include_bias": False,
        "projection_seed": projection.seed,
        "projection_version": _PROJECTION_VERSION,
    }
    for file in ("normalizers.pth", "hessians.pth", "hessians_eigen.pth"):
        empty = io.BytesIO()
        torch.save({}, empty)
        atomic_write(folder / file, empty.getvalue())
    lines = [f"{name}: {json.dumps(value).strip(chr(34))}\n" for name, value in settings.items()]
    atomic_write(folder / "processor_config.yaml", "".join(lines))


def _count(gradients: GradientStore | Mapping[str, Tensor]) -> int:
    if isinstance(gradients, GradientStore):
        return len(gradients)
    counts = {name: len(tensor) for name, tensor in gradients.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise InputError(f"gradients: expected layers of one number of rows, got {counts}")
    return next(iter(counts.values()))


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()
