"""Sharded tensors, of which this process holds a part: the DTensors that FSDP2 and tensor parallelism make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_ema.distributed.base import local, register
from lightning_ema.distributed.processes import Groups

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate, Shard
except ImportError:  # before torch 2.6 and 2.5
    from torch.distributed._composable.fsdp import FSDPModule  # type: ignore[attr-defined]
    from torch.distributed._tensor import DTensor, Replicate, Shard  # type: ignore[attr-defined]


class Sharded:
    """Live tensor and average are DTensors with one mesh and the same placements; ``local`` is the shard."""

    sharded = True  # also where it is replicated among the processes of a mesh
    stored_as_live = True

    def takes(self, tensor: Tensor) -> bool:
        """Whether the tensor is one of several processes together."""
        return isinstance(tensor, DTensor)

    def groups(self, live: Tensor) -> Groups:
        """One for each dimension of the mesh along which the tensor is cut."""
        live = _as_dtensor(live)
        cut = [dimension for dimension, placement in enumerate(live.placements) if not placement.is_replicate()]
        return tuple(live.device_mesh.get_group(dimension) for dimension in cut)

    def local(self, tensor: Tensor) -> Tensor:
        """The shard. ``to_local()`` makes a new view at each call and takes ten times as long, at every step."""
        shard: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
        return shard

    def beside(self, tensor: Tensor) -> Tensor:
        """The DTensor itself."""
        return tensor

    def whole(self, stored: Tensor, live: Tensor) -> Tensor:
        """The DTensor itself, which is how the module holds it: nothing is gathered."""
        return stored

    def write(self, stored: Tensor, value: Tensor) -> None:
        """Copies a value into the tensor. Of a plain value, which all processes have, each takes its shard."""
        if not isinstance(value, DTensor):
            stored = _as_dtensor(stored)
            mesh = stored.device_mesh
            value = value.to(stored._local_tensor.device)
            value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
            value = value.redistribute(placements=stored.placements)
        stored.copy_(value)

    def gathered(self, tensor: Tensor) -> Tensor:
        """The whole of the tensor, in each of the processes."""
        return _as_dtensor(tensor).full_tensor()

    def empty_like(self, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A DTensor that is cut in the same way.

        Raises:
            ValueError: its shards would lie on another kind of device than those of the weights.
        """
        if device.type != tensor.device.type:
            raise ValueError(
                f"device={str(device)!r} for weights whose shards lie on {tensor.device.type!r}: their average lies "
                "beside them. Leave device out."
            )
        return torch.empty_like(tensor, dtype=dtype, device=device, requires_grad=False)

    def version(self, live: Tensor) -> int:
        """Sees writes through the DTensor, and past it to the shard."""
        return live._version + self.local(live)._version

    def alike(self, first: Tensor, second: Tensor) -> bool:
        """Whether mesh and placements are the same."""
        one, other = _as_dtensor(first), _as_dtensor(second)
        return one.device_mesh == other.device_mesh and one.placements == other.placements

    def check(self, name: str, live: Tensor) -> None:
        """A DTensor keeps its shards in whatever memory format."""

    def reshards(self, module: nn.Module) -> list[Callable[[], None]]:
        """That of each group of FSDP2, which shows unsharded parameters now and then.

        After a forward pass without gradients the outermost group still shows unsharded copies, and the next forward
        pass would go on with them whatever was written to the shards.
        """
        return [each.reshard for each in module.modules() if isinstance(each, FSDPModule)]


def one_of_each_process(number: int, among: Sequence[Tensor]) -> Tensor:
    """A tensor of integers of which each process holds one, over the most processes that any of these is cut among."""
    mesh = max((tensor.device_mesh for tensor in among if isinstance(tensor, DTensor)), key=lambda mesh: mesh.size())
    own = torch.tensor([number], device=local(among[0]).device)
    return DTensor.from_local(own, mesh, [Shard(0)] * mesh.ndim, run_check=False)


def _as_dtensor(tensor: Tensor) -> DTensor:
    """For type checkers: :meth:`Sharded.takes` was asked."""
    return tensor  # type: ignore[return-value]


register(Sharded())
