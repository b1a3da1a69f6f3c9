"""Gradients that influence is computed from: a store, or tensors in memory, read alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from influence_fast.errors import InputError, StoreError
from influence_fast.gradients.differences import other_space, recorded_identity
from influence_fast.gradients.store_reader import StoreReader

Gradients = StoreReader | Mapping[str, Tensor]
# Gradients read at once: small enough to be found in cache by the product that follows.
_BLOCK_BYTES = 16 << 20


class GradientSource:
    """Gradients to read in blocks, from a store or from memory.

    Attributes:
        argument: what errors call it.
        layers: names, in their order.
        rows: how many there are.
    """

    def __init__(self, argument: str, gradients: Gradients) -> None:
        if not isinstance(gradients, StoreReader | Mapping):
            raise InputError(
                f"{argument}: expected a GradientStore or {{layer: tensor}}, got {type(gradients).__name__}"
            )
        self.argument = argument
        self.store = gradients if isinstance(gradients, StoreReader) else None
        self.memory: Mapping[str, Tensor] = {} if isinstance(gradients, StoreReader) else gradients
        self.layers = list(gradients.layers if isinstance(gradients, StoreReader) else gradients)
        if not self.layers:
            raise InputError(f"{argument}: has no layers")
        for name, tensor in self.memory.items():
            if not isinstance(tensor, Tensor) or tensor.dim() != 2:
                raise InputError(
                    f"{argument}: expected a tensor (rows, dim) for layer {name!r}, got {_described(tensor)}"
                )
        counts = {name: len(tensor) for name, tensor in self.memory.items()}
        if len(set(counts.values())) > 1:
            raise InputError(f"{argument}: layers disagree on the number of rows: {counts}")
        self.rows = len(self.store) if self.store is not None else next(iter(counts.values()))
        if self.rows == 0:
            raise InputError(f"{argument}: has no rows")
        self._sqnorm: dict[str, Tensor] = {}

    @property
    def correct(self) -> Tensor | None:
        if self.store is None or "correct" not in self.store.columns:
            return None
        return self.store.column("correct").bool()

    @property
    def ids(self) -> Sequence[int | str]:
        """Names of the rows, their numbers in memory."""
        return self.store.ids if self.store is not None else range(self.rows)

    def dim(self, name: str) -> int:
        return self.store.dims[name] if self.store is not None else self.memory[name].shape[1]

    def weights(self, name: str) -> int:
        """Number of weights of the layer, before any projection; a mapping's dim stands for itself."""
        if self.store is None:
            return self.dim(name)
        out, in_ = self.store.shapes[name]
        return out * in_

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        if self.store is not None:
            return self.store.read(name, rows)
        values = self.memory[name][rows].detach().float()
        return values

    def blocks(self, name: str) -> Iterator[slice]:
        step = self.rows if self.store is None else max(1, _BLOCK_BYTES // (4 * self.dim(name)))
        for begin in range(0, self.rows, step):
            yield slice(begin, min(begin + step, self.rows))

    def sqnorm(self, name: str) -> Tensor:
        """Squared norms of what is read (in a rounded store, not those that were rounded), float64 ``(rows,)``."""
        if name not in self._sqnorm:
            if self.store is not None and self.store.meta["dtype"] == "float32" and not self.store.factors:
                found = self.store.sqnorm(name)
            else:
                found = torch.cat([self.read(name, block).double().square().sum(1) for block in self.blocks(name)])
            bad = found.isfinite().logical_not().nonzero()
            if len(bad):
                raise InputError(f"{self.argument}: layer {name!r} has NaN or infinity in row {int(bad[0])}")
            self._sqnorm[name] = found
        return self._sqnorm[name]

    @property
    def digest(self) -> str:
        """SHA-256 of a store's manifest hashes, or of the bytes in memory."""
        if self.store is not None:
            return self.store.digest
        digest = hashlib.sha256()
        for name, tensor in self.memory.items():
            values = tensor.detach().float().contiguous()
            digest.update(f"{name} {tuple(values.shape)}\n".encode())
            if values.numel():
                digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def check_matches(self, other: GradientSource) -> None:
        """Raise unless ``other``'s gradients live in the same space as these."""
        missing = [name for name in self.layers if name not in other.layers]
        if missing:
            raise StoreError(
                f"{other.argument}: lacks layer {missing[0]!r} of {self.argument}; it has {', '.join(other.layers)}"
            )
        for name in self.layers:
            if self.dim(name) != other.dim(name):
                raise StoreError(
                    f"{other.argument}: layer {name!r} has {other.dim(name)} numbers per row, "
                    f"{self.argument} has {self.dim(name)}: not the same projection"
                )
        if self.store is None or other.store is None:
            return
        for key in ("model", "projection"):
            if self.store.meta[key] != other.store.meta[key]:
                raise StoreError(
                    f"{other.argument}: made with another {key} than {self.argument} "
                    f"({other.store.meta[key]} and {self.store.meta[key]})"
                )
        found = other_space(recorded_identity(self.store.meta), recorded_identity(other.store.meta))
        if found is not None:
            raise StoreError(f"{other.argument}: made by another computation than {self.argument} ({found})")
        for name in self.layers:
            mine, theirs = self.store.meta["layers"][name], other.store.meta["layers"][name]
            if mine != theirs:
                raise StoreError(f"{other.argument}: layer {name!r} is {theirs}, {self.argument} has {mine}")


def chosen_layers(there: list[str], layers: Sequence[str] | None) -> list[str]:
    if layers is None:
        return there
    if isinstance(layers, str):
        raise InputError(f"layers: expected a list of names, got the string {layers!r}")
    unknown = [name for name in layers if name not in there]
    if unknown or not layers:
        raise InputError(f"layers: expected some of {', '.join(there)}, got {unknown[0] if unknown else 'none'!r}")
    return [name for name in there if name in set(layers)]


def _described(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
