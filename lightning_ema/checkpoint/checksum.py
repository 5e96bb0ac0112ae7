"""Sums by which damage is noticed: of a tensor's bytes, and of the plain values beside it. Not against a forger."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from torch import Tensor

ROW = 1 << 12
"""Words that are weighted alike in each row."""

ROWS = 1 << 3
"""Rows that are summed at once, which bounds the memory that it takes to a few times 256 KiB."""


def sum_of(tensor: Tensor) -> int:
    """The weighted sum of a tensor's bytes, taken as 64-bit words ``x`` in rows ``r`` of ``ROW``, modulo ``2 ** 64``.

        sum_r (2 r + 1) sum_i (2 i + 1) x[r, i]

    All weights are odd, so that no single bit can change without the sum; and other ones at neighbouring places, so
    that words that change places are noticed.

    Args:
        tensor: a plain one, of any dtype and device.

    Returns:
        A whole number in [-2 ** 63, 2 ** 63).
    """
    flat = tensor.detach().contiguous().reshape(-1)
    octets = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
    total = 0
    per_turn = ROW * ROWS * 8
    weights = torch.arange(ROW, dtype=torch.int64, device=octets.device) * 2 + 1
    rows = torch.arange(ROWS, dtype=torch.int64, device=octets.device)
    for turn, begin in enumerate(range(0, octets.numel(), per_turn)):
        stretch = octets[begin : begin + per_turn]
        if stretch.numel() < per_turn or stretch.storage_offset() % 8:
            padded = stretch.new_zeros(-(-stretch.numel() // (ROW * 8)) * ROW * 8)
            padded[: stretch.numel()] = stretch
            stretch = padded
        words = stretch.view(torch.int64).view(-1, ROW)
        of_rows = (words * weights).sum(1)
        total += int((of_rows * ((rows[: len(of_rows)] + turn * ROWS) * 2 + 1)).sum())
    total += tensor.numel()
    return (total + 2**63) % 2**64 - 2**63


def sum_of_plain(values: Any) -> int:
    """The CRC-32 of numbers, text, lists and dictionaries; tensors are left out."""
    return zlib.crc32(json.dumps(_without_tensors(values), sort_keys=True, default=str).encode())


def _without_tensors(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(key): _without_tensors(value) for key, value in values.items() if not isinstance(value, Tensor)}
    if isinstance(values, (list, tuple)):
        return [_without_tensors(value) for value in values if not isinstance(value, Tensor)]
    return values
