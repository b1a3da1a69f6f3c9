"""Writes the shards of a store, in any order, each whole or not at all; ``store_format`` describes the bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast import _records as records
from influence_fast._blocks import BLOCK, BlockSums, root_of
from influence_fast._files import (
    append_line,
    atomic_path,
    atomic_write,
    disk_errors,
    locked,
    make_folder,
    remove_leftovers,
)
from influence_fast.errors import InputError, StoreError
from influence_fast.gradients import block_scales, row_ids
from influence_fast.gradients.row_factors import as_factors
from influence_fast.gradients.shard import DTYPES, SUMS, Shard, bytes_of, layout
from influence_fast.gradients.store_format import FORMAT, JOURNAL, MANIFEST, VERSION
from influence_fast.gradients.store_records import (
    BUILT,
    Part,
    check_line,
    dtype_entries,
    dtype_of,
    fingerprint,
    named,
    read_journal,
    read_lines,
    read_manifest,
    read_state,
    verifying,
)

_log = logging.getLogger("influence_fast")


class StoreWriter:
    """Writes the shards of one store, in any order; a line of the journal follows each.

    The ranks of one build write together, each its own shards: rank 0 ``leads``, enters first and leaves last, the
    others add to the journal that it has begun.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], ids: Sequence[int | str], leads: bool = True, together: bool = False
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._ids = ids
        self._leads = leads
        self._together = together
        self._held = ExitStack()
        self._settings = fingerprint(manifest)
        self._lines = self._known_lines()

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
        factors: int | None = None,
        outs: Mapping[str, int] | None = None,
    ) -> StoreWriter:
        """Begin a store, or go on with one that was begun with the same arguments.

        Raises:
            InputError: unknown dtype; something is there already and ``resume`` is false.
            StoreError: what is there was begun with other arguments (names the first that differs).
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        folder = Path(path)
        about, pieces = row_ids.encoded(ids)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "requires": [
                *(["block_scales"] if dtype in block_scales.BITS else []),
                *([] if factors is None else ["factors"]),
            ],
            "model": model,
            "projection": projection,
            "layers": {
                name: {
                    "shape": list(shape),
                    "dim": dims[name],
                    "matrices": dict(identifiers.get(name, {})),
                    **({"out": outs[name]} if outs and name in outs else {}),
                }
                for name, shape in layers.items()
            },
            **({} if factors is None else {"factors": factors}),
            **dtype_entries(dtype),
            "loss": loss,
            "rows": len(ids),
            "shard_rows": shard_rows,
            "block": BLOCK,
            "ids": about and {**about, "blocks": root_of(_table(pieces()))},
            "settings": dict(settings),
            **({"facts": dict(facts)} if facts else {}),
        }
        # As it comes back from a file.
        manifest = json.loads(json.dumps(manifest))
        with disk_errors(folder):
            begun = (folder / MANIFEST).exists()
            foreign = not begun and folder.exists() and any(not _left_over(file) for file in folder.iterdir())
        if begun:
            earlier = read_manifest(folder)
            if not resume:
                raise InputError(f"{folder}: holds a store already; remove it, or pass resume=True")
            if set(earlier.get("requires", [])) - BUILT:
                raise StoreError(
                    f"{folder}: rows were appended to this store or deleted; open it, or choose a new folder"
                )
            _check_same(folder, earlier, manifest)
            manifest = earlier
        elif foreign:
            raise InputError(f"{folder}: is not empty and holds no store; choose a new folder")
        elif not leads:
            raise StoreError(f"{folder}: rank 0 has begun this store, another rank does not see it; share the folder")
        return cls(folder, manifest, ids, leads, together)

    def __enter__(self) -> StoreWriter:
        if not self._leads:
            return self
        make_folder(self.path)
        self._held.enter_context(locked(self.path / ".lock"))
        try:
            self._begin()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._leads and self.manifest["version"] == VERSION and not any(error):
                self._lines = self._known_lines()
                if not self.missing and [line["first"] for line in self._lines] != sorted(
                    line["first"] for line in self._lines
                ):
                    # Ranks finish as they may, and shards are mended later: a store is the same bytes however it was made.
                    self._write_journal()
        finally:
            self._held.close()

    def _begin(self) -> None:
        """Write what precedes the shards, or mend what an earlier build left."""
        if self.manifest["version"] != VERSION:
            if self.missing:
                raise StoreError(
                    f"{self.path}: an unfinished store of version 1; rewrite it by influence-fast upgrade, then build again"
                )
            whole = read_state(self.path, verifying()).parts[0]
            for damage in whole.damage() if verifying() else ():
                raise damage
            return
        remove_leftovers(self.path)
        if not (self.path / MANIFEST).exists():
            self._lines = []
            self._write_ids()
            atomic_write(self.path / JOURNAL, b"")
            atomic_write(self.path / MANIFEST, records.seal(self.manifest))
            return
        if not self._ids_are_whole():
            _log.warning("%s: is missing or damaged; it is written again", self.path / row_ids.FILE)
            self._write_ids()
        raw = (self.path / JOURNAL).read_bytes() if (self.path / JOURNAL).exists() else None
        self._lines = [line for line in self._known_lines() if self._is_whole(line)]
        if raw is None or raw != self._journal():
            self._write_journal()

    def _known_lines(self) -> list[dict[str, Any]]:
        """What is known of shards that were written, in the journal's order; lines that are damaged are left out."""
        if self.manifest["version"] != VERSION:
            return read_lines(self.path, self.manifest)
        found: dict[str, dict[str, Any]] = {}
        for line in read_journal(self.path, self.manifest).entries:
            try:
                check_line(f"{self.path}: {JOURNAL}", self._settings, line)
            except StoreError as error:
                _log.warning("%s; left out", error)
                continue
            number = line["first"] // self.manifest["shard_rows"]
            rows = self.span(number)
            if (line["file"], line["first"], line["rows"]) == (_shard_name(number), rows.start, len(rows)):
                found[line["file"]] = line
        return list(found.values())

    def _is_whole(self, line: dict[str, Any]) -> bool:
        """Whether a shard is as it was written; says which is not, and will be computed again."""
        try:
            Part(self.path, self.manifest, []).shard(line, verifying()).check_all()
        except StoreError as error:
            _log.warning("%s; it is computed again", error)
            return False
        return True

    def _ids_are_whole(self) -> bool:
        try:
            Part(self.path, self.manifest, []).check_ids(verifying())
        except StoreError:
            return False
        return True

    def _write_ids(self) -> None:
        about, pieces = row_ids.encoded(self._ids)
        if about is None:
            return
        with atomic_path(self.path / about["file"]) as temporary, open(temporary, "wb") as file:
            for piece in pieces():
                file.write(piece)
            file.write(_table(pieces()))

    def _journal(self) -> bytes:
        before, out = self._settings, []
        for line in self._lines:
            text, before = records.chained(before, line)
            out.append(text)
        return b"".join(out)

    def _write_journal(self) -> None:
        self._lines.sort(key=lambda line: line["first"])
        atomic_write(self.path / JOURNAL, self._journal())

    def span(self, shard: int) -> range:
        """Rows of one shard."""
        size = self.manifest["shard_rows"]
        return range(shard * size, min((shard + 1) * size, self.manifest["rows"]))

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not written yet, or were found to be damaged when the writer was entered."""
        done = {line["file"] for line in self._lines}
        count = -(-self.manifest["rows"] // self.manifest["shard_rows"])
        return [number for number in range(count) if _shard_name(number) not in done]

    def write(self, shard: int, gradients: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> None:
        """Write one shard: ``{layer: (rows, dim)}`` and ``{column: (rows,)}``.

        Raises:
            InputError: a gradient that is not finite, or overflows the store's dtype; names layer and row.
            InfluenceError: the disk is full. Shards written so far stay valid, and the build can go on later.
        """
        self.write_tensors(shard, self._tensors(self.span(shard), gradients, columns))

    def write_tensors(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard of what it holds, by the names in ``store_format``; errors as of :meth:`write`."""
        span, name = self.span(shard), _shard_name(shard)
        line: dict[str, Any] = {
            "kind": "shard",
            "segment": 0,
            "file": name,
            "first": span.start,
            "rows": len(span),
            "settings": self._settings,
        }
        header, names = layout(tensors, named(line), BLOCK)
        digest, sums, size = hashlib.sha256(), BlockSums(), 0
        with atomic_path(self.path / name) as temporary, open(temporary, "wb") as file:
            for piece in (memoryview(header), *(bytes_of(tensors[part]) for part in names)):
                file.write(piece)
                digest.update(piece)
                sums.add(piece)
                size += len(piece)
            table = sums.table()
            file.write(table)
            digest.update(table)
        line |= {"bytes": size + len(table), "sha256": digest.hexdigest(), "blocks": root_of(table)}
        with self._alone():
            append_line(
                records.inside(self.path, JOURNAL),
                lambda last: records.chained(records.last_seal(last, self._settings), line)[0],
            )
        self._lines.append(line)

    def _alone(self) -> AbstractContextManager[None]:
        """No other rank adds to the journal meanwhile."""
        return locked(self.path / ".journal.lock", wait=True) if self._together else nullcontext()

    def _tensors(
        self, span: range, gradients: Mapping[str, Tensor], columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors = {f"@column/{name}": column.cpu().contiguous() for name, column in columns.items()}
        kept = dtype_of(self.manifest)
        dtype, bits = DTYPES[kept], block_scales.BITS.get(kept)
        for name, layer in self.manifest["layers"].items():
            gradient = gradients[name].detach().cpu()
            if tuple(gradient.shape) != (len(span), layer["dim"]):
                raise InputError(f"{name}: expected ({len(span)}, {layer['dim']}), got {tuple(gradient.shape)}")
            sqnorm = torch.linalg.vecdot(gradient.double(), gradient.double())
            self._check_finite(name, span, sqnorm, "is not finite")
            if "out" in layer:
                rounded = as_factors(gradient, layer["out"], self.manifest["factors"])
            if bits is not None:
                scale, rounded = block_scales.packed(rounded if "out" in layer else gradient, bits)
                tensors[f"@scale/{name}"] = scale
            elif "out" in layer:
                pass
            elif dtype in (torch.int8, torch.float16):
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
            raise InputError(f"gradient of layer {layer!r} for row {self._ids[row]!r} {what}")


def copy_rows(writer: StoreWriter, shards: Sequence[Shard], firsts: np.ndarray, rows: np.ndarray | None = None) -> None:
    """Write the shards that are missing with rows of others, whose numbers keep every bit.

    ``firsts`` int64 ``(shards + 1,)`` numbers the first row of each of ``shards``; ``rows`` int64, ascending, says which
    to take, all by default.
    """
    for number in writer.missing:
        span = writer.span(number)
        wanted = np.arange(span.start, span.stop) if rows is None else rows[span.start : span.stop]
        edges = np.searchsorted(wanted, firsts).tolist()
        pieces = [
            _copied(shard, wanted[low:high] - first)
            for shard, first, low, high in zip(shards, firsts.tolist(), edges, edges[1:], strict=False)
            if low < high
        ]
        writer.write_tensors(number, {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})


def _copied(shard: Shard, rows: np.ndarray) -> dict[str, Tensor]:
    found = {name: shard.tensor(name, rows) for name in shard.places if name != SUMS}
    if shard.dtype == torch.float16:
        # Version 0.1 had no scales of half precision.
        for layer in shard.dims:
            found.setdefault(f"@scale/{layer}", torch.ones(len(rows)))
    return found


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
    """What a build that was killed before its manifest leaves: nothing of anybody's."""
    names = (MANIFEST, JOURNAL, row_ids.FILE)
    return file.name in (".lock", ".journal.lock", ".manifest.lock", *names, *(f"{name}.part" for name in names))


def _table(pieces: Iterator[bytes]) -> bytes:
    sums = BlockSums()
    for piece in pieces:
        sums.add(memoryview(piece))
    return sums.table()


def _check_same(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if earlier["version"] == 1:
        # Which had the names themselves, and nothing that came later.
        about, pieces = row_ids.encoded(earlier["ids"] if earlier["ids"] is not None else range(earlier["rows"]))
        ids = about and {**about, "blocks": root_of(_table(pieces()))}
        earlier = {**now, **earlier, "ids": ids, "version": now["version"]}
    was_kept, kept = ({**side, "dtype": dtype_of(side)} for side in (earlier, now))
    # What a store requires and how its blocks are scaled follows from the others.
    keys = [key for key in ("factors", *now) if key not in ("settings", "facts", "requires", "block_scales")]
    pairs = [(key, was_kept.get(key), kept.get(key)) for key in keys]
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
