"""Which rows may share a batch is told from a few forwards, whatever the model does with pads and with other rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from influence_fast.data.batching import checked_rows
from influence_fast.gradients import losses
from influence_fast.gradients.row_checks import settle_batches

WIDTH, CLASSES, VOCAB = 4, 3, 40


class Pieces(nn.Module):
    """Words in pieces of ``size``, the largest of each: a pad can be the largest of the last piece, if that has any."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.words, self.head = size, nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask.sum(1)
        whole = -(-int(real.max()) // self.size) * self.size
        x = self.words(nn.functional.pad(input_ids, (0, whole - input_ids.shape[1]), value=1))
        pieces = x.unflatten(1, (-1, self.size)).amax(2)
        inside = (torch.arange(pieces.shape[1]) * self.size < real[:, None]).to(x)
        return self.head((pieces * inside[..., None]).sum(1))


class Centred(nn.Module):
    """The mean over the batch's words taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        return self.head((x - x.mean((0, 1))).tanh().mean(1))


def settled(model: nn.Module, lengths: tuple[int, ...], tokens: int = 200) -> str:
    random = torch.Generator().manual_seed(0)
    found = [torch.randint(3, VOCAB, (length,), generator=random).tolist() for length in lengths]
    rows, kind = checked_rows(model, [{"input_ids": ids, "labels": i % CLASSES} for i, ids in enumerate(found)])
    settle_batches(model.double(), rows, losses.named(kind), tokens)
    return rows.batching


# Of few tokens a batch two rows are laid beside each other, of many all that are tried.
@pytest.mark.parametrize("tokens", [200, 5000])
@pytest.mark.parametrize(
    ("size", "lengths", "batching"),
    [
        (4, (4, 8, 12), "padded"),
        (4, (4, 8, 9, 12), "equal lengths"),
        (3, (3, 6, 12, 10, 24), "equal lengths"),
        (1, (3, 6, 12, 10, 24), "padded"),
    ],
)
def test_rows_of_every_remainder_are_padded(size: int, lengths: tuple[int, ...], batching: str, tokens: int) -> None:
    torch.manual_seed(0)
    assert settled(Pieces(size), lengths, tokens) == batching


@pytest.mark.parametrize("lengths", [(3, 12, 6), (6, 6, 6), (5,) * 2])
def test_a_mean_over_the_batch_is_seen(lengths: tuple[int, ...]) -> None:
    """Also where no other row has the length of the shortest, and it is laid beside one that is made up."""
    torch.manual_seed(0)
    assert settled(Centred(), lengths) == "one row"
