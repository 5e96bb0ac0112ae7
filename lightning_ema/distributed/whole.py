"""Tensors that are whole in this process, and so are their averages: a single device, and DDP."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ema.distributed.processes import Groups


class Whole:
    """The plain :class:`~lightning_ema.distributed.base.Cut`: ``live``, ``stored`` and ``local`` have one form."""

    sharded = False
    stored_as_live = True

    def groups(self, live: Tensor) -> Groups:
        """Nobody need agree: each process has all of it."""
        return ()

    def local(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def beside(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def whole(self, stored: Tensor, live: Tensor) -> Tensor:
        """The stored tensor itself."""
        return stored

    def write(self, stored: Tensor, value: Tensor) -> None:
        """Copies the value."""
        stored.copy_(value)

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def empty_like(self, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of the same shape and strides; in pinned memory where copies to and from CUDA are to come."""
        pinned = device.type == "cpu" and tensor.device.type == "cuda"  # else copies between the two are waited for
        return torch.empty_like(tensor, dtype=dtype, device=device, requires_grad=False, pin_memory=pinned)

    def version(self, live: Tensor) -> int:
        """That of torch."""
        return live._version

    def alike(self, first: Tensor, second: Tensor) -> bool:
        """There is one way to be whole."""
        return True

    def check(self, name: str, live: Tensor) -> None:
        """Any tensor will do."""
