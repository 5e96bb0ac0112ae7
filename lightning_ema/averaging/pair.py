"""A live tensor beside its averages. Knows torch, not Lightning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_ema.distributed.base import Cut
from lightning_ema.distributed.processes import Groups
from lightning_ema.modules.named_tensors import Candidate


@dataclass(eq=False)
class Pair:
    """A tensor of the module and its averages.

    Attributes:
        candidate: the tensor, its names and where it hangs.
        averages: one for each decay, as ``cut`` keeps them in this process; empty until the average has started.
        cut: how tensor and averages are cut among processes.
        origin: the live tensor as it was at the start, kept as an average is, where a schedule corrects for it.
        exclusive: whether the live tensor's storage is its own and may be exchanged for the average's.
        crossed: whether it shares part of its memory with another tensor of the module.
        plain: whether it is a parameter that hangs in one place and may carry the average's storage itself.
    """

    candidate: Candidate
    averages: list[Tensor]
    cut: Cut
    origin: Tensor | None = None
    exclusive: bool = True
    crossed: bool = False
    plain: bool = False

    def __post_init__(self) -> None:
        self.name = self.candidate.name
        self.shape = self.live.shape
        """That of the live tensor when it was paired."""

    @property
    def live(self) -> Tensor:
        """The tensor itself: a Parameter or buffer that keeps its identity when it is moved, cast or swapped."""
        return self.candidate.tensor

    @property
    def stored(self) -> list[Tensor]:
        """Everything that is kept beside the live tensor."""
        return self.averages if self.origin is None else [*self.averages, self.origin]

    @property
    def groups(self) -> Groups:
        """The processes among which the averages are cut."""
        return self.cut.groups(self.live)

    @property
    def version(self) -> int:
        """Grows with each write to the live tensor."""
        return self.cut.version(self.live)

    def beside(self, tensor: Tensor) -> Tensor:
        """The live tensor, or one like it, as it lies beside ``averages``: sharded like them, or a part."""
        return self.cut.beside(tensor)

    def part(self, tensor: Tensor) -> Tensor:
        """The plain tensor of it that arithmetic with ``averages`` reads: a view."""
        return self.cut.local(self.cut.beside(tensor))

    def write(self, stored: Tensor, value: Tensor) -> None:
        """Copies a value of the live tensor's shape into one of those that are ``stored``."""
        self.cut.write(stored, value)

    def whole(self, part: Tensor) -> Tensor:
        """One of those that are ``stored``, as the module can carry it. Parts ask for all processes."""
        return self.cut.whole(part, self.live.detach())
