"""The average of a callback from one fit to the next: when it is built, updated and given up."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ema.averaging.frozen import Frozen, frozen_now, moved
from lightning_ema.averaging.not_finite import not_finite, seen_not_finite
from lightning_ema.averaging.starting_values import StartingValues
from lightning_ema.averaging.tensor_set import Batches, Estimate
from lightning_ema.averaging.tracker import Tracker
from lightning_ema.averaging.weight_average import WeightAverage, tracker_of
from lightning_ema.callback import messages
from lightning_ema.callback.messages import partitioned_among_others, still_rising, too_long
from lightning_ema.callback.settings import CallbackSettings
from lightning_ema.evaluation.file_weights import FileWeights
from lightning_ema.files.writing import check_folder
from lightning_ema.posthoc.snapshots import Snapshots, take
from lightning_ema.schedules.base import Plan
from lightning_ema.trainer import facts, run_length, strategies, training_batches
from lightning_ema.trainer.before_forward import before_forward
from lightning_ema.trainer.clock import Clock
from lightning_ema.trainer.method_hook import Call, around_train_end, leave_train_end

NOT_YET = sys.maxsize
"""The start step of an average that waits for an epoch; the start of training or of an epoch sets the real one."""


class Holder:
    """Holds the average of a callback, with the steps that it has not taken up yet.

    Attributes:
        settings: of the callback.
        average: the average; None until training starts.
        tracker: its engine; None like it.
        clock: of the run.
        snapshots: what is written of it in this fit.
        stepped: whether it took up steps in this batch.
        tested: the weights of a file that is evaluated at present; None where none is.
        to_test: gives them, once the file was loaded into the module.
        starting: takes the starting values anew; None like the engine.
        is_new: whether the average is not of a file, and has not been trained yet. It counts steps from those of the
            run, so that ``start_step`` and ``start_epoch`` mean the same.
        before_forget: what is to be done when it is given up, or over.
    """

    def __init__(self, settings: CallbackSettings) -> None:
        self.settings = settings
        self.average: WeightAverage | None = None
        self.tracker: Tracker | None = None
        self.clock = Clock()
        self.snapshots: Snapshots | None = None
        self.stepped = False
        self.starting: StartingValues | None = None
        self.tested: FileWeights | None = None
        self.to_test: Callable[[], FileWeights] | None = None
        self.is_new = False
        self.before_forget: Callable[[], None] | None = None
        self._plan = Plan()
        self._frozen: Frozen = {}
        self._said_skips = self._said_not_finite = False

    # --- there and gone -----------------------------------------------------------------------------------------------

    def build(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds an average of the module as it is."""
        settings = self.settings
        arguments = settings.arguments(getattr(pl_module, "left_out_of_averages", ()))
        if settings.start_epoch > 0:
            arguments["start_step"] = NOT_YET
        self.average = WeightAverage(pl_module, **arguments, shard=settings.shard and trainer.world_size > 1)
        self.tracker = tracker_of(self.average)
        self.tracker.holds.before_drop = self.before_forget
        self.tracker.holds.say = self.say
        self.tracker.before_reading = self.update
        self.starting, self.is_new = StartingValues(self.tracker, self.tracker.take_anew), True
        self.tracker.holds.evaluated_by = settings.name if settings.evaluation.gives_average else ""
        if settings.recalibrate is not None:
            self.tracker.holds.estimates = [Estimate() for _ in settings.average.decays]

    def steps_since_start(self) -> int:
        """Steps since the average started, those of this batch included."""
        tracker = self.require()
        return max(0, tracker.num_steps - tracker.start_step)

    def count(self) -> None:
        """Counts the steps of the optimizers that train what is averaged, from here on."""
        self.clock.steps.hold(self.require().owns)

    def drop_if_over(self) -> None:
        """After a fit, a module whose weights were loaded or edited since is the user's, and the average is over."""
        if self.tracker is None:
            return
        self.tracker.weights.notice_edits()
        if self.tracker.holds.over:
            self.say(
                "the module's weights were changed since the end of training. They count from here; the average and "
                "the live weights of that fit are dropped."
            )
            self.forget()

    def forget(self) -> None:
        """Gives the average up."""
        if self.tracker is not None:
            self.tracker.weights.drop(self.tracker.holds)
        self.average = self.tracker = self.starting = None
        self.clock.resume()
        self._said_skips = self._said_not_finite = False

    def open_file(self) -> None:
        """An evaluation begins: a file has been loaded into the module, if one is evaluated."""
        if self.to_test is not None:
            self.tested, self.to_test = self.to_test(), None

    def of(self, pl_module: LightningModule) -> Tracker | None:
        """The engine, where there is one of this very module."""
        return self.tracker if self.tracker is not None and self.tracker.module is pl_module else None

    def require(self) -> Tracker:
        """The engine.

        Raises:
            RuntimeError: there is none yet.
        """
        if self.tracker is None:
            raise RuntimeError(
                f"EMACallback {self.settings.name!r} has no average yet: it is built in on_fit_start, which did not "
                "run."
            )
        return self.tracker

    def begin_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit begins: live weights are back before anything is built on them, since optimizers may copy them."""
        snapshots = self.settings.snapshots
        if snapshots is not None and snapshots.dirpath is None:
            snapshots = replace(snapshots, dirpath=Path(trainer.default_root_dir) / "snapshots")
        self.snapshots = None if facts.is_trial(trainer) else snapshots
        if self.snapshots is not None and self.snapshots.dirpath is not None and trainer.is_global_zero:
            check_folder(Path(self.snapshots.dirpath), f"EMACallback {self.settings.name!r}: snapshots")
        if self.of(pl_module) is None:
            self.forget()
        elif self.tracker is not None:
            self.tracker.weights.begin(self.tracker.holds)

    def around_train_end(self, trainer: Trainer, call: Call) -> None:
        """Training is over: what anyone writes to the module in ``on_train_end`` is an edit of theirs."""
        tracker = self.of(trainer.lightning_module)
        if tracker is not None:
            self.update()
            tracker.weights.end_training(tracker.holds)
        call()

    def stop(self, trainer: Trainer) -> None:
        """No step counts any more, and the end of training is nothing to wait for."""
        self.clock.steps.release()
        leave_train_end(trainer, self.around_train_end)

    def leave(self, apply: bool) -> None:
        """A fit ends: the module is left with its live weights or, where there is one, with the average."""
        tracker = self.require()
        tracker.release()
        tracker.weights.leave(tracker.holds, apply)

    def reject_file(self) -> None:
        """A file could not be evaluated: the module is left as the last fit had left it."""
        try:
            self.require().weights.reject_file()
        except RuntimeError as error:
            self.warn(f"{error} The module is left with its live weights.")
            self.leave(apply=False)

    # --- a run --------------------------------------------------------------------------------------------------------

    def begin(self, trainer: Trainer) -> None:
        """Training begins: schedules and start learn the length of the run."""
        around_train_end(trainer, self.around_train_end)
        tracker, settings = self.require(), self.settings
        if self.is_new and not run_length.begins(trainer):
            tracker.count_from(run_length.steps_taken(trainer))
        self.is_new = False
        plan = self.clock.begin(trainer, tracker.num_steps)
        start = tracker.start_step
        if not tracker.started:
            start = max(settings.average.start_step, self._start_of_run(plan))
        self._plan = plan.after(start)
        tracker.bind(self._plan)
        if isinstance(settings.start_epoch, float) and settings.start_epoch > 0 and not tracker.started:
            tracker.start_at(start)
        self.start_with_epoch(trainer)
        self.starting = StartingValues(tracker, tracker.take_anew)  # again: an earlier fit may have ended in a batch
        self._frozen = frozen_now(tracker)
        if self._plan.total_steps is not None:
            self._advise(self._plan.total_steps)

    def start_with_epoch(self, trainer: Trainer) -> None:
        """An epoch begins: the average starts where it has waited for this one."""
        tracker = self.require()
        waits = not tracker.started and tracker.start_step == NOT_YET
        if waits and trainer.current_epoch >= self.settings.start_epoch:
            tracker.start_at(max(self.settings.average.start_step, tracker.num_steps))

    def go_on(self) -> None:
        """A file was loaded in the middle of a fit, as tuners do."""
        self.count()
        self.require().bind(self._plan)

    def begin_batch(self, trainer: Trainer) -> None:
        """A training batch begins, from which on steps count."""
        tracker, steps = self.require(), self.clock.steps
        tracker.refresh()  # what was unfrozen joins with its value before its first step
        self.stepped = False
        if self.starting is not None and tracker.at_start:
            before_forward(trainer, self.starting.before_forward)
            steps.before_first = self.starting.before_step
        else:
            steps.before_first = None
        steps.open()

    def before_write(self) -> None:
        """An optimizer is about to write to the weights."""
        steps = self.clock.steps
        if steps.before_first is not None and self.starting is not None and not steps.pending:
            self.starting.before_write()

    def update(self) -> None:
        """Takes up the steps since the last time."""
        tracker, steps = self.tracker, self.clock.steps.take()
        if tracker is None or not steps:
            return
        tracker.step(steps)
        self.stepped = True
        if self.snapshots is not None and self.average is not None:
            take(self.snapshots, self.average.averages)
        if tracker.num_skipped and not self._said_skips:
            self._said_skips = True
            self.warn(
                f"the live weights are not finite at step {tracker.num_steps}; this update is left out, and so will be "
                "all further ones like it. The report after fit counts them."
            )

    def notice_not_finite(self) -> None:
        """Warns, once, of an average that is not finite. Reads all of it, which an update by default does not."""
        tracker = self.require()
        if not self._said_not_finite and (names := not_finite(tracker)):
            self._said_not_finite = True
            self.warn(seen_not_finite(names, tracker.num_steps))

    def update_without_others(self) -> None:
        """The same after an exception, where that waits for no other process.

        Of sharded tensors all processes must say if they are finite, and write a snapshot.
        """
        waits = self.settings.average.on_nonfinite != "ignore" or self.snapshots is not None
        if not (waits and self.tracker is not None and self.tracker.sharded):
            self.update()

    def check_processes(self, trainer: Trainer) -> None:
        """Says what the processes of this trainer do together in a swap.

        Raises:
            RuntimeError: the average is partitioned among another number of them.
        """
        tracker = self.require()
        if tracker.processes > 1 and tracker.processes != trainer.world_size:
            raise RuntimeError(partitioned_among_others(tracker.processes, trainer.world_size))
        tracker.sync_buffers = strategies.sync_buffers(trainer)

    def batches(self, trainer: Trainer) -> Batches | None:
        """Training batches to recalibrate from; None outside a fit that is running as it should."""
        running = facts.is_fitting(trainer) and trainer.state.status == "running"
        recalibrate = self.settings.recalibrate
        return training_batches.taken(trainer, recalibrate.batches) if recalibrate is not None and running else None

    def notice_frozen(self) -> None:
        """Says which frozen parameters were changed in training."""
        if names := moved(self.require(), self._frozen):
            self.say(messages.frozen_moved(names))

    # --- what it says -------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A line in the log."""
        rank_zero_info(f"EMACallback {self.settings.name!r}: {text}")

    def warn(self, text: str) -> None:
        """A warning."""
        rank_zero_warn(f"EMACallback {self.settings.name!r}: {text}")

    def _start_of_run(self, plan: Plan) -> int:
        """The step that ``start_epoch`` means, as far as the plan tells: an epoch's length, or a share of the run."""
        start_epoch = self.settings.start_epoch
        if not isinstance(start_epoch, float) or start_epoch == 0:
            return int(start_epoch * (plan.steps_per_epoch or 0))
        if plan.total_steps is None:
            raise ValueError(
                f"start_epoch={start_epoch} is a share of the run's steps, and their number is not known here. Write a "
                "whole number of epochs, or start_step."
            )
        before = self.clock.steps_before
        return before + math.ceil(start_epoch * (plan.total_steps - before))

    def _advise(self, total_steps: int) -> None:
        for schedule in self.require().schedules:
            if warning := too_long(schedule, total_steps):
                self.warn(warning)
            if remark := still_rising(schedule, total_steps):
                self.say(remark)
