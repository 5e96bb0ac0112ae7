"""The time of a run as its averages see it: the steps taken, and the length that is left."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_ema.schedules.base import Plan
from lightning_ema.trainer import run_length
from lightning_ema.trainer.run_length import Pace
from lightning_ema.trainer.step_counter import StepCounter


class Clock:
    """Counts the steps of a run, and knows its length.

    Attributes:
        steps: counts those that optimizers take.
        steps_before: steps that the average had seen when the present trainer began; the run's length comes on top.
    """

    def __init__(self) -> None:
        self.steps = StepCounter()
        self.steps_before = 0
        self._pace = Pace()

    def begin(self, trainer: Trainer, num_steps: int) -> Plan:
        """Training begins, or goes on, with an average that has seen so many steps; gives the plan from its first."""
        if run_length.begins(trainer):
            self.steps_before, self._pace = num_steps, Pace()
        self._pace = run_length.pace(trainer, self._pace, num_steps - self.steps_before)
        return run_length.plan(trainer, self._pace).after(-self.steps_before)

    @property
    def pace(self) -> Pace:
        """How steps stand to epochs."""
        return self._pace

    def resume(self, steps_before: int = 0, pace: tuple[int | None, int] = (None, 0)) -> None:
        """Goes on from what a file says; without it, as at first."""
        self.steps_before, self._pace = steps_before, Pace(*pace)
