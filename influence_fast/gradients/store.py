"""A gradient store: read as ``store_reader`` does, and changed; ``store_format`` describes its bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from influence_fast._files import disk_errors, locked
from influence_fast.gradients.store_changes import clear, delete_rows, drop_other, replace_by
from influence_fast.gradients.store_reader import StoreReader
from influence_fast.gradients.store_records import read_state
from influence_fast.gradients.store_writer import StoreWriter, copy_rows


class GradientStore(StoreReader):
    """A finished store, read as far as it is asked for: see :meth:`open`.

    Attributes:
        path: the folder.
        layers: names in the model's order; ``dims`` and ``shapes`` give numbers per row and the weight's ``(out, in)``.
        ids: name of each row; its number unless the build was given others. Names are read from disk when asked for.
        meta: the manifest, and ``shards``: ``file``, ``rows``, ``bytes`` and ``sha256`` of each.
    """

    def delete(self, ids: Iterable[int | str]) -> int:
        """Delete the rows of these ids; how many there were. Whoever opens the store from now on does not see them.

        That is written before this returns. The bytes of the rows stay on disk until :meth:`compact`. Ids that were deleted
        already are passed over. A row that was deleted is gone from this object too; others in other processes, and
        indexes, see it until they are opened again.

        Raises:
            InputError: no row has one of the ids (none is deleted then), or no row would be left.
            StoreError: another process is changing the store, or it is of version 1.
            InfluenceError: the disk is full, or nothing can be written there; the store is as it was.
        """
        with disk_errors(self.path), locked(self.path / ".lock"):
            state = read_state(self.path, self._verify)
            clear(self.path, state.manifest)
            count, manifest = delete_rows(self.path, state, ids, [part.ids_file(self._verify) for part in state.parts])
            clear(self.path, manifest)
        self._reopen()
        return count

    def compact(self) -> None:
        """Rewrite the store as one run of shards without the rows that were deleted, of which no byte is left.

        The numbers of every other row keep each bit. A reader that has the store open gets StoreError where it reads what
        was taken away; an index is to be updated (:meth:`~influence_fast.InfluenceIndex.update`). Killed at any moment,
        the store is as before or compacted, and this goes on when it is called again. Takes the space of the rows that
        stay, beside the store, until it is done.

        Raises:
            StoreError: another process is changing the store, it is damaged, or of version 1.
            InfluenceError: the disk is full; the store is as it was.
        """
        with disk_errors(self.path), locked(self.path / ".lock"):
            state = read_state(self.path, self._verify)
            clear(self.path, state.manifest)
            if len(state.parts) > 1 or state.live is not None:
                store = GradientStore(self.path, state, self._verify)
                folder = f"compacted-{state.manifest.get('next', 1):05d}"
                drop_other(self.path / folder, store.digest)
                with StoreWriter.create(self.path / folder, **store._described()) as writer:
                    copy_rows(writer, store.shards, store.firsts, state.live)
                clear(self.path, replace_by(self.path, state.manifest, folder))
        self._reopen()

    def _described(self) -> dict[str, Any]:
        """Arguments of a writer that copies the rows that are there."""
        manifest, live = self.state.manifest, self.state.live
        settings = {**manifest.get("settings", {}), "data": self.digest, "built": self.state.built}
        return {
            "layers": self.shapes,
            "dims": self.dims,
            "ids": self.ids,
            "projection": manifest["projection"],
            "identifiers": {name: layer["matrices"] for name, layer in manifest["layers"].items()},
            "model": manifest["model"],
            "loss": manifest["loss"],
            "dtype": self.meta["dtype"],
            "factors": manifest.get("factors"),
            "outs": self.outs,
            "shard_rows": manifest["shard_rows"],
            "settings": settings,
            "facts": _kept_facts(manifest.get("facts"), live),
        }

    def _reopen(self) -> None:
        again = GradientStore.open(self.path, self._verify)
        self.__dict__.clear()
        self.__dict__.update(again.__dict__)


def _kept_facts(facts: dict[str, Any] | None, live: np.ndarray | None) -> dict[str, Any]:
    """Facts without what is known of single rows, once any row is deleted: they may be of those."""
    return {key: value for key, value in (facts or {}).items() if live is None or key not in ("probe", "verified")}
