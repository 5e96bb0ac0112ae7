"""Parameters that carry the storage of their averages: most loans, in as few calls a tensor as there can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from lightning_ema.averaging.pair import Pair


class StorageLoan:
    """Live tensors and averages of plain pairs, which exchange storage. No data moves.

    Where Ctrl-C comes in between, :meth:`recall` brings back what was lent so far.

    Args:
        stored: each pair with the average that it is lent.
    """

    def __init__(self, stored: Sequence[tuple[Pair, Tensor]]) -> None:
        self._pairs = [pair for pair, _ in stored]
        self._averages = [average for _, average in stored]
        self._tensors = [pair.candidate.tensor for pair in self._pairs]
        self._lives = [tensor.data for tensor in self._tensors]
        self._slots = [pair.candidate.slots[0] for pair in self._pairs]
        self._versions: list[int] = []
        self._carried: list[Tensor] = []

    def lend(self) -> None:
        """The tensors carry the averages."""
        self._set(self._averages)
        self._versions = [tensor._version for tensor in self._tensors]

    def recall(self) -> None:
        """The tensors carry their live storage, and hang in the module again where another one was hung there."""
        self._set(self._lives)
        for (table, leaf), tensor in zip(self._slots, self._tensors, strict=True):
            if table.get(leaf) is not tensor and leaf in table:
                table[leaf] = tensor

    def put_down(self) -> None:
        """The tensors carry their live storage until :meth:`take_up`."""
        self._carried = [tensor.data for tensor in self._tensors]
        self._set(self._lives)

    def take_up(self) -> None:
        """The tensors carry again what they had put down."""
        self._set(self._carried)

    def written(self) -> list[str]:
        """The names of those that were written to, or replaced, since they were lent."""
        return [
            pair.name
            for pair, tensor, version, (table, leaf) in zip(
                self._pairs, self._tensors, self._versions, self._slots, strict=True
            )
            if tensor._version != version or table.get(leaf) is not tensor
        ]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def average_of(self, name: str) -> Tensor:
        """The average that was lent under this name."""
        return self._averages[self._places[name]]

    def live_of(self, name: str) -> Tensor:
        """The live tensor of this name, which is not in the module now."""
        return self._lives[self._places[name]]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {pair.name: place for place, pair in enumerate(self._pairs)}

    def _set(self, storages: Sequence[Tensor]) -> None:
        for tensor, storage in zip(self._tensors, storages, strict=True):
            tensor.data = storage
