"""The weights in a file that is evaluated: its live ones and its averages, whichever of them ``state_dict`` holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ema.modules.named_tensors import Survey

Weights = Callable[[int | None], Mapping[str, Tensor]]
"""The weights of one of the averages, by its place, or with None the live ones, by name."""


class FileWeights:
    """Lets a module into which a file was loaded hold other weights of that file.

    Args:
        module: holding the file's ``state_dict``.
        holds: which weights these are: the place of an average, or None for the live ones.
        weights: gives the others.

    Attributes:
        has_average: whether the file holds an average that has been updated.
        selected: the place of the one that evaluations were given.
    """

    def __init__(
        self, module: nn.Module, holds: int | None, weights: Weights, has_average: bool = True, selected: int = 0
    ) -> None:
        self.module = module
        self.has_average = has_average
        self.selected = selected
        self._holds = self._loaded = holds
        self._weights = weights
        self._kept: dict[str, Tensor] = {}

    def begin(self, place: int | None) -> None:
        """The module holds these weights until :meth:`end`."""
        self._hold(place)

    def end(self) -> None:
        """It holds again what was loaded."""
        self._hold(self._loaded)

    @contextmanager
    def instead(self, place: int | None) -> Iterator[None]:
        """It holds these weights for the length of a block."""
        before = self._holds
        try:
            self._hold(place)
            yield
        finally:
            self._hold(before)

    def _hold(self, place: int | None) -> None:
        if place == self._holds:
            return
        tensors = Survey(self.module).tensors
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self._kept.items():
                tensors[name].data.copy_(value)
            self._kept, self._holds = {}, self._loaded
            if place == self._loaded:
                return
            others = {name: value for name, value in self._weights(place).items() if name in tensors}
            self._kept = {name: tensors[name].detach().clone() for name in others}
            for name, value in others.items():
                tensors[name].data.copy_(value)
            self._holds = place
