"""Plain texts packed into blocks for pretraining: boundaries kept, positions begun anew, nothing attended across them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from influence_fast.data.tasks import IGNORED, begins, device_of, inputs_of, is_packed, unwrapped
from influence_fast.errors import InputError

# How far apart logits of a text may be, alone and in its block, relative to the largest.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def pack(texts: Sequence[Sequence[int]], size: int) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Blocks of at most ``size`` tokens, and the numbers of the texts that each holds a part of.

    Texts follow each other in their order; one that does not fit goes on in the next block. ``position_ids`` begin anew with
    each text, and the first token of a part is no target, so that no text is predicted from another.
    """
    blocks: list[dict[str, Any]] = []
    members: list[list[int]] = []
    for number, ids in enumerate(texts):
        at = 0
        while at < len(ids):
            if not blocks or len(blocks[-1]["input_ids"]) >= size:
                blocks.append({"input_ids": [], "labels": [], "position_ids": []})
                members.append([])
            part = list(ids[at : at + size - len(blocks[-1]["input_ids"])])
            blocks[-1]["input_ids"] += part
            blocks[-1]["labels"] += [IGNORED, *part[1:]]
            blocks[-1]["position_ids"] += range(len(part))
            members[-1].append(number)
            at += len(part)
    return blocks, members


def check_boundaries(model: nn.Module, blocks: Sequence[Mapping[str, Any]]) -> None:
    """InputError where a text's logits in its block are not those that it has alone: the model looks across boundaries."""
    name = type(unwrapped(model)).__name__
    if "position_ids" not in inputs_of(model):
        raise InputError(f"block_size: {name} takes no position_ids, so texts of one block would not be told apart")
    block = min((block for block in blocks if is_packed(block)), key=lambda b: len(b["input_ids"]), default=None)
    if block is None:
        return
    edges = [*begins(block["position_ids"]), len(block["input_ids"])]
    begin, end = edges[1], edges[2]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            both = _logits(model, block["input_ids"], block["position_ids"])[begin:end]
            alone = _logits(model, block["input_ids"][begin:end], list(range(end - begin)))
    finally:
        model.train(training)
    loose = _TOLERANCE.get(both.dtype, 5e-2)
    if not torch.allclose(both, alone, rtol=loose, atol=loose * float(alone.abs().max())):
        raise InputError(
            f"block_size: in a block of texts {name} looks across their boundaries (position_ids that begin anew do not "
            "separate them); leave block_size out, so that each text is a sample"
        )


def _logits(model: nn.Module, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    device = device_of(model)
    given = {
        "input_ids": torch.tensor([list(ids)], device=device),
        "position_ids": torch.tensor([list(positions)], device=device),
    }
    return model(**given, use_cache=False).logits[0]
