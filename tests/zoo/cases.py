"""The cases of the zoo: every family's models, every tuner's adapters, and situations of training."""

from __future__ import annotations

from typing import Any

import torch

from .check import Case, own_loss, row_batch
from .configs import CHOICES, CLASSES, TASKS, VOCAB, families, make_model

LENGTHS = (3, 12, 6, 5, 6, 9)
SQUARE = (6,) * 6
# Ids below are pads, begin, end and the like; those behind may stand for pictures or sounds.
FIRST, LAST, END = 6, VOCAB - 8, 2


# Families whose rows cannot be short, or have one length.
_FIXED = {
    "canine": ((8, 20, 12, 9, 12, 16), (8,) * 8),
    "longformer": ((4, 12, 6, 5, 6, 9), SQUARE),
    "perceiver": ((12,) * 6, (12,) * 6),
}


def task_rows(task: str, family: str = "", lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[dict[str, Any]]:
    """Rows of several lengths with what a task's loss needs; each ends in the end token, which some heads look for."""
    random = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return [*torch.randint(FIRST, LAST, (length - 1,), generator=random).tolist(), END]

    rows = []
    for i, length in enumerate(lengths):
        row: dict[str, Any] = {"input_ids": ids(length)}
        if task == "causal":
            row["labels"] = [-100, *row["input_ids"][1:]] if i % 2 else list(row["input_ids"])
        elif task == "sequence":
            row["labels"] = i % CLASSES
        elif task == "token":
            row["labels"] = [
                -100 if place % 4 == 1 else (token + i) % CLASSES for place, token in enumerate(ids(length))
            ]
        elif task == "masked":
            row["labels"] = [token if place % 3 == i % 3 else -100 for place, token in enumerate(ids(length))]
        elif task == "answer":
            row |= {"start_positions": length // 3, "end_positions": length - 1 - i % 2}
        elif task == "seq2seq":
            row["labels"] = ids(2 + (i * 3) % 5)
            if family == "fsmt":
                # It makes its decoder's inputs of the encoder's.
                row["decoder_input_ids"] = [END, *row["labels"][:-1]]
        elif task == "choice":
            row = {"input_ids": [row["input_ids"], ids(length)][:CHOICES], "labels": i % CHOICES}
        if family == "longformer" and task in ("answer", "choice"):
            # Its global attention is told by three separators.
            for part in row["input_ids"] if task == "choice" else [row["input_ids"]]:
                part[1:3] = [END, END]
        rows.append(row | columns(family, row["input_ids"], task))
    return rows


def columns(family: str, ids: list[int], task: str) -> dict[str, Any]:
    """What a family's forward cannot do without."""
    length = len(ids)
    if family in ("layoutlm", "lilt", "bros", "layoutlmv3", "layoutlmv2"):
        return {"bbox": [[i % 5, 1, 5 + i % 7, 9] for i in range(length)]}
    if family == "tapas":
        return {"token_type_ids": [[0] * 7 for _ in range(length)]}
    return {}


def tasks_of(family: str) -> list[str]:
    return [task for task in TASKS if family in families(task)]


def all_families() -> list[str]:
    return sorted({family for task in TASKS for family in families(task)})


def family_case(family: str, task: str) -> Case:
    """A family's model for a task."""
    model = make_model(family, task)
    # Models of sound or pictures are listed among the encoder-decoders, and continue the text as causal ones do.
    kind = task if task != "seq2seq" or getattr(model.config, "is_encoder_decoder", False) else "causal"
    lengths, square = _FIXED.get(family, (LENGTHS, SQUARE))
    return settled(Case(model, task_rows(kind, family, lengths), square=task_rows(kind, family, square, seed=2)))


def settled(case: Case) -> Case:
    """The case in float64, or in float32 where the model's forward does not run in float64."""
    try:
        _try(case)
    except (RuntimeError, FloatingPointError):
        case.model, case.dtype = case.model.float(), "float32"
        _try(case)
    return case


def _try(case: Case) -> None:
    """One row alone, as the loop will take it."""
    loss = own_loss(case.model, row_batch(case.model, case.rows[0]))
    if loss is None:
        raise ValueError("it computes no loss of its own")
    if not loss.isfinite():
        raise FloatingPointError("its loss is not finite")
    if not loss.requires_grad:
        raise ValueError("its loss depends on no parameter")
