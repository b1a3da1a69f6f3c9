"""A method of one's own: registered once, it works in ``influence``, ``evaluate`` and ``audit``.

    python examples/custom_method.py

Offline, in seconds: 200 made-up sentences of which a fifth have a flipped label, and a small BERT that learns them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import influence_fast as inf

SAMPLES, QUERIES, LENGTH, VOCABULARY = 200, 40, 8, 40


def sign_agreement(inputs: inf.MethodInputs) -> dict[str, Tensor]:
    """How many entries of two gradients have the same sign less those that have not: ``{layer: (queries, samples)}``."""
    train, queries = inputs.train, inputs.queries  # gradient stores
    return {name: queries.read(name).sign() @ train.read(name).sign().T for name in train.layers}


inf.register_method(inf.Method("sign-agreement", "agreement of the signs of gradients", sign_agreement))


def made_data() -> tuple[list[dict], list[dict], Tensor]:
    """Sentences of word numbers, whose class is that of most of their words; training rows, queries and the flips."""
    words = torch.randint(1, VOCABULARY, (SAMPLES + QUERIES, LENGTH - 1))
    labels = ((words < VOCABULARY // 2).sum(1) > (LENGTH - 1) // 2).long()
    noise = torch.zeros(SAMPLES, dtype=torch.bool)
    noise[torch.randperm(SAMPLES)[: SAMPLES // 5]] = True
    given = labels.clone()
    given[:SAMPLES][noise] = 1 - given[:SAMPLES][noise]
    rows = [
        {"input_ids": [0, *ids], "labels": label} for ids, label in zip(words.tolist(), given.tolist(), strict=True)
    ]
    flagged = [{**row, "noise": flip} for row, flip in zip(rows[:SAMPLES], noise.tolist(), strict=True)]
    return flagged, rows[SAMPLES:], noise


def trained_model(rows: list[dict]) -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes))
    ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    train, queries, noise = made_data()
    model = trained_model(train)
    with tempfile.TemporaryDirectory() as folder:
        # By hand: stores, influence, aggregation.
        stores = [
            inf.build_store(Path(folder) / name, model, rows, "attention,head")
            for name, rows in (("train", train), ("queries", queries))
        ]
        scores = inf.aggregate(inf.influence(*stores, "sign-agreement"), "mean")
        print(f"influence: AUC_NDR {inf.ndr_auc(scores, noise):.3f}")

        # Beside other methods, with intervals on the same resamples.
        table = inf.evaluate(*stores, noise, methods=["dot", "sign-agreement"]).table
        print("evaluate:", table.xs("all", level="group")[["auc_ndr", "low", "high"]].round(3), sep="\n")

    # The whole job, with a report if ``out`` is given.
    result = inf.audit(
        model,
        train,
        queries,
        noise_column="noise",
        layers="attention,head",
        methods=["sign-agreement"],
        progress=False,
    )
    print(f"audit: most harmful by {result.main}: {result.ranking[:5].tolist()}")


if __name__ == "__main__":
    main()
