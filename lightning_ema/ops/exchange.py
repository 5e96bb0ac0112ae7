"""The contents of two tensors change places, and back, whatever interrupts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_ema.ops.chunks import chunks
from lightning_ema.ops.lerp import CHUNK


@dataclass(frozen=True, eq=False)
class _UnderWay:
    """A chunk whose contents are about to change places.

    Attributes:
        done: how many chunks were exchanged before.
        place: of the chunk.
        contents: copies of what both held.
    """

    done: int
    place: int
    contents: tuple[Tensor, Tensor]


class Exchange:
    """Lets two tensors of one shape and dtype change their contents, in place, chunk by chunk.

    Ctrl-C may come between any two lines, so nothing is told by how far a line came. What is about to be written is
    noted first, with copies; ``done`` is the one word on how many chunks are exchanged. Where a chunk is noted and
    ``done`` is what it was before, both are given back what they held, whatever was written: that can be done twice.

    Args:
        first: a tensor.
        second: the other one.
    """

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self._tensors = first, second
        self._views: list[tuple[Tensor, Tensor]] = []
        self._under_way: _UnderWay | None = None
        self._done = 0

    @property
    def _chunks(self) -> list[tuple[Tensor, Tensor]]:
        if not self._views:
            first, second = (tensor.data for tensor in self._tensors)
            self._views = [(one, other) for (one,), (other,) in chunks([[first], [second]], CHUNK)]
        return self._views

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": []}  # in a copy, a view would be one of nothing

    @property
    def exchanged(self) -> bool:
        """Whether the first tensor holds what was in the second one, all of it."""
        return self._done == len(self._chunks) > 0

    def there(self) -> None:
        """Exchanges the contents; if that is interrupted, both hold what they did."""
        self._mend()
        try:
            while self._done < len(self._chunks):
                self._exchange(self._done, self._done + 1)
        except BaseException:
            self.back()
            raise

    def back(self) -> None:
        """Exchanges them back, as far as they are exchanged. Once it was interrupted it can be called again."""
        self._mend()
        while self._done:
            self._exchange(self._done - 1, self._done - 1)

    def _exchange(self, place: int, done: int) -> None:
        first, second = self._chunks[place]
        contents = first.clone(), second.clone()
        self._under_way = _UnderWay(self._done, place, contents)
        first.copy_(contents[1])
        second.copy_(contents[0])
        self._done = done
        self._under_way = None

    def _mend(self) -> None:
        noted = self._under_way
        if noted is not None and noted.done == self._done:
            for tensor, contents in zip(self._chunks[noted.place], noted.contents, strict=True):
                tensor.copy_(contents)
        self._under_way = None
