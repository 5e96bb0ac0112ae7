"""Counting the steps that optimizers really take. Knows torch, not Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class StepCounter:
    """Counts steps of the optimizers that ``owns`` accepts, between :meth:`open` and :meth:`close`.

    Two global hooks see every optimizer, also one used around Lightning's wrapper. A step that a GradScaler skips
    fires none of them; a fused optimizer under a GradScaler fires them all the same and carries ``found_inf``.

    An optimizer whose ``step`` calls another one (``super().step()``, SAM, Lookahead) counts once, at the outermost
    call.

    Attributes:
        missed: steps of theirs that were taken outside.
    """

    def __init__(self) -> None:
        self._owns: Callable[[Optimizer], bool] | None = None
        self._handles: tuple[RemovableHandle, ...] = ()
        self._taken: dict[Optimizer, int] = {}
        self._depth = 0
        self._open = False
        self.missed = 0

    @property
    def held(self) -> bool:
        """Whether the hooks hang."""
        return bool(self._handles)

    def hold(self, owns: Callable[[Optimizer], bool]) -> None:
        """Hangs the hooks in."""
        self.release()
        self._owns = owns
        self.missed = 0
        self._handles = (register_optimizer_step_pre_hook(self._enter), register_optimizer_step_post_hook(self._leave))

    def release(self) -> None:
        """Takes the hooks out and forgets what was counted."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        self._owns = None
        self._taken.clear()
        self._open = False

    def open(self) -> None:
        """Counts from here: a training batch begins."""
        self._depth = 0  # an exception in a step, caught by the user, leaves its post hook out
        self._open = True

    def close(self) -> None:
        """Stops counting: steps outside a batch are tuners' and loaders' own."""
        self._open = False

    def take(self) -> int:
        """The steps since the last call: the most that any one optimizer took. A GAN's batch is one step."""
        if not self._taken:
            return 0
        steps = max(self._taken.values())
        self._taken.clear()
        return steps

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth += 1

    def _leave(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth or self._owns is None or not self._owns(optimizer):
            return
        if not self._open:
            # torch makes the state that it reads or loads by a step with a learning rate of 0
            self.missed += any(float(group.get("lr", 1)) != 0 for group in optimizer.param_groups)
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        self._taken[optimizer] = self._taken.get(optimizer, 0) + 1
