"""Writes the shards of a store, in any order, each whole or not at all; ``store`` describes the bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from influence_fast._files import atomic_write, locked, remove_leftovers
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.store import DTYPES, FORMAT, VERSION, read_manifest


class StoreWriter:
    """Writes the shards of one store, in any order; the manifest follows each.

    The ranks of one build write together, each its own shards: rank 0 ``leads``, enters first and leaves last, the
    others add their shards to the manifest that it has begun.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], leads: bool = True, together: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self._leads = leads
        self._together = together
        self._held = ExitStack()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        layers: Mapping[str, tuple[int, int]],
        dims: Mapping[str, int],
        ids: Sequence[int | str],
        projection: str,
        identifiers: Mapping[str, Mapping[str, str]],
        model: str,
        loss: str,
        dtype: str,
        shard_rows: int,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
        resume: bool = True,
        leads: bool = True,
        together: bool = False,
    ) -> StoreWriter:
        """Begin a store, or go on with one that was begun with the same arguments.

        Raises:
            InputError: unknown dtype; something is there already and ``resume`` is false.
            StoreError: what is there was begun with other arguments (names the first that differs).
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        folder = Path(path)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            "projection": projection,
            "layers": {
                name: {"shape": list(shape), "dim": dims[name], "matrices": dict(identifiers.get(name, {}))}
                for name, shape in layers.items()
            },
            "dtype": dtype,
            "loss": loss,
            "rows": len(ids),
            "shard_rows": shard_rows,
            "ids": None if all(name == row for row, name in enumerate(ids)) else list(ids),
            "settings": dict(settings),
            **({"facts": dict(facts)} if facts else {}),
            "shards": [],
        }
        if (folder / "manifest.json").exists():
            earlier = read_manifest(folder)
            if not resume:
                raise InputError(f"{folder}: holds a store already; remove it, or pass resume=True")
            _check_same(folder, earlier, json.loads(json.dumps(manifest)))
            manifest["shards"] = earlier["shards"]
            if "facts" in earlier:
                manifest["facts"] = earlier["facts"]
            else:
                manifest.pop("facts", None)
        elif folder.exists() and any(not _left_over(file) for file in folder.iterdir()):
            raise InputError(f"{folder}: is not empty and holds no store; choose a new folder")
        elif not leads:
            raise StoreError(f"{folder}: rank 0 has begun this store, another rank does not see it; share the folder")
        return cls(folder, manifest, leads, together)

    def __enter__(self) -> StoreWriter:
        if not self._leads:
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(locked(self.path / ".lock"))
        remove_leftovers(self.path)
        if not (self.path / "manifest.json").exists():
            self._publish()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def span(self, shard: int) -> range:
        """Rows of one shard."""
        size = self.manifest["shard_rows"]
        return range(shard * size, min((shard + 1) * size, self.manifest["rows"]))

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        done = {shard["file"] for shard in self.manifest["shards"]}
        count = -(-self.manifest["rows"] // self.manifest["shard_rows"])
        return [number for number in range(count) if _shard_name(number) not in done]

    def write(self, shard: int, gradients: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> None:
        """Write one shard: ``{layer: (rows, dim)}`` and ``{column: (rows,)}``.

        Raises:
            InputError: a gradient that is not finite, or overflows the store's dtype; names layer and row.
            InfluenceError: the disk is full. Shards written so far stay valid, and the build can go on later.
        """
        data = save(self._tensors(self.span(shard), gradients, columns))
        name = _shard_name(shard)
        atomic_write(self.path / name, data)
        entry = {
            "file": name,
            "rows": len(self.span(shard)),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        with self._alone():
            if self._together:
                self.manifest["shards"] = read_manifest(self.path)["shards"]
            self.manifest["shards"] = sorted([*self.manifest["shards"], entry], key=lambda item: item["file"])
            self._publish()

    def _alone(self) -> AbstractContextManager[None]:
        """No other rank changes the manifest meanwhile."""
        return locked(self.path / ".manifest.lock", wait=True) if self._together else nullcontext()

    def _tensors(
        self, span: range, gradients: Mapping[str, Tensor], columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors = {f"@column/{name}": column.cpu().contiguous() for name, column in columns.items()}
        dtype = DTYPES[self.manifest["dtype"]]
        for name, layer in self.manifest["layers"].items():
            gradient = gradients[name].detach().cpu()
            if tuple(gradient.shape) != (len(span), layer["dim"]):
                raise InputError(f"{name}: expected ({len(span)}, {layer['dim']}), got {tuple(gradient.shape)}")
            sqnorm = torch.linalg.vecdot(gradient.double(), gradient.double())
            self._check_finite(name, span, sqnorm, "is not finite")
            if dtype in (torch.int8, torch.float16):
                scale, rounded = scaled(gradient, dtype)
                tensors[f"@scale/{name}"] = scale
            else:
                rounded = gradient.to(dtype)
                self._check_finite(name, span, rounded.float().abs().amax(1), f"overflows {self.manifest['dtype']}")
            tensors[name], tensors[f"@sqnorm/{name}"] = rounded.contiguous(), sqnorm
        return tensors

    def _check_finite(self, layer: str, span: range, values: Tensor, what: str) -> None:
        bad = values.isfinite().logical_not().nonzero()
        if len(bad):
            row = span[int(bad[0])]
            name = row if self.manifest["ids"] is None else self.manifest["ids"][row]
            raise InputError(f"gradient of layer {layer!r} for row {name!r} {what}")

    def _publish(self) -> None:
        atomic_write(self.path / "manifest.json", json.dumps(self.manifest, indent=1) + "\n")


def scaled(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows as int8 or float16 numbers, and what each row is to be multiplied with: float32 ``(rows,)``.

    float16 ends at 6e-8 and 65504, and gradients of rows that are learned well lie below. A power of two, by which a row's
    largest number comes between 2^14 and 2^15, loses nothing: what is 2^-29 of the largest still has all 11 bits.
    """
    largest, tiny = gradient.abs().amax(1), torch.finfo(torch.float32).tiny
    if dtype == torch.int8:
        scale = largest.float() / 127
        return scale, (gradient / scale.clamp_min(tiny)[:, None]).round().to(dtype)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 15).float().clamp_min(tiny)
    return scale, (gradient / scale[:, None]).to(dtype)


def recorded(path: str | os.PathLike[str] | None, setting: str) -> Any:
    """A setting that an earlier build of the store at ``path`` began with, None if there is no store."""
    if path is None or not (Path(path) / "manifest.json").exists():
        return None
    return read_manifest(Path(path)).get("settings", {}).get(setting)


def recorded_facts(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What an earlier build of the store at ``path`` found worth knowing, None if there is no store."""
    if not (Path(path) / "manifest.json").exists():
        return None
    return dict(read_manifest(Path(path)).get("facts") or {})


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _left_over(file: Path) -> bool:
    """What a build that was killed before its first manifest leaves: nothing of anybody's."""
    return file.name in (".lock", ".manifest.lock", "manifest.json.part")


def _check_same(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    pairs = [(key, earlier.get(key), now[key]) for key in now if key not in ("shards", "settings", "facts")]
    pairs += [(key, earlier.get("settings", {}).get(key), value) for key, value in now["settings"].items()]
    for key, was, wanted in pairs:
        if was != wanted:
            if isinstance(was, dict) and isinstance(wanted, dict):
                was, wanted = list(was), list(wanted)
            raise StoreError(
                f"{folder}: was built with another {key}: {_short(was)}, not {_short(wanted)}; choose a new folder"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
