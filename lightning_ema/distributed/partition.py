"""Partitioned averages: the weights are whole in each of several processes (DDP), their averages are split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ema.distributed.processes import Groups, everyone
from lightning_ema.distributed.whole import Whole
from lightning_ema.ops.chunks import flat_alike


@dataclass(frozen=True)
class Partition(Whole):
    """What each process keeps of one tensor's averages: a vector of elements that lie side by side in memory.

    Attributes:
        rank: this process.
        bounds: process ``r`` keeps elements ``bounds[r] : bounds[r + 1]``, in the order in which they lie in memory.
        stride: that of the live tensor, which gives this order.
    """

    rank: int
    bounds: tuple[int, ...]
    stride: tuple[int, ...]

    stored_as_live = False

    def groups(self, live: Tensor) -> Groups:
        """All processes."""
        return everyone()

    def beside(self, tensor: Tensor) -> Tensor:
        """This process's elements of a whole tensor: a view where it lies in memory as the live one does."""
        tensor = tensor.detach()
        if tensor.stride() != self.stride:
            shaped = torch.empty_strided(tensor.shape, self.stride, dtype=tensor.dtype, device=tensor.device)
            tensor = shaped.copy_(tensor)
        return _in_memory_order(tensor)[self._own]

    def whole(self, stored: Tensor, live: Tensor) -> Tensor:
        """The whole tensor on the device of ``live``, from what all processes keep of it, which must all call this."""
        whole = torch.empty_like(live, dtype=stored.dtype, requires_grad=False)
        elements = _in_memory_order(whole)
        elements[self._own].copy_(stored)
        for rank, (start, end) in enumerate(itertools.pairwise(self.bounds)):
            if start < end:
                dist.broadcast(elements[start:end], src=rank)
        return whole

    def write(self, stored: Tensor, value: Tensor) -> None:
        """Copies this process's elements of a whole value."""
        stored.copy_(self.beside(value))

    def check(self, name: str, live: Tensor) -> None:
        """Refuse other strides: elements that lie side by side now may be kept by other processes."""
        if live.stride() != self.stride:
            raise RuntimeError(
                f"{name} changed its memory format from strides {self.stride} to {live.stride()} while its average is "
                "partitioned among processes. Change it before training."
            )

    @property
    def _own(self) -> slice:
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])


def partitions(tensors: Sequence[Tensor], rank: int, processes: int) -> Iterator[Partition]:
    """Cuts tensors, laid end to end, into equal parts: ``ceil(total / processes)`` elements for each process."""
    part = -(-sum(tensor.numel() for tensor in tensors) // processes)
    start = 0
    for tensor in tensors:
        size = tensor.numel()
        bounds = tuple(min(max(place * part - start, 0), size) for place in range(processes + 1))
        yield Partition(rank, bounds, tensor.stride())
        start += size


def can_be_partitioned(tensor: Tensor) -> bool:
    """Whether a whole tensor fills its memory without gaps, so that it can be cut without a copy."""
    return flat_alike(tensor) is not None


def _in_memory_order(tensor: Tensor) -> Tensor:
    flat = flat_alike(tensor)
    if flat is None:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps. With shard=True call "
            "module.to(memory_format=...) before fit."
        )
    return flat[0]
