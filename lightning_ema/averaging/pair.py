"""A live tensor beside its averages. Knows torch, not Lightning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ema.distributed.dtensor import Groups, empty_like, groups_of, local, write
from lightning_ema.distributed.partition import Share, everyone
from lightning_ema.modules.named_tensors import Candidate


@dataclass(eq=False)
class Pair:
    """A tensor of the module and its averages.

    Attributes:
        candidate: the tensor, its names and where it hangs.
        averages: one for each decay, of the same shape and strides; empty until the average has started. Where they are
            shared, the elements that this process keeps.
        origin: the live tensor as it was at the start, where a schedule corrects for it.
        share: what each process keeps of the averages, where they are shared among several.
        exclusive: whether the live tensor's storage is its own and may be exchanged for the average's.
        crossed: whether it shares part of its memory with another tensor of the module.
        plain: whether it is a parameter that hangs in one place and may be lent the average's storage itself.
    """

    candidate: Candidate
    averages: list[Tensor]
    origin: Tensor | None = None
    share: Share | None = None
    exclusive: bool = True
    crossed: bool = False
    plain: bool = False

    def __post_init__(self) -> None:
        self.name = self.candidate.name
        self.shape = self.live.shape
        """That of the live tensor when it was paired."""

    @property
    def live(self) -> Tensor:
        """The tensor itself: a Parameter or buffer that keeps its identity when it is moved, cast or lent."""
        return self.candidate.tensor

    @property
    def stored(self) -> list[Tensor]:
        """Everything that is kept beside the live tensor."""
        return self.averages if self.origin is None else [*self.averages, self.origin]

    @property
    def groups(self) -> Groups:
        """The processes among which the averages are cut."""
        return groups_of(self.live) if self.share is None else everyone()

    def copy(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A copy of what this process keeps of the live tensor."""
        with torch.inference_mode(False), torch.no_grad():  # else one made in a validation could not be trained on
            like = self.live if self.share is None else self.part(self.live)
            return empty_like(like, dtype, device).copy_(like)

    def part(self, tensor: Tensor) -> Tensor:
        """The elements of the live tensor, or of one like it, that ``averages`` lie beside: a view."""
        return local(tensor) if self.share is None else self.share.of(tensor.detach(), self.live.detach())

    def beside(self, tensor: Tensor) -> Tensor:
        """The live tensor, or one like it, as it lies beside ``averages``: sharded like them, or a part."""
        return tensor if self.share is None else self.part(tensor)

    def write(self, stored: Tensor, value: Tensor) -> None:
        """Copies a whole value of the live tensor's shape into one of those that are ``stored``."""
        if self.share is None:
            write(stored, value)
        else:
            stored.copy_(self.share.of(value, self.live.detach()))

    def whole(self, part: Tensor) -> Tensor:
        """A tensor from what all processes keep of it, which must all call this; itself where it is not shared."""
        return part if self.share is None else self.share.whole(part, self.live.detach())
