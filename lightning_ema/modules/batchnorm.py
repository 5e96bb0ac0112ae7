"""BatchNorm statistics re-estimated for the averaged weights. Knows torch, not Lightning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_ema.distributed.processes import sync_buffers_
from lightning_ema.modules.named_tensors import Survey


class Recalibration:
    """The running statistics that the averaged weights produce on training data, and their loan to the module.

    They are estimated by ``torch.optim.swa_utils.update_bn``: a plain mean over the batches, in train mode. The live
    statistics are set aside meanwhile and come back with :meth:`take_out`.

    Attributes:
        made_at: the number of updates of the average for which the statistics were estimated; -1 before the first.
        estimated: the statistics, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.made_at = -1
        self._module = module
        self._live: dict[str, Tensor] = {}
        self.estimated: dict[str, Tensor] = {}

    def live(self) -> dict[str, Tensor]:
        """The live statistics, by name, also while the module carries the estimated ones."""
        return self._live or statistics_of(self._module)

    def tensors(self) -> list[Tensor]:
        """The module's own tensors that are written to."""
        return list(statistics_of(self._module).values())

    def put_in(self, batches: Iterable[Any] | None, made_at: int, together: bool = False) -> None:
        """Lets the module, which carries the average, carry the statistics that belong to it.

        Args:
            batches: training batches to estimate them from where that has not been done for ``made_at``; None to make
                do with what there is, which may be the live ones.
            made_at: the number of updates of the average.
            together: whether all processes estimate them now, each from batches of its own.
        """
        current = statistics_of(self._module)
        self._live = {name: tensor.clone() for name, tensor in current.items()}
        try:
            with torch.inference_mode(False), torch.no_grad():
                if self.made_at != made_at and batches is not None:
                    update_bn(batches, self._module)
                    if together:
                        sync_buffers_([tensor for tensor in current.values() if tensor.is_floating_point()], "mean")
                    self.keep(made_at)
                else:
                    _write(self.estimated, current)
        except BaseException:
            self.take_out()
            raise

    def keep(self, made_at: int) -> None:
        """Takes the statistics that the module has now for those of the average after ``made_at`` updates."""
        self.estimated = {name: tensor.clone() for name, tensor in statistics_of(self._module).items()}
        self.made_at = made_at

    def take_out(self) -> None:
        """Brings the live statistics back; without a loan it does nothing."""
        with torch.inference_mode(False), torch.no_grad():
            _write(self._live, statistics_of(self._module))
        self._live = {}


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """The running means, variances and counters of all BatchNorm layers, by qualified name.

    The common base of those layers is private in torch; ``update_bn`` itself goes by it.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    buffers = {id(buffer) for layer in layers for buffer in layer.buffers(recurse=False)}
    return {name: tensor for name, tensor in Survey(module).tensors.items() if id(tensor) in buffers}


def _write(values: dict[str, Tensor], into: dict[str, Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)
