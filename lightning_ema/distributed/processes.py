"""The processes of a run: how many there are, and what they find out together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Groups = tuple[dist.ProcessGroup, ...]
"""Process groups that make up a set of processes together: one for each way in which a tensor is cut."""

SyncBuffers = Literal["first", "mean"]
"""What buffers that differ among processes are set to: those of the first process, or the mean of all."""


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _in_group() else 1


def rank() -> int:
    """The number of this process; the first one is 0."""
    return dist.get_rank() if _in_group() else 0


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def everyone() -> Groups:
    """All processes, as a group."""
    world = dist.GroupMember.WORLD
    return () if world is None else (world,)


def sum_across(values: Tensor, groups: Groups, device: torch.device) -> Tensor:
    """The sums of values over the processes among which a tensor on ``device`` is cut. All of them must call it."""
    return _across(values, groups, device, dist.ReduceOp.SUM)


def all_across(flag: bool, groups: Groups, device: torch.device) -> bool:
    """Whether a flag is up in all processes among which tensors on ``device`` are cut. All of them must call it."""
    return flag if not groups else bool(_across(torch.tensor(float(flag)), groups, device, dist.ReduceOp.MIN))


def sync_buffers_(tensors: Sequence[Tensor], how: SyncBuffers) -> None:
    """Sets tensors that differ among processes to those of the first process, or to their mean; in one collective.

    All processes must call it.
    """
    if not tensors or world_size() == 1:
        return
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    together = torch.cat([tensor.reshape(-1).to(wide) for tensor in tensors])
    if how == "first":
        dist.broadcast(together, src=0)
    else:
        dist.all_reduce(together)
        together /= world_size()
    for tensor, values in zip(tensors, torch.split(together, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view(tensor.shape))


def _across(values: Tensor, groups: Groups, device: torch.device, by: dist.ReduceOp.RedOpType) -> Tensor:
    here = values.to(device)  # NCCL takes no tensors of the CPU
    for group in groups:
        dist.all_reduce(here, by, group)
    return here.to(values.device)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()
