"""Tensors of which this process holds a part: the DTensors that FSDP2 and tensor parallelism make of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate, Shard
except ImportError:  # before torch 2.6 and 2.5
    from torch.distributed._composable.fsdp import FSDPModule  # type: ignore[attr-defined]
    from torch.distributed._tensor import DTensor, Replicate, Shard  # type: ignore[attr-defined]

Groups = tuple[dist.ProcessGroup, ...]
"""Process groups, one for each mesh dimension along which a tensor is cut."""


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process: its shard, which may be empty; the tensor itself where it is whole.

    ``to_local()`` makes a new view at each call and takes ten times as long, which would be felt at every step.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is one of several processes together, also where it is replicated among them."""
    return isinstance(tensor, DTensor)


def version(tensor: Tensor) -> int:
    """Grows with each write to the tensor, whether through the DTensor or past it to the shard."""
    return tensor._version + local(tensor)._version if isinstance(tensor, DTensor) else tensor._version


def empty_like(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that does not require grad, and is cut like the given one."""
    if isinstance(tensor, DTensor) and device.type != tensor.device.type:
        raise ValueError(
            f"device={str(device)!r} for weights whose shards lie on {tensor.device.type!r}: their average lies beside "
            "them. Leave device out."
        )
    pinned = device.type == "cpu" and tensor.device.type == "cuda"  # else copies between the two are waited for
    return torch.empty_like(tensor, dtype=dtype, device=device, requires_grad=False, pin_memory=pinned)


def write(target: Tensor, value: Tensor) -> None:
    """Copies a value of the same shape into a tensor. Of a whole value, each process takes its shard."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        mesh = target.device_mesh
        value = value.to(local(target).device)
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = value.redistribute(placements=target.placements)
    target.copy_(value)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, from all processes among which it is cut; the tensor itself where it is whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def one_of_each_process(number: int, among: Sequence[Tensor]) -> Tensor:
    """A tensor of integers of which each process holds one, over the most processes that any of these is cut among."""
    mesh = max((tensor.device_mesh for tensor in among if isinstance(tensor, DTensor)), key=lambda mesh: mesh.size())
    own = torch.tensor([number], device=local(among[0]).device)
    return DTensor.from_local(own, mesh, [Shard(0)] * mesh.ndim, run_check=False)


def same_cut(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape are cut in the same way, or both are whole."""
    if isinstance(first, DTensor) and isinstance(second, DTensor):
        return first.device_mesh == second.device_mesh and first.placements == second.placements
    return is_sharded(first) == is_sharded(second)


def groups_of(tensor: Tensor) -> Groups:
    """The processes among which a tensor is cut."""
    if not isinstance(tensor, DTensor):
        return ()
    cut = [dimension for dimension, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return tuple(tensor.device_mesh.get_group(dimension) for dimension in cut)


def sum_across(values: Tensor, groups: Groups, device: torch.device) -> Tensor:
    """The sums of values over the processes among which a tensor on ``device`` is cut. All of them must call it."""
    return _across(values, groups, device, dist.ReduceOp.SUM)


def all_across(flag: bool, groups: Groups, device: torch.device) -> bool:
    """Whether a flag is up in all processes among which tensors on ``device`` are cut. All of them must call it."""
    return flag if not groups else bool(_across(torch.tensor(float(flag)), groups, device, dist.ReduceOp.MIN))


def _across(values: Tensor, groups: Groups, device: torch.device, by: dist.ReduceOp.RedOpType) -> Tensor:
    here = values.to(device)  # NCCL takes no tensors of the CPU
    for group in groups:
        dist.all_reduce(here, by, group)
    return here.to(values.device)


def resharding(module: nn.Module) -> list[FSDPModule]:
    """The submodules that show unsharded parameters now and then."""
    return [each for each in module.modules() if isinstance(each, FSDPModule)]


def reshard(modules: Iterable[FSDPModule]) -> None:
    """Makes the modules show their sharded parameters, which are the ones that an optimizer trains.

    After a forward pass without gradients the outermost group still shows unsharded copies, and the next forward pass
    would go on with them whatever was written to the shards.
    """
    for module in modules:
        module.reshard()
