"""Which pairs are updated together, and where: here, in a thread or on a stream. The arithmetic is that of ``ops``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ema.averaging.pair import Pair
from lightning_ema.ops.fused import lerp_of
from lightning_ema.ops.lerp import Lerp
from lightning_ema.ops.offload import Offload, Update
from lightning_ema.ops.side_stream import SideStream, has_streams

# Where the update of a group is made:
#   here    where training goes on, which comes behind it
#   thread  in a thread, from an accelerator into host memory
#   stream  on a CUDA stream of its own
Where = Literal["here", "thread", "stream"]


@dataclass(frozen=True, eq=False)
class Group:
    """Pairs of one kind.

    Attributes:
        averages: a list for each decay.
        stretch: the part of the list of live tensors that belongs to them.
        where: their update is made.
    """

    averages: list[list[Tensor]]
    stretch: slice
    where: Where


OVERLAP = False
"""Whether parameters on CUDA are averaged on a stream of their own; until it was measured on a device, they are not."""


class Updater:
    """Makes the updates of pairs, until it is given others."""

    def __init__(self) -> None:
        self._offload = Offload()
        self._streams: dict[torch.device, SideStream] = {}
        self._pairs: list[Pair] = []
        self._here: list[Group] = []
        self._offloaded: list[Group] = []
        self._on_streams: dict[torch.device, list[Group]] = {}
        self._lerps: dict[Group, Lerp] = {}

    @property
    def waits(self) -> int:
        """How often training had to wait for an update in host memory."""
        return self._offload.waits

    def in_order(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs with those of one kind side by side."""
        return sorted(pairs, key=lambda pair: str(self._kind(pair)))

    def arrange(self, pairs: Sequence[Pair]) -> None:
        """Takes other pairs, which are :meth:`in_order` and have averages."""
        self.finish()
        self.release()
        self._pairs = list(pairs)
        groups, start = [], 0
        for kind, pairs_alike in itertools.groupby(self._pairs, key=self._kind):
            alike = list(pairs_alike)
            locals_ = ([pair.cut.local(average) for average in pair.averages] for pair in alike)
            averages = [list(each) for each in zip(*locals_, strict=True)]
            groups.append(Group(averages, slice(start, start + len(alike)), kind[-1]))
            start += len(alike)
        self._here = [group for group in groups if group.where == "here"]
        self._offloaded = [group for group in groups if group.where == "thread"]
        self._on_streams = {}
        for group in groups:
            if group.where == "stream":
                self._on_streams.setdefault(self._pairs[group.stretch.start].live.device, []).append(group)

    def _kind(self, pair: Pair) -> tuple[torch.dtype, torch.device, torch.dtype, torch.device, Where]:
        live, average = pair.live, pair.averages[0] if pair.averages else pair.live
        where: Where = "here"
        if average.device.type == "cpu" != live.device.type:
            where = "thread"
        elif OVERLAP and has_streams(live.device) and not written_by_forward(pair):
            where = "stream"
        return live.dtype, live.device, average.dtype, average.device, where

    def update(self, lives: Sequence[Tensor], rates: Sequence[float]) -> None:
        """``average += rate * (live - average)`` for each decay's average, with the live tensors of the pairs."""
        self._update_each(self._here, lives, rates)
        for device, groups in self._on_streams.items():  # together: one more would wait for those before it
            self._stream(device).submit(partial(self._update_each, groups, lives, rates))
        if self._offloaded:
            self._offload.submit([Update(g.averages, self._as_now(lives, g.stretch), rates) for g in self._offloaded])

    def finish(self) -> None:
        """What comes now finds the update under way made."""
        self._offload.finish()
        for stream in self._streams.values():
            stream.finish()

    def release(self) -> None:
        """Gives up views of the live tensors, which would keep the memory that a module is moved away from."""
        self._lerps.clear()

    def _update_each(self, groups: Sequence[Group], lives: Sequence[Tensor], rates: Sequence[float]) -> None:
        for group in groups:
            if group not in self._lerps:
                self._lerps[group] = lerp_of(group.averages, lives[group.stretch])
            self._lerps[group](rates)

    def _stream(self, device: torch.device) -> SideStream:
        if device not in self._streams:
            self._streams[device] = SideStream(device)
        return self._streams[device]

    def _as_now(self, lives: Sequence[Tensor], stretch: slice) -> list[Tensor]:
        """Live tensors that only an optimizer changes: copies of those that a forward pass writes to."""
        return [
            live.detach().clone() if written_by_forward(pair) else live
            for pair, live in zip(self._pairs[stretch], lives[stretch], strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        self.finish()
        self.release()  # a copy has tensors of its own
        return {**self.__dict__, "_streams": {}}


def written_by_forward(pair: Pair) -> bool:
    """Whether a forward pass may write to the live tensor, as BatchNorm and ``nn.Embedding(max_norm=...)`` do."""
    return pair.candidate.is_buffer or pair.candidate.rewritten
