"""Averages shared among processes that all hold the whole weights, as under DDP: who keeps what, and the way back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ema.distributed.dtensor import Groups
from lightning_ema.ops.chunks import flat_alike

Reconcile = Literal["first", "mean"]


@dataclass(frozen=True)
class Share:
    """What each process keeps of one tensor's average.

    Attributes:
        rank: this process.
        bounds: process ``r`` keeps elements ``bounds[r] : bounds[r + 1]``, in the order in which they lie in memory.
        stride: that of the tensor, which gives this order.
    """

    rank: int
    bounds: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def own(self) -> slice:
        """The elements that this process keeps; there may be none."""
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    @property
    def empty(self) -> bool:
        """Whether this process keeps none of the tensor."""
        return self.bounds[self.rank] == self.bounds[self.rank + 1]

    def of(self, tensor: Tensor, alike: Tensor) -> Tensor:
        """This process's elements of a whole tensor, in the memory order of ``alike``: a view where that is its own."""
        if tensor.stride() != alike.stride():
            tensor = torch.empty_like(alike, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        return in_memory_order(tensor)[self.own]

    def whole(self, part: Tensor, alike: Tensor) -> Tensor:
        """The whole tensor on the device of ``alike``, from the parts of all processes, which must all call this."""
        whole = torch.empty_like(alike, dtype=part.dtype, requires_grad=False)
        elements = in_memory_order(whole)
        elements[self.own].copy_(part)
        for rank, (start, end) in enumerate(itertools.pairwise(self.bounds)):
            if start < end:
                dist.broadcast(elements[start:end], src=rank)
        return whole


def shares(tensors: Sequence[Tensor]) -> Iterator[Share]:
    """Cuts tensors, laid end to end, into equal parts: ``ceil(total / processes)`` elements for each process."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    part = -(-sum(tensor.numel() for tensor in tensors) // processes)
    start = 0
    for tensor in tensors:
        size = tensor.numel()
        bounds = tuple(min(max(place * part - start, 0), size) for place in range(processes + 1))
        yield Share(rank, bounds, tensor.stride())
        start += size


def processes() -> int:
    """How many processes there are to share among."""
    return dist.get_world_size() if _in_group() else 1


def everyone() -> Groups:
    """All processes, as a group."""
    world = dist.GroupMember.WORLD
    return () if world is None else (world,)


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return not _in_group() or dist.get_rank() == 0


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def can_be_shared(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, so that it can be cut without a copy."""
    return flat_alike(tensor) is not None


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a tensor without gaps, as a view."""
    flat = flat_alike(tensor)
    if flat is None:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps.")
    return flat[0]


def reconcile_(tensors: Sequence[Tensor], how: Reconcile) -> None:
    """Sets tensors that differ among processes to those of the first process, or to their mean; in one collective.

    All processes must call it.
    """
    if not tensors or processes() == 1:
        return
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    together = torch.cat([tensor.reshape(-1).to(wide) for tensor in tensors])
    if how == "first":
        dist.broadcast(together, src=0)
    else:
        dist.all_reduce(together)
        together /= processes()
    for tensor, values in zip(tensors, torch.split(together, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view(tensor.shape))
