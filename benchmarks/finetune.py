"""Fine-tune a pretrained encoder on flipped labels, by the paper's protocol: what an audit is then run on.

Draws a training set from a JSONL file, flips a fifth of its labels by a seed, draws queries from another file, and
trains LoRA matrices (r = alpha = 4 on query and value) and the head with AdamW and a cosine schedule (arXiv
2511.04715). Writes ``train.jsonl`` (with a ``noise`` column), ``queries.jsonl``, ``test.jsonl``, after every epoch
``epochs.json``, and at the end the adapter::

    python -m benchmarks.finetune --model MODEL_DIR --train sst2/train.jsonl --queries sst2/validation.jsonl --out run
    influence-fast audit --model run/adapter --train run/train.jsonl --queries run/queries.jsonl \\
        --text-column sentence --noise-column noise --projection identity --out run/audit
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from benchmarks import protocol
from benchmarks.training import BATCH, encoder, one_epoch


def _read(path: Path, count: int, random: torch.Generator) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [rows[i] for i in torch.randperm(len(rows), generator=random)[:count].tolist()]


def _write(path: Path, rows: list[dict]) -> None:
    protocol.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


@click.command()
@click.option("--model", required=True, help="Folder of the pretrained encoder.")
@click.option("--train", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--queries", type=click.Path(path_type=Path, exists=True), required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the data, the accuracies and the adapter; those of an earlier run are replaced.",
)
@click.option("--text-column", default="sentence")
@click.option("--samples", default=4500)
@click.option("--query-samples", default=500)
@click.option("--flip", default=0.2, help="Share of training labels to flip.")
@click.option("--epochs", default=3)
@click.option("--lr", default=3e-4)
@click.option("--seed", default=0)
def main(
    model: str,
    train: Path,
    queries: Path,
    out: Path,
    text_column: str,
    samples: int,
    query_samples: int,
    flip: float,
    epochs: int,
    lr: float,
    seed: int,
) -> None:
    """Fine-tune MODEL on flipped labels and write everything that an audit needs to OUT."""
    random = torch.Generator().manual_seed(seed)
    rows = _read(train, samples, random)
    held_out = _read(queries, 1 << 30, random)
    noisy = set(torch.randperm(len(rows), generator=random)[: round(flip * len(rows))].tolist())
    rows = [{**row, "label": row["label"] ^ (i in noisy), "noise": i in noisy} for i, row in enumerate(rows)]
    out = protocol.result_folder(out)
    _write(out / "train.jsonl", rows)
    _write(out / "queries.jsonl", held_out[:query_samples])
    _write(out / "test.jsonl", held_out[query_samples:])

    tokenizer = AutoTokenizer.from_pretrained(model)
    network: Any = encoder(model, seed)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=lr)
    steps = epochs * -(-len(rows) // BATCH)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)

    def logits(part: list[dict]) -> torch.Tensor:
        texts = [row[text_column] for row in part]
        return network(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits

    def accuracy(part: list[dict]) -> float:
        network.eval()
        with torch.no_grad():
            answers = torch.cat([logits(part[i : i + 64]).argmax(-1) for i in range(0, len(part), 64)])
        return float((answers == torch.tensor([row["label"] for row in part])).double().mean())

    def loss(chosen: list[int]) -> torch.Tensor:
        part = [rows[i] for i in chosen]
        return nn.functional.cross_entropy(logits(part), torch.tensor([row["label"] for row in part]))

    reached: list[float] = []
    header = {"benchmark": "finetune", "model": Path(model).name, "samples": len(rows), "flip": flip, "seed": seed}
    with protocol.Results(out / "epochs.json", header) as results, protocol.Progress(epochs) as progress:
        for epoch in range(1, epochs + 1):
            name = f"epoch {epoch} of {epochs}"
            with progress.step(name):
                network.train()
                order = torch.randperm(len(rows), generator=random).tolist()
                batches = [order[begin : begin + BATCH] for begin in range(0, len(rows), BATCH)]
                one_epoch(progress.each(batches, name), loss, optimizer, schedule)
                reached.append(accuracy(held_out[:query_samples]))
            results.add(accuracy_on_queries=reached)
            tqdm.write(f"epoch {epoch}: accuracy on the queries {reached[-1]:.3f}")
    network.save_pretrained(out / "adapter")
    tokenizer.save_pretrained(out / "adapter")


if __name__ == "__main__":
    main()
