"""Gradients by a Ray cluster: a Ray Data pipeline whose workers capture and write parts of one store.

    python examples/ray/gradients.py --model MODEL --data train.jsonl --out store --workers 8

Rows have ``input_ids`` and ``labels``, one JSON object a line, on a disk that all machines see, as the store is. Each batch
becomes a store of its own, in a folder named by its first row: a part that is whole is never computed again, so that Ray may
run a batch twice, and a job that was stopped goes on. At the end the parts are merged in the order of their rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import ray
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import influence_fast as inf


class Gradients:
    """One worker: a model, and parts of the store that are written by it."""

    def __init__(self, model: str, parts: str, layers: str, projection: str) -> None:
        architectures = AutoConfig.from_pretrained(model).architectures or [""]
        causal = "CausalLM" in architectures[0] or "LMHead" in architectures[0]
        kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        self.model = kind.from_pretrained(model).to("cuda" if ray.get_gpu_ids() else "cpu")
        self.parts, self.layers, self.projection = Path(parts), layers, projection

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids = [int(number) for number in batch["id"]]
        rows = [
            {"input_ids": np.asarray(tokens).tolist(), "labels": np.asarray(labels).tolist()}
            for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
        path = self.parts / f"part-{ids[0]:012d}"
        store = inf.build_store(
            path, self.model, rows, self.layers, self.projection, batch_tokens=4096, ids=ids, progress=False
        )
        return {"part": [str(path)], "rows": [len(store)]}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--model", required=True, help="folder or name of a Hugging Face model")
    options.add_argument("--data", required=True, help="JSON lines")
    options.add_argument("--out", required=True, type=Path, help="folder of the store; the parts are in OUT-parts")
    options.add_argument("--layers", default="all")
    options.add_argument("--projection", default="rademacher:16x16")
    options.add_argument("--rows", type=int, default=4096, help="rows of a part")
    options.add_argument("--workers", type=int, default=1)
    # Reading takes processors too: workers that hold all of them would wait for rows for ever.
    options.add_argument("--cpus", type=float, default=1, help="processors of a worker")
    options.add_argument("--gpus", type=float, default=0, help="GPUs of a worker")
    given = options.parse_args()

    # Batches of the same rows each time, whatever worker ends first.
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = ray.data.read_json(given.data, lines=True, override_num_blocks=1)
    numbered = ray.data.range(rows.count(), override_num_blocks=1).zip(rows)
    parts = Path(f"{given.out}-parts").resolve()
    done = numbered.map_batches(
        Gradients,
        fn_constructor_args=(given.model, str(parts), given.layers, given.projection),
        batch_size=given.rows,
        concurrency=given.workers,
        num_cpus=given.cpus,
        num_gpus=given.gpus or None,
    ).take_all()
    names = sorted(entry["part"] for entry in done)
    store = inf.merge_stores([inf.GradientStore.open(name) for name in names], given.out)
    print(f"{len(store)} rows of {len(names)} parts in {given.out}")


if __name__ == "__main__":
    main()
