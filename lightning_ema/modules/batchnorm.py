"""BatchNorm statistics: which tensors they are, and estimating them anew. Knows torch, not Lightning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_ema.distributed.processes import sync_buffers_
from lightning_ema.modules.named_tensors import Survey, Table

Statistics = dict[str, Tensor]
"""Running means, variances and counters by their qualified names."""


def statistics_of(module: nn.Module) -> Statistics:
    """The running means, variances and counters of all BatchNorm layers: the tensors themselves.

    The common base of those layers is private in torch; ``update_bn`` itself goes by it.
    """
    buffers = {id(buffer) for layer in _layers(module) for buffer in layer.buffers(recurse=False)}
    return {name: tensor for name, tensor in Survey(module).tensors.items() if id(tensor) in buffers}


@dataclass(frozen=True, eq=False)
class Place:
    """A statistic that hangs in a module as ``table[leaf]``, and may be exchanged for another tensor there.

    Not its contents: a forward pass that is to be gone back through keeps the tensor, and none may write to it.
    """

    table: Table
    leaf: str
    tensor: Tensor

    def insert(self) -> Place:
        """Puts the tensor there; gives what was there before."""
        before = Place(self.table, self.leaf, self.table[self.leaf])  # type: ignore[arg-type]
        self.table[self.leaf] = self.tensor
        return before


def insert_copies(module: nn.Module) -> list[Place]:
    """Puts copies in the places of all statistics, to be written to; gives what was there before."""
    tables = {id(layer._buffers): layer._buffers for layer in _layers(module)}
    places = [Place(t, leaf, b) for t in tables.values() for leaf, b in t.items() if b is not None]
    with torch.inference_mode(False), torch.no_grad():
        copies = {id(place.tensor): place.tensor.clone() for place in places}
    return [Place(place.table, place.leaf, copies[id(place.tensor)]).insert() for place in places]


def estimate(module: nn.Module, batches: Iterable[Any], together: bool) -> Statistics:
    """Sets the statistics to those that the module's weights produce on batches; gives copies of them.

    They are estimated by ``torch.optim.swa_utils.update_bn``: a plain mean over the batches, in train mode.

    Args:
        module: the module, carrying the weights that the statistics are to belong to.
        batches: of training data.
        together: whether all processes estimate now, each from batches of its own.
    """
    with torch.inference_mode(False), torch.no_grad():
        update_bn(batches, module)
        current = statistics_of(module)
        if together:
            sync_buffers_([tensor for tensor in current.values() if tensor.is_floating_point()], "mean")
        return {name: tensor.clone() for name, tensor in current.items()}


def _layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
