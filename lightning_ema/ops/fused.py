"""Chooses the fastest update for lists of tensors: on CUDA one launch, where Triton is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ema.ops.chunks import flat_alike
from lightning_ema.ops.lerp import AlikeLerp, CastLerp, Lerp

BLOCK = 4096
"""Elements that one program of the kernel reads and writes."""

TOGETHER = 4
"""The most averages that one launch takes: each live element is read once for all of them."""

Lists = Sequence[Sequence[Tensor]]


def lerp_of(averages: Lists, lives: Sequence[Tensor]) -> Lerp:
    """The fastest update of these lists: ``averages[i][k] += rates[i] * (lives[k] - averages[i][k])``.

    It holds the tensors, and views or addresses of them: one that is given other storage asks for a new update.

    Args:
        averages: lists of tensors, all of one dtype on one device.
        lives: tensors of the same shapes, of one dtype on one device.
    """
    alike = (lives[0].dtype, lives[0].device) == (averages[0][0].dtype, averages[0][0].device)
    if alike and len(averages) == 1:
        return AlikeLerp(averages, lives)
    eager: Callable[[Lists, Sequence[Tensor]], Lerp] = AlikeLerp if alike else CastLerp
    on_cuda = lives[0].device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return FusedLerp(averages, lives, eager) if on_cuda and fits(averages, lives) else eager(averages, lives)


def fits(averages: Lists, lives: Sequence[Tensor]) -> bool:
    """Whether :class:`FusedLerp` can take these lists: float32 averages, each laid out as its live tensor is."""
    live, average = lives[0], averages[0][0]
    dtypes = average.dtype == torch.float32 and live.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not dtypes or live.device != average.device or len(averages) > TOGETHER:
        return False
    return all(flat_alike(*each) is not None for each in zip(lives, *averages, strict=True))


class FusedLerp:
    """``averages[i][k] += rates[i] * (lives[k] - averages[i][k])`` in one launch, without a temporary.

    The addresses of the tensors lie in a table beside them, with 8 bytes for each block of ``BLOCK`` elements. Nothing
    is waited for, so that a CUDA graph can hold a launch, with the rates that it had when it was captured.

    Args:
        averages: up to ``TOGETHER`` lists for which :func:`fits` holds.
        lives: tensors of the same shapes.
        eager: makes the update that stands in where the kernel cannot be built.
    """

    def __init__(
        self, averages: Lists, lives: Sequence[Tensor], eager: Callable[[Lists, Sequence[Tensor]], Lerp]
    ) -> None:
        self._lists = averages, lives
        self._eager = eager
        self._instead: Lerp | None = None
        self._launched = False
        sizes = [live.numel() for live in lives]
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (lives, *averages)]
        blocks = [(place, block) for place, size in enumerate(sizes) for block in range(-(-size // BLOCK))]
        self._aligned = all(address % 16 == 0 for row in addresses for address in row)
        self._blocks = torch.tensor(blocks, dtype=torch.int32, device=lives[0].device)
        self._table = torch.tensor([sizes, *addresses], dtype=torch.int64, device=lives[0].device)

    def __call__(self, rates: Sequence[float]) -> None:
        """Puts the update on the current stream.

        Warns once where Triton cannot build the kernel, for want of a C compiler for instance; the update is made
        chunk by chunk then.
        """
        if self._instead is None:
            try:
                self._launch(rates)
                self._launched = True
                return
            except Exception as error:
                if self._launched:
                    raise
                warnings.warn(
                    f"the update in one launch could not be built ({type(error).__name__}: {error}); it is made in "
                    "chunks instead, which gives the same average with more launches. Triton needs a C compiler.",
                    stacklevel=2,
                )
                self._instead = self._eager(*self._lists)
        self._instead(rates)

    def _launch(self, rates: Sequence[float]) -> None:
        from lightning_ema.ops.triton_lerp import DTYPES, lerp_lists

        averages, lives = self._lists
        if not len(self._blocks):
            return
        with torch.cuda.device(self._table.get_device()):  # Triton launches on the current one; -1, a CPU, is none
            lerp_lists[(len(self._blocks),)](
                self._blocks,
                self._table,
                *rates,
                *[0.0] * (TOGETHER - len(rates)),
                COUNT=len(lives),
                AVERAGES=len(averages),
                LIVE=DTYPES[lives[0].dtype],
                ALIGNED=self._aligned,
                BLOCK=BLOCK,
                num_warps=8,
                enable_fp_fusion=False,  # the kernel says where it fuses
            )
