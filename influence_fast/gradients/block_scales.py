"""Numbers of 4 or 8 bits, of which every 32 that follow one another in a row share a scale.

A row of few large and many small numbers, as gradients are, loses less to rounding than by one scale for all of it. A scale
is the largest number of its block divided by the largest code, rounded up to bfloat16, which has float32's range in two
bytes: 34 bytes keep 32 numbers in 8 bits, 18 in 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS = 32
BITS = {"int8_block": 8, "int4": 4}


def blocks(numbers: int) -> int:
    """Scales of a row of so many numbers."""
    return -(-numbers // NUMBERS)


def elements(numbers: int, bits: int) -> int:
    """Bytes of the codes of a row."""
    return -(-numbers * bits // 8)


def packed(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rows ``(n, numbers)`` as scales, bfloat16 ``(n, blocks)``, and codes.

    Codes are int8 ``(n, numbers)`` of -127 to 127; of 4 bits uint8 ``(n, ceil(numbers / 2))``, the first of two numbers in
    the lower half of a byte, each from -7 to 7 with 8 added. Half a byte beyond the last number is 8.
    """
    count, numbers = rows.shape
    most = 2 ** (bits - 1) - 1
    pieces = torch.nn.functional.pad(rows.float(), (0, blocks(numbers) * NUMBERS - numbers))
    pieces = pieces.view(count, blocks(numbers), NUMBERS)
    exact = (pieces.abs().amax(2) / most).contiguous()
    # The next bfloat16 above, so that no code is beyond the largest.
    scale = ((exact.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    # In float64, since a scale may be among the smallest numbers that there are.
    codes = (pieces.double() / torch.where(scale > 0, scale, 1)[:, :, None]).round()
    codes = codes.to(torch.int8).flatten(1)
    if bits == 4:
        nibbles = (codes[:, : 2 * elements(numbers, 4)] + 8).to(torch.uint8)
        return scale.bfloat16(), nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return scale.bfloat16(), codes[:, :numbers].contiguous()


def unpacked(scale: Tensor, codes: Tensor, numbers: int, bits: int) -> Tensor:
    """What :func:`packed` stands for: float32 ``(n, numbers)``, each number its code times its scale."""
    if bits == 4:
        codes = (torch.stack([codes & 15, codes >> 4], 2).flatten(1)[:, :numbers]).to(torch.int8) - 8
    values = codes.float()
    whole = numbers // NUMBERS * NUMBERS
    scale = scale.float()
    values[:, :whole].unflatten(1, (whole // NUMBERS, NUMBERS)).mul_(scale[:, : whole // NUMBERS, None])
    if whole < numbers:
        values[:, whole:] *= scale[:, -1:]
    return values
