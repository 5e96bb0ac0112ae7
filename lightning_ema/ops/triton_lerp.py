"""The update in one launch, in Triton. Imported only where Triton is installed, as it is with torch for CUDA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Those of live tensors, in Triton's words."""


@triton.jit  # type: ignore[untyped-decorator]
def lerp_lists(  # type: ignore[no-untyped-def]
    blocks,
    tensors,
    rate_0,
    rate_1,
    rate_2,
    rate_3,
    COUNT: tl.constexpr,
    AVERAGES: tl.constexpr,
    LIVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``average += rate * (live - average)`` for one block of one tensor, in up to four averages.

    Args:
        blocks: for each program, which tensor and which of its blocks; int32 of shape (programs, 2).
        tensors: sizes, addresses of the live tensors, and of each average; int64 of shape (2 + AVERAGES, COUNT).
        rate_0, rate_1, rate_2, rate_3: one for each average; what is left over is not read.
        COUNT: tensors in a list.
        AVERAGES: lists of averages, 1 to 4, in float32.
        LIVE: the dtype of the live tensors.
        ALIGNED: whether all addresses are multiples of 16 bytes, so that as many are read at a time.
        BLOCK: elements in a block.
    """
    program = tl.program_id(0)
    tensor = tl.load(blocks + 2 * program)
    first = tl.load(blocks + 2 * program + 1).to(tl.int64) * BLOCK
    size = tl.load(tensors + tensor)
    places = first + tl.arange(0, BLOCK)
    addresses = tensors + COUNT + tensor
    if first + BLOCK <= size:  # apart, because under a mask each element is read alone
        _lerp_block(addresses, places, None, rate_0, rate_1, rate_2, rate_3, COUNT, AVERAGES, LIVE, ALIGNED)
    else:
        _lerp_block(addresses, places, places < size, rate_0, rate_1, rate_2, rate_3, COUNT, AVERAGES, LIVE, ALIGNED)


@triton.jit  # type: ignore[untyped-decorator]
def _lerp_block(  # type: ignore[no-untyped-def]
    addresses,
    places,
    inside,
    rate_0,
    rate_1,
    rate_2,
    rate_3,
    COUNT: tl.constexpr,
    AVERAGES: tl.constexpr,
    LIVE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    live_at = tl.load(addresses).to(tl.pointer_type(LIVE))
    if ALIGNED:
        live_at = tl.multiple_of(live_at, 16)
    live = tl.load(live_at + places, mask=inside).to(tl.float32)
    for number in tl.static_range(AVERAGES):
        if number == 0:
            rate = rate_0
        elif number == 1:
            rate = rate_1
        elif number == 2:
            rate = rate_2
        else:
            rate = rate_3
        average_at = tl.load(addresses + (1 + number) * COUNT).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            average_at = tl.multiple_of(average_at, 16)
        average = tl.load(average_at + places, mask=inside)
        step = live - average
        # as in torch: from the nearer end, so that a rate of 1 gives the live tensor exactly
        moved = tl.where(rate < 0.5, tl.fma(rate, step, average), tl.fma(rate - 1, step, live))
        tl.store(average_at + places, moved, mask=inside)
