"""Stores of any number of rows for benchmarks of search, their true answers, and what a process holds in memory."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

import influence_fast as inf
from influence_fast.gradients.store_writer import StoreWriter

SIDES, DIM = (8, 16), 512
BASE_ROWS, CLUSTERS, SHARD = 4096, 1000, 32768
_BLOCK = 20_000
# Of equal scores so many are put in row order; drawn rows have none.
_TIES = 6


class Gradients:
    """Rows like those of a small model, any number of them: ``dims`` numbers a row, 128 of each of its layers."""

    def __init__(self, folder: Path, seed: int, dims: int = DIM) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(seed)
        layers = dims // (SIDES[0] * SIDES[1])
        config = BertConfig(
            vocab_size=500,
            hidden_size=64,
            num_hidden_layers=-(-layers // 2),
            num_attention_heads=4,
            intermediate_size=128,
        )
        model = BertForSequenceClassification(config)
        lengths = torch.randint(4, 24, (BASE_ROWS,)).tolist()
        rows = [{"input_ids": torch.randint(5, 500, (n,)).tolist(), "labels": i % 2} for i, n in enumerate(lengths)]
        names = [f"bert.encoder.layer.{i // 2}.attention.self.{('query', 'value')[i % 2]}" for i in range(layers)]
        store = inf.build_store(folder, model, rows, layers=names, projection="rademacher:8x16", progress=False)
        self.meta, self.shapes, self.layers = store.meta, store.shapes, store.layers
        real = torch.cat([store.read(name) for name in store.layers], 1)
        real /= real.norm(dim=1, keepdim=True)
        self.centres = real[torch.randperm(len(real))[:CLUSTERS]]
        # Directions of the real rows, with lengths that fall as a power of their place.
        _, _, basis = torch.linalg.svd(real - real.mean(0), full_matrices=False)
        spread = torch.arange(1, dims + 1).float() ** -0.5
        self.dims, self.noise = dims, basis * (spread / spread.norm())[:, None]

    def draw(self, rows: int, seed: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        values = torch.randn(rows, self.dims, generator=random) @ self.noise
        values = 0.7 * values + self.centres[torch.randint(CLUSTERS, (rows,), generator=random)]
        values *= (torch.randn(rows, 1, generator=random)).exp() / values.norm(dim=1, keepdim=True)
        return dict(zip(self.layers, values.split(self.dims // len(self.layers), 1), strict=True))

    def write(self, folder: Path, rows: int, seed: int) -> inf.GradientStore:
        writer = StoreWriter.create(
            folder,
            layers=self.shapes,
            dims=dict.fromkeys(self.layers, self.dims // len(self.layers)),
            ids=range(rows),
            projection=self.meta["projection"],
            identifiers={name: self.meta["layers"][name]["matrices"] for name in self.layers},
            model=self.meta["model"],
            loss=self.meta["loss"],
            dtype="float32",
            shard_rows=SHARD,
            settings={"seed": seed},
        )
        with writer:
            for shard in writer.missing:
                writer.write(shard, self.draw(len(writer.span(shard)), seed + shard), {})
        return inf.GradientStore.open(folder)


def stacked(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(gradients.values()), 1)


def blocks(store: inf.GradientStore, rows: int) -> Iterator[tuple[int, Tensor]]:
    """The first rows, some at a time, with the number of the first of them."""
    for begin in range(0, rows, _BLOCK):
        end = min(begin + _BLOCK, rows)
        yield begin, torch.cat([store.read(name, slice(begin, end)) for name in store.layers], 1)


def brute_force(
    store: inf.GradientStore,
    queries: Tensor,
    rows: int,
    dtype: torch.dtype,
    metrics: tuple[str, ...] = ("dot",),
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Ids of the best 10 of the first rows by each metric, ties in row order, in one pass.

    With ``masks`` also ``"METRIC MASK"``: the best 10 of the rows where a mask ``(rows,)`` is True.
    """
    asked = {
        metric if name is None else f"{metric} {name}": (metric, name)
        for metric in metrics
        for name in (None, *(masks or {}))
    }
    empty = torch.empty(len(queries), 0, dtype=dtype), torch.empty(len(queries), 0, dtype=torch.int64)
    best = dict.fromkeys(asked, empty)
    queries = queries.to(dtype)
    for begin, read in blocks(store, rows):
        values = read.to(dtype)
        scores = {"dot": queries @ values.T}
        if "cosine" in metrics:
            scores["cosine"] = scores["dot"] / values.norm(dim=1)
        for key, (metric, name) in asked.items():
            given, numbers = scores[metric], torch.arange(begin, begin + len(values))
            if name is not None:
                kept = masks[name][begin : begin + len(values)]  # type: ignore[index]
                given, numbers = given[:, kept], numbers[kept]
            top, place = given.topk(min(10 + _TIES, given.shape[1]))
            found = torch.cat([best[key][0], top], 1)
            where = torch.cat([best[key][1], numbers[place]], 1)
            # By number first, then by score, so that equal scores stay in the order of their rows.
            where, order = where.sort(dim=1)
            found, place = found.gather(1, order).sort(dim=1, descending=True, stable=True)
            best[key] = found[:, : 10 + _TIES], where.gather(1, place)[:, : 10 + _TIES]
    return {key: where[:, :10] for key, (_, where) in best.items()}


def status(key: str) -> int:
    """Bytes of a line of this process's status, such as ``VmHWM`` or ``RssAnon``."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


class AnonymousPeak:
    """The most private memory that this process holds meanwhile: ``RssAnon``, read 200 times a second.

    Pages of mapped files, which the kernel may drop at any time, are not in it; the peak of the resident memory
    (``VmHWM``) counts them.
    """

    def __init__(self) -> None:
        self.bytes = self.before = status("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, status("RssAnon"))

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, status("RssAnon"))


def read_bytes_per_s(size: int = 1 << 30) -> float:
    """What all threads together read from memory: the best of some sums over more than the caches hold."""
    values = torch.from_numpy(np.ones(size // 8, np.int64))
    spent = []
    for _ in range(5):
        begin = time.perf_counter()
        values.sum()
        spent.append(time.perf_counter() - begin)
    return size / min(spent)


@contextmanager
def workspace(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
