"""What a user asks of a teacher: one frozen value, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_ema.averaging.settings import OnNonfinite, Settings, as_schedules
from lightning_ema.checks import check_count, check_one_of, check_weight
from lightning_ema.schedules.base import PerUpdate, Schedule
from lightning_ema.schedules.composed import Then
from lightning_ema.semi_supervised.ramps import cosine_ramp, linear_ramp, sigmoid_ramp

Network = Literal["teacher", "student"]
Mode = Literal["eval", "train"]
TeacherBuffers = Literal["ignore", "copy", "average"]
Ramp = Literal["sigmoid", "linear", "cosine"]

_RAMPS = {"sigmoid": sigmoid_ramp, "linear": linear_ramp, "cosine": cosine_ramp}


@dataclass(frozen=True)
class MeanTeacherConfig:
    """The settings of a mean teacher (arXiv 1703.01780).

    With ``n`` the steps after the burn-in and ``d`` the decay: ``teacher = d(n) * teacher + (1 - d(n)) * student``.

    Args:
        decay: the share of the old teacher kept at each step: a number ``d``, which means ``Warmup(d)``, or a
            :class:`~lightning_ema.Schedule`, such as ``Then(0.99, at=1000, second=0.999)``.
        every_n_steps: the teacher is updated at every n-th step.
        burn_in_steps: up to this step the teacher copies the student, and the consistency weight is 0.
        buffers: what the teacher's buffers (BatchNorm statistics) are. ``"ignore"``: its own, never synchronised;
            ``"copy"``: the student's as of the last update; ``"average"``: averaged like the parameters, integer ones
            copied.
        teacher_mode: the mode of the teacher in training: ``"eval"``, or ``"train"`` (with dropout, and BatchNorm
            statistics of the batch). In evaluations it is in eval mode.
        predict_on: which network ``forward`` and ``predict_step`` use.
        consistency_weight: of the unsupervised loss, at the end of its ramp.
        ramp_up_steps: over how many steps after the burn-in the weight rises; 0: it is there at once.
        ramp: how it rises: ``"sigmoid"``, ``exp(-5 (1 - x) ** 2)``; ``"linear"``; ``"cosine"``.
        on_nonfinite: ``"skip"`` leaves out an update from a student that is NaN or infinite, ``"raise"`` raises,
            ``"ignore"`` does not look. Looking reads all its weights once more at each update.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    decay: float | Schedule = 0.999
    every_n_steps: int = 1
    burn_in_steps: int = 0
    buffers: TeacherBuffers = "average"
    teacher_mode: Mode = "eval"
    predict_on: Network = "teacher"
    consistency_weight: float = 1.0
    ramp_up_steps: int = 0
    ramp: Ramp = "sigmoid"
    on_nonfinite: OnNonfinite = "ignore"

    def __post_init__(self) -> None:
        settings = Settings.checked(
            self.decay, self.every_n_steps, 0, None, (), False, "average", None, None, self.on_nonfinite
        )
        if len(settings.decays) > 1 or settings.decay.corrects:
            raise ValueError(
                f"decay is {self.decay!r}; a teacher is one average, as it is. Write one number or Schedule."
            )
        check_count(self.burn_in_steps, "burn_in_steps", at_least=0)
        check_one_of(self.buffers, "buffers", get_args(TeacherBuffers))
        check_one_of(self.teacher_mode, "teacher_mode", get_args(Mode))
        check_one_of(self.predict_on, "predict_on", get_args(Network))
        check_weight(self.consistency_weight, "consistency_weight")
        check_count(self.ramp_up_steps, "ramp_up_steps", at_least=0)
        check_one_of(self.ramp, "ramp", get_args(Ramp))

    @property
    def schedule(self) -> Schedule:
        """The decay from the first step on: 0 during the burn-in, which copies, and then that of ``decay``."""
        (schedule,) = as_schedules(self.decay)
        if not self.burn_in_steps:
            return schedule
        if isinstance(schedule, PerUpdate):
            return replace(schedule, schedule=Then(0.0, at=self.burn_in_steps, second=schedule.schedule))
        return Then(0.0, at=self.burn_in_steps, second=schedule)

    def teacher_trains(self, training: bool) -> bool:
        """Whether the teacher is in train mode while its module is (``training``)."""
        return training and self.teacher_mode == "train"

    def weight(self, step: int) -> float:
        """The weight of the unsupervised loss after ``step`` steps: 0 in the burn-in, then rising along the ramp."""
        if step < self.burn_in_steps:
            return 0.0
        return self.consistency_weight * _RAMPS[self.ramp](step - self.burn_in_steps, self.ramp_up_steps)
