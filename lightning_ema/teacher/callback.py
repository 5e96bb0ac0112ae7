"""Lightning's hooks that keep a teacher: when it starts, follows its student and is resumed. No arithmetic."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_ema.averaging.module_weights import ModuleWeights
from lightning_ema.averaging.not_finite import not_finite, seen_not_finite
from lightning_ema.averaging.report import facts_of, report
from lightning_ema.averaging.starting_values import StartingValues
from lightning_ema.averaging.state_dict import gather, resume
from lightning_ema.averaging.tracker import Tracker
from lightning_ema.averaging.weight_average import WeightAverage, tracker_of
from lightning_ema.checkpoint.entry import RunEntry, read, write
from lightning_ema.checkpoint.section import changes, other_settings
from lightning_ema.modules.batchnorm import statistics_of
from lightning_ema.modules.named_tensors import Survey
from lightning_ema.schedules.base import Plan
from lightning_ema.teacher.config import MeanTeacherConfig
from lightning_ema.teacher.networks import (
    Watched,
    check_alike,
    check_width,
    copy_buffers,
    copy_frozen,
    fit_buffers,
    networks,
)
from lightning_ema.trainer import facts, run_length, strategies
from lightning_ema.trainer.before_forward import before_forward
from lightning_ema.trainer.clock import Clock

_NOT_STARTED = sys.maxsize


@facts.known_to_pytorch_lightning
class TeacherCallback(Callback):
    """Keeps ``pl_module.teacher`` the average of ``pl_module.student``. The mixin brings it in by itself.

    It derives from ``Callback`` alone: Lightning drops callbacks of the trainer that are of a superclass's type.
    """

    def __init__(self) -> None:
        self._average: WeightAverage | None = None
        self._loaded: RunEntry | None = None
        self._clock = Clock()
        self._plan: Plan | None = None
        self._config = MeanTeacherConfig()
        self._module: LightningModule | None = None
        self._teacher = nn.Module()
        self._watched = Watched(self._teacher)
        self._said_not_finite = False
        self._starting: StartingValues | None = None
        self.known = False
        """Whether a trainer had this callback at some time. A tuner sets all callbacks aside for a while."""

    @property
    def state_key(self) -> str:
        return "MeanTeacher"

    @property
    def average(self) -> WeightAverage | None:
        """The engine, which writes into the teacher's own tensors; None until training starts."""
        return self._average

    @property
    def num_steps(self) -> int:
        """Steps of the student since the start."""
        if self._average is not None:
            return self._average.num_steps
        return 0 if self._loaded is None else self._loaded.num_steps

    # --- a fit ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategies.check_strategy(trainer)
        self.known = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_optimizers(trainer, pl_module)
        student, teacher = networks(pl_module)
        config: MeanTeacherConfig = pl_module.mean_teacher  # type: ignore[assignment]
        if config.buffers == "ignore" and config.teacher_mode == "eval" and statistics_of(teacher):
            rank_zero_warn(
                "MeanTeacher: with buffers='ignore' and teacher_mode='eval' the teacher's BatchNorm statistics stay "
                "what they are now, while its weights move on. Write buffers='average', or teacher_mode='train'."
            )
        self._module, self._config, self._plan = pl_module, config, None
        if trainer.ckpt_path is None:
            self._loaded = None  # of a file that was only tested or validated
        begins = run_length.begins(trainer) and self._loaded is None
        known = self._average is not None and tracker_of(self._average).module is student
        if not begins and self._loaded is None and known:
            self._loaded = self._state()  # the teacher, its tensors or the settings may have been replaced
        tracker = self._pair(pl_module)
        if begins:
            tracker.start_at(0)
            self._starting = StartingValues(tracker, self._take_anew)
            self._take_anew(statistics=True)
        else:
            saved_at_start = self._loaded is not None and self._loaded.num_steps == 0
            self._starting = StartingValues(tracker, self._take_anew) if saved_at_start else None
            self._go_on(tracker)
        self._clock.steps.hold(self._owns)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tracker = self._require()
        _check_recalibration(pl_module, self._teacher)  # by now an average beside has been built
        config: MeanTeacherConfig = pl_module.mean_teacher  # type: ignore[assignment]
        self._teacher.train(config.teacher_trains(pl_module.training))  # may be assigned late
        if not tracker.module.training:
            rank_zero_warn(
                "MeanTeacher: the student is in eval mode, so its dropout and BatchNorm do not train. Call "
                "self.student.train() if that is not meant."
            )
        self._plan = self._clock.begin(trainer, tracker.num_steps).after(tracker.start_step)
        tracker.bind(self._plan)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_optimizers(trainer, pl_module)  # again: what is unfrozen in training is added to an optimizer
        self._teacher.requires_grad_(False)  # again: the whole module may have been unfrozen

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        tracker = self._keep_up(pl_module)
        with self._in_words_of_teacher_and_student(tracker):
            tracker.refresh()
        starts = self._starting is not None and self._starting.open
        if self._starting is not None and starts:
            before_forward(trainer, self._starting.before_forward)
        self._clock.steps.before_first = self._starting.before_step if self._starting is not None and starts else None
        self._clock.steps.open()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        steps = self._clock.steps
        if steps.before_first is not None and self._starting is not None and not steps.pending:
            self._starting.before_write()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._clock.steps.close()
        if self.follow() and facts.logs_this_step(trainer):
            tracker = self._require()
            values = {"mean_teacher/decay": tracker.decay(0), "mean_teacher/distance": tracker.distance(0)}
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
            if math.isnan(values["mean_teacher/distance"]):
                self._notice_not_finite()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if facts.is_fitting(trainer):
            self._notice_not_finite()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.follow()
        self._clock.steps.release()
        if self.num_steps > 0 and not facts.is_trial(trainer):
            self._report(self._require())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            self.follow()
        except (RuntimeError, ValueError) as error:  # the exception under way matters more
            rank_zero_warn(str(error))
        finally:
            self._clock.steps.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._clock.steps.release()

    def follow(self) -> bool:
        """Lets the teacher follow the steps taken since the last time; gives whether there were any."""
        steps = self._clock.steps.take()
        if self._average is None or self._module is None or not steps:
            return False
        tracker = self._keep_up(self._module)
        with self._in_words_of_teacher_and_student(tracker):
            if tracker.step(steps):
                self._copy_buffers(tracker)
        return True

    def _catch_up(self) -> None:
        self.follow()

    @contextmanager
    def _in_words_of_teacher_and_student(self, tracker: Tracker) -> Iterator[None]:
        """Where the engine fails because the two are no longer built alike, says which of their tensors differ."""
        try:
            yield
        except (RuntimeError, ValueError):
            check_alike(tracker.module, self._teacher, self._buffers_follow)
            raise

    def _keep_up(self, pl_module: LightningModule) -> Tracker:
        """The engine for the networks as they are now: either one, or a part of the teacher, may have been replaced."""
        tracker = self._require()
        student, teacher = networks(pl_module)
        same = student is tracker.module and teacher is self._teacher
        if same and self._watched.holds() and not tracker.tensors.resized:
            return tracker
        if same and self._buffers_follow:
            fit_buffers(student, teacher)
        self._loaded = self._state()
        tracker = self._pair(pl_module)
        self._go_on(tracker)
        if self._plan is not None:
            tracker.bind(self._plan)
        if self._starting is not None:
            self._starting = StartingValues(tracker, self._take_anew)
        _check_trained(pl_module, tracker)
        return tracker

    def _pair(self, pl_module: LightningModule) -> Tracker:
        student, teacher = networks(pl_module)
        check_width(teacher)
        check_alike(student, teacher, self._buffers_follow)
        teacher.requires_grad_(False)
        self._average = _average(student, teacher, self._config)
        tracker_of(self._average).before_reading = self._catch_up
        self._teacher, self._watched = teacher, Watched(teacher)
        return tracker_of(self._average)

    @property
    def _buffers_follow(self) -> bool:
        return self._config.buffers != "ignore"

    def _owns(self, optimizer: Optimizer) -> bool:
        return self._average is not None and tracker_of(self._average).owns(optimizer)

    def _take_anew(self, statistics: bool) -> None:
        """The teacher is the student as it is now, but for running statistics where these are to stay."""
        tracker = self._require()
        tracker.take_anew(statistics)
        with torch.no_grad():
            copy_frozen(tracker.module, self._teacher, _names(tracker))
        if statistics:
            self._copy_buffers(tracker)

    def _copy_buffers(self, tracker: Tracker) -> None:
        if self._buffers_follow:
            with torch.no_grad():
                copy_buffers(tracker.module, self._teacher, _names(tracker))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.follow()  # into tensors that the file's state_dict refers to

    def state_dict(self) -> dict[str, Any]:
        state = self._state()
        return {} if state is None else write(state)

    def _state(self) -> RunEntry | None:
        """Counters and settings; the tensors lie in the teacher."""
        self.follow()
        if self._average is None:
            return self._loaded
        tracker = tracker_of(self._average)
        with self._in_words_of_teacher_and_student(tracker):
            state = replace(gather(tracker), average={})
        return RunEntry(**vars(state), steps_before=self._clock.steps_before, pace=self._clock.pace)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = read(state_dict, RunEntry) if state_dict else None
        if self._clock.steps.held and self._average is not None:  # a tuner restores in the middle of a fit
            self._go_on(tracker_of(self._average))

    def _go_on(self, tracker: Tracker) -> None:
        """Goes on from the teacher's tensors as they are, with the counters of a file where there is one."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            state = replace(gather(tracker), started=True, start_step=0, names=tuple(_names(tracker)))
            self._clock.resume()
        else:
            state = loaded
            if changed := changes(state.config, tracker.settings.describe()):
                rank_zero_warn(f"MeanTeacher: {other_settings(changed)}")
            self._clock.resume(loaded.steps_before, loaded.pace)
        resume(tracker, state, Survey(self._teacher).tensors)

    def _notice_not_finite(self) -> None:
        tracker = self._require()
        if not self._said_not_finite and (names := not_finite(tracker)):
            self._said_not_finite = True
            rank_zero_warn(f"MeanTeacher: {seen_not_finite(names, tracker.num_steps)}")

    def _report(self, tracker: Tracker) -> None:
        if tracker.num_updates > 0:
            rank_zero_info(f"MeanTeacher: {report(facts_of(tracker, 0))}")
        else:
            rank_zero_warn(
                f"MeanTeacher: the teacher was not updated in {tracker.num_steps} steps and is still what the student "
                f"was at the start: every_n_steps={tracker.settings.every_n_steps} is longer than the run. Lower it."
            )

    def _require(self) -> Tracker:
        if self._average is None:
            raise RuntimeError("the teacher is not kept yet: its callback's on_fit_start did not run.")
        return tracker_of(self._average)


def _check_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    _, teacher = networks(pl_module)
    names = {id(parameter): name for name, parameter in teacher.named_parameters()}
    parameters = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    found = [f"teacher.{names[id(p)]}" for p in parameters if id(p) in names]
    if found:
        raise ValueError(
            f"an optimizer holds {len(found)} parameters of the teacher: {', '.join(found[:4])}"
            f"{', ...' if len(found) > 4 else ''}. The teacher only follows. In configure_optimizers write "
            "self.student.parameters() instead of self.parameters()."
        )


def _check_trained(pl_module: LightningModule, tracker: Tracker) -> None:
    trainer = facts.trainer_of(pl_module)
    if trainer is not None and trainer.optimizers and not any(map(tracker.owns, trainer.optimizers)):
        raise ValueError(
            "the student or its parameters were replaced in training, and no optimizer holds the new ones: neither it "
            "nor the teacher would move. Replace them before fit, or copy the values: "
            "self.student.load_state_dict(...) without assign=True."
        )


def _check_recalibration(pl_module: LightningModule, teacher: nn.Module) -> None:
    if ModuleWeights.of(pl_module).recalibrates and statistics_of(teacher):
        raise ValueError(
            "buffers='recalibrate' of an EMACallback empties the BatchNorm statistics of the whole module, the "
            "teacher's too, and they are not filled again. Write EMACallback(buffers='average') beside a teacher."
        )


def _names(tracker: Tracker) -> list[str]:
    """Of what is averaged."""
    return [name for name, _ in tracker.named_live()]


def _average(student: nn.Module, teacher: nn.Module, config: MeanTeacherConfig) -> WeightAverage:
    return WeightAverage(
        student,
        config.schedule,
        every_n_steps=config.every_n_steps,
        start_step=_NOT_STARTED,
        buffers="average" if config.buffers == "average" else "copy",
        into=teacher,
        on_nonfinite=config.on_nonfinite,
    )
