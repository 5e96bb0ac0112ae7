"""When the starting values of averages are taken anew. Knows torch, not Lightning."""

from __future__ import annotations

from collections.abc import Callable

from lightning_ema.averaging.tracker import Tracker

Take = Callable[[bool], None]
"""Takes all starting values anew; those of running statistics only where it is told so."""


class StartingValues:
    """Takes the starting values of averages anew until an optimizer writes for the first time.

    Pretrained weights are loaded in any hook before the first step, and layers initialise themselves in their first
    forward pass. So what counts is what the module holds right before the first write:

        before the forward   everything; running statistics only here, since forward passes write to them
        before the step      once more, for optimizers that are used around Lightning's wrapper
        before the write     once more, after forward and backward pass. A step may make several (LBFGS, SAM), and has
                             written after the first

    Args:
        tracker: of the averages.
        take: takes the values.
    """

    def __init__(self, tracker: Tracker, take: Take) -> None:
        self._tracker = tracker
        self._take = take
        self._seen_at: int | None = None
        self._has_written = False

    @property
    def open(self) -> bool:
        """Whether they may change still."""
        return self._tracker.at_start

    def before_forward(self) -> None:
        """A batch's forward pass is next. After one without a step, as in accumulation, statistics are used ones."""
        if self.open and self._seen_at != self._tracker.num_steps:
            self._seen_at = self._tracker.num_steps
            self._take(True)

    def before_step(self) -> None:
        """The step of an optimizer begins, the first since the start."""
        self._has_written = False
        self._take(False)

    def before_write(self) -> None:
        """An optimizer is about to write, if it has not within this step."""
        if not self._has_written:
            self._has_written = True
            self._take(False)
