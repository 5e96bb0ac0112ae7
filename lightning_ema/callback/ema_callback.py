"""Lightning's hooks and nothing else: when to step, lend, recall, save and load. No arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ema.averaging.module_weights import Batches, Custody
from lightning_ema.averaging.settings import Buffers, DecayPer, OnNonfinite, Settings, label
from lightning_ema.averaging.weight_average import WeightAverage
from lightning_ema.callback import sharded_files
from lightning_ema.callback.messages import (
    adopted,
    chosen_last,
    introduction,
    monitors_another,
    no_step_seen,
    not_returned,
    nothing_chosen,
    other_settings,
    resumed,
    save_needs_all,
    shared_among_others,
    steps_missed,
    still_rising,
    switching,
    too_long,
    waited,
)
from lightning_ema.checkpoint import entry as checkpoints
from lightning_ema.checks import check_choice, check_count, check_flag
from lightning_ema.evaluation import extra_pass
from lightning_ema.evaluation.passes import Passes
from lightning_ema.evaluation.selection import Mode
from lightning_ema.evaluation.settings import Evaluate, Others, Scoring
from lightning_ema.posthoc.snapshots import Snapshots, check_schedule, discard_future, take, write
from lightning_ema.schedules.basic import Plan, Schedule
from lightning_ema.trainer import facts, training_batches
from lightning_ema.trainer.checkpoint_hook import Hook, ModuleHook
from lightning_ema.trainer.step_counter import StepCounter

UNTIL_EPOCH = sys.maxsize
"""The start step of an average that waits for an epoch; on_train_epoch_start sets the real one."""

AfterFit = Literal["average", "live"]


@facts.known_to_pytorch_lightning
class EMACallback(Callback):
    """Keeps an average of the weights while a model trains; evaluates, saves and delivers the average.

    Example::

        trainer = Trainer(callbacks=[EMACallback(decay=0.999)])

    Args:
        decay, every_n_steps, start_step, decay_per, include, exclude, include_frozen: as in
            :class:`~lightning_ema.WeightAverage`. A number ``d`` means ``Warmup(d)``; the bare constant is
            ``Constant(d)``. A step is one step of an optimizer that trains averaged parameters. A list of decays keeps
            one average for each; the first is evaluated and saved in ``state_dict``.
        dtype, device, overlap, on_nonfinite: as in :class:`~lightning_ema.WeightAverage`.
        buffers: besides ``"average"`` and ``"copy"``, ``"recalibrate"``: BatchNorm statistics are estimated anew from
            training batches before an evaluation or a save of the average, as ``torch.optim.swa_utils.update_bn``
            does; the live ones stay as they are. The module needs a ``forward`` that takes ``batch[0]`` or ``batch``.
        recalibrate_batches: from how many training batches; None: 100.
        shard: under ``strategy="ddp"`` each process keeps only its share of the average; files are the same.
        start_epoch: the average starts with this epoch (the first is 0), or at ``start_step`` if that comes later.
        evaluate: which weights validation, test and predict see, and ``state_dict`` of a checkpoint holds.
            ``"live"``: the average is only followed, logged and stored. ``"both"``: the average and then, in a pass of
            its own over the validation or test data, the live weights, logged as ``<metric>_live``.
        others: what is done with the further averages of several decays: ``"follow"`` them (they are stored, and in
            ``averages``), ``"log"`` their decay and distance too, or also ``"evaluate"`` each in a pass of its own over
            the validation or test data, logged as ``<metric>/<name>_<decay>``.
        select: the metric by which one of several decays is chosen in each validation of a fit: each average is
            evaluated in a pass of its own, logged as ``<metric>/<name>_<decay>``; then the best one is evaluated under
            the plain names, monitored, saved and delivered. Takes one more pass over the data than there are averages.
        mode: whether the smallest (``"min"``) or the largest (``"max"``) value of it is the best.
        evaluate_every: choose only in every so many validations.
        switch_every: set the live weights to the average at every so many steps, or at the end of each ``"epoch"``;
            the optimizer's state is kept. The one setting that changes the training: Switch EMA (arXiv 2402.09240),
            Hare and Tortoise. None: never.
        snapshots: write snapshots of the averages now and then, from which :func:`~lightning_ema.synthesize` makes any
            other average after the run; best with ``decay=[Power(sigma_rel=0.05), Power(sigma_rel=0.10)]``. Without a
            ``dirpath`` they go to ``snapshots`` in the trainer's ``default_root_dir``. Not under ``fast_dev_run``.
        after_fit: which weights the module holds after ``fit``; ``"average"`` applies where ``evaluate`` does.
        name: tells several averages apart in log keys (``<name>/decay``) and checkpoints.

    Raises:
        ValueError, TypeError: an argument is out of range (here), does not fit the trainer (``setup``) or the module
            (start of ``fit``).
    """

    def __init__(
        self,
        decay: float | Schedule | Sequence[float | Schedule] = 0.999,
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        decay_per: DecayPer = "step",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        include_frozen: bool = False,
        buffers: Buffers = "average",
        recalibrate_batches: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shard: bool = False,
        overlap: bool = False,
        start_epoch: int = 0,
        evaluate: Evaluate = "average",
        others: Others = "follow",
        select: str | None = None,
        mode: Mode = "min",
        evaluate_every: int = 1,
        switch_every: int | Literal["epoch"] | None = None,
        snapshots: Snapshots | None = None,
        after_fit: AfterFit = "average",
        on_nonfinite: OnNonfinite = "ignore",
        name: str = "ema",
    ) -> None:
        check_choice(buffers, "buffers", get_args(Buffers))
        self.settings = Settings.checked(
            decay,
            every_n_steps,
            start_step,
            decay_per,
            include,
            exclude,
            include_frozen,
            "copy" if buffers == "recalibrate" else buffers,
            dtype,
            device,
            overlap,
            on_nonfinite,
        )
        if recalibrate_batches is not None:
            check_count(recalibrate_batches, "recalibrate_batches", at_least=1)
            if buffers != "recalibrate":
                raise ValueError(f"recalibrate_batches={recalibrate_batches} needs buffers='recalibrate'.")
        check_count(start_epoch, "start_epoch", at_least=0)
        self.scoring = Scoring.checked(
            evaluate,
            others,
            select,
            mode,
            evaluate_every,
            several=len(self.settings.decays) > 1,
            buffers=buffers,
            switch_every=switch_every,
        )
        if switch_every is not None and switch_every != "epoch":
            check_count(switch_every, "switch_every", at_least=1)
        if snapshots is not None and not isinstance(snapshots, Snapshots):
            raise TypeError(f"snapshots is {snapshots!r}; it must be Snapshots, such as Snapshots(every_n_steps=1000).")
        for schedule in self.settings.decays if snapshots is not None else ():
            check_schedule(schedule)
        check_choice(after_fit, "after_fit", get_args(AfterFit))
        if not isinstance(name, str) or not name:
            raise ValueError(f"name is {name!r}; it must be a word, such as 'ema'.")
        self.recalibrate_batches = (recalibrate_batches or 100) if buffers == "recalibrate" else 0
        check_flag(shard, "shard")
        self.shard = shard
        self.start_epoch = start_epoch
        self.switch_every = switch_every
        self.snapshots = snapshots
        self._snapshots: Snapshots | None = None
        self.after_fit = after_fit
        self.name = name
        self._state_key = checkpoints.state_key(name)  # not the class's name: files of subclasses are files of ours
        self._steps = StepCounter()
        self._custody: Custody | None = None
        self._plan = Plan()
        self._pace = facts.Pace()
        self._skips_said = False
        self._passes = Passes(self.scoring, name)
        self._overwritten = False

    @property
    def state_key(self) -> str:
        return self._state_key  # Lightning asks for it at every hook

    @property
    def average(self) -> WeightAverage | None:
        """The average, that of the first decay where there are several; None until training starts."""
        return None if self._custody is None else self._custody.average

    @property
    def averages(self) -> list[WeightAverage]:
        """All averages of this callback, in the order of their decays; none until training starts."""
        return [] if self.average is None else self.average.averages

    @property
    def selected(self) -> WeightAverage | None:
        """The average that evaluations and files are given: the first, or the one that ``select`` has chosen last."""
        return None if self._custody is None else self.averages[self._custody.chosen]

    # --- a fit ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        facts.check_strategy(trainer)
        if self.shard:
            facts.check_shard(trainer)
        facts.check_callbacks(trainer)
        if self.average is not None:
            self.average.alone = False  # all processes have met, or none would be here
        self._overwritten = facts.overwrites_weights(trainer)
        if self._overwritten:
            self._drop_if_edited()  # as long as it can be told
        self._passes.check(trainer)
        ours = [c for c in facts.callbacks(trainer) if isinstance(c, EMACallback)]
        lenders = [c.name for c in ours if c.scoring.evaluate != "live"]
        if len(lenders) > 1:
            raise ValueError(
                f"the EMACallbacks {', '.join(map(repr, lenders))} all evaluate their average, but the module can "
                "carry only one average in an evaluation. Write evaluate='live' in all but one of them."
            )
        if stage == "fit":
            if self.snapshots is not None and self.snapshots.dirpath is None:
                self.snapshots = replace(self.snapshots, dirpath=Path(trainer.default_root_dir) / "snapshots")
            self._snapshots = None if facts.is_trial(trainer) else self.snapshots
            # before anything is built on the weights: optimizers may copy them
            if self.average is not None and self.average.module is not pl_module:
                self._forget()
            self._drop_if_edited()
            if self._custody is not None:
                self._custody.take_back()
            if facts.spawns(trainer):
                self._warn(
                    "only the module's weights return from the processes that this strategy spawns; resume from a "
                    "checkpoint, or use strategy='ddp'."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._custody is None:
            self._take_up(pl_module, self._new_custody(trainer, pl_module))
            sizes = [tensor.numel() for _, tensor in self._require().named_live()]
            self._say(introduction(self.settings.decays, sizes))
            if self.switch_every is not None:
                self._say(switching(self.switch_every))
        self._steps.hold(self._require().owns)
        self._meet(trainer)
        for monitor, mode in facts.monitored(trainer).items():
            if beside := extra_pass.named_beside(monitor, self._passes.suffixes(self.averages)):
                self._warn(monitors_another(monitor, mode, *beside, self.scoring.select))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        custody, average = self._held(), self._require()
        if self.recalibrate_batches:
            training_batches.check(pl_module, trainer)
        if facts.begins(trainer):
            custody.steps_before, self._pace = average.num_steps, facts.Pace()
        self._pace = facts.pace(trainer, self._pace, average.num_steps - custody.steps_before)
        plan = facts.plan(trainer, self._pace).after(-custody.steps_before)
        epochs_before = int(self.start_epoch * (plan.steps_per_epoch or 0))
        start = average.start_step if average.started else max(self.settings.start_step, epochs_before)
        self._plan = plan.after(start)
        average.bind(self._plan)
        self._start_with_epoch(trainer)
        if self._snapshots is not None:
            discard_future(self._snapshots, self.averages)
        if self._plan.total_steps is not None:
            self._advise(self._plan.total_steps)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_with_epoch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.switch_every is not None:  # due since an epoch that was left early, or a save before it was due
            self._held().switch(self.switch_every, trainer.current_epoch)
        self._require().refresh()  # what was unfrozen joins with its value before its first step
        self._steps.open()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps.close()
        stepped = self._absorb()
        if self.switch_every is not None:
            self._held().switch(self.switch_every, trainer.current_epoch + trainer.is_last_batch)
        if stepped and facts.logs_this_step(trainer):
            self._log(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.recalibrate_batches and self._lends(pl_module):  # while there still is data on the device
            self._lend(trainer, pl_module)
            self._recall()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._absorb()
        missed = self._steps.missed
        self._steps.release()
        if trainer.global_step > 0 and self._require().num_steps == 0:
            self._warn(no_step_seen(trainer.global_step))
        elif missed:
            self._say(steps_missed(missed))
        if waits := self._require().waits:
            self._say(waited(waits))
        if self._require().num_steps > 0 and not facts.is_trial(trainer):
            for average in self.averages:
                self._say(average.report())
        if self.scoring.select is not None and self._require().num_updates > 0:
            self._say_choice(self.scoring.select)
        if self._snapshots is not None and self._require().started:
            write(self._snapshots, self.averages)
        if self._custody is not None:
            self._meet(trainer)
            self._custody.leave(deliver=self.after_fit == "average")

    # --- an evaluation ----------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)
        if choice := self._passes.choose(trainer, pl_module, self._custody, partial(self._batches, trainer)):
            self._say(choice)
        self._lend(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate_again(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recall()
        self._passes.end(self._custody)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)
        self._lend(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate_again(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recall()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forgive()
        self._lend(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recall()

    # --- every way out ----------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        fitting, began = facts.is_fitting(trainer), self._steps.held
        self._passes.drop()
        if self.average is not None:
            self.average.alone = True
        try:
            self._recall()
            if fitting and self._absorbs_alone():
                self._absorb()
        except (RuntimeError, FloatingPointError) as error:  # the exception under way matters more
            rank_zero_warn(str(error))
        finally:
            self._steps.release()
            if self._custody is not None and not fitting:
                self._reject_file(self._custody)
            elif self._custody is not None and (began or not self._custody.left):
                self._custody.leave(deliver=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._recall()
        self._steps.release()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._drop_if_edited()
        self._absorb()
        if self._custody is None:
            return {}
        trainer = facts.trainer_of(self._custody.average.module)
        if trainer is not None:
            self._meet(trainer)
        return checkpoints.write(replace(self._custody.entry(), config=self._config(), pace=self._pace))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.average is not None and self.average.module is not pl_module:
            checkpoint.get("callbacks", {}).pop(self.state_key, None)
        elif self._custody is not None:
            ModuleHook.hang(pl_module, "on_save_checkpoint", self._around_modules_save)  # again, if it was displaced
            self._put_average(trainer, self._custody, checkpoint)
        elif facts.spawns(trainer) and facts.is_fitting(trainer):
            self._warn(not_returned())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not facts.is_fitting(trainer):
            sharded_files.check(trainer, checkpoint, checkpoint.get("callbacks", {}).get(self.state_key))
            return
        self._forget()
        stored, foreign = checkpoints.find(checkpoint, self.state_key), checkpoints.foreign(checkpoint)
        entry = None
        if stored is not None:
            sharded_files.fetch(trainer, pl_module, checkpoint, stored)
            entry = checkpoints.read(stored, checkpoints.CallbackEntry)
        if entry is None and foreign is None:
            self._say("the checkpoint holds no average; it starts from its weights.")
            if not self._steps.held:
                return  # it is built where every other average is, in on_fit_start
        custody = self._new_custody(trainer, pl_module)
        if entry is not None:
            custody.resume(entry, chooses=self.scoring.select is not None)
            self._pace = facts.Pace(*entry.pace)
            if entry.config.get("switch_every") != self._config()["switch_every"]:
                custody.switched = None  # it counts epochs, or other steps
            if changed := checkpoints.changes(entry.config, self._config()):
                self._warn(other_settings(changed))
            self._say(resumed(custody.average.num_steps, custody.average.num_updates))
        elif foreign is not None:
            custody.adopt(*foreign)
            self._say(adopted(custody.average.num_steps, custody.average.num_updates))
        self._take_up(pl_module, custody)

    def _around_modules_save(self, pl_module: LightningModule, checkpoint: dict[str, Any], own: Hook) -> None:
        """The module's own hook runs on the average too; what it leaves out of ``state_dict`` goes into our entry."""
        trainer, custody = facts.trainer_of(pl_module), self._custody
        ours = trainer is not None and self in facts.callbacks(trainer)
        self._absorb()
        mine = ours and custody is not None and custody.average.module is pl_module
        if trainer is None or custody is None or not mine:
            own(checkpoint)
            return
        entry = checkpoint.get("callbacks", {}).get(self.state_key)
        if not custody.gives_average:
            own(checkpoint)
        else:
            if "callbacks" not in checkpoint:  # a weights-only save: no hook of a callback is called for it
                self._put_average(trainer, custody, checkpoint)
            missing: list[str] = []
            with custody.carried(self._batches(trainer)):
                own(checkpoint)
                if entry is not None:
                    not_held = custody.average.not_held_by(checkpoint.get("state_dict", {}))
                    missing = checkpoints.lacking(entry, not_held)
                if "state_dict" in checkpoint:
                    checkpoint["state_dict"] = custody.lasting(checkpoint["state_dict"])
            if entry is not None:  # not from inside the loan, in which averages may lie in the module's own storage
                names = sharded_files.agreed(trainer, custody.average, missing)
                if names:
                    averages = {n: tensor for n, tensor in custody.average.named_tensors() if n in names}
                    checkpoints.add_averages(entry, averages)
        if entry is not None and custody.average.sharded:
            sharded_files.store(trainer, checkpoint, entry)

    def _around_modules_load(self, pl_module: LightningModule, checkpoint: dict[str, Any], own: Hook) -> None:
        """A file is about to be loaded for an evaluation: what the last fit left is put aside."""
        trainer = facts.trainer_of(pl_module)
        self._drop_if_edited()
        evaluates = trainer is not None and not facts.is_fitting(trainer)
        if evaluates and self.average is not None and self.average.module is pl_module:
            self._held().put_aside()
        own(checkpoint)

    def _put_average(self, trainer: Trainer, custody: Custody, checkpoint: dict[str, Any]) -> None:
        """Makes ``checkpoint["state_dict"]`` that of the module carrying the average, where it is not already."""
        if custody.average.sharded and facts.is_interrupted(trainer):
            raise RuntimeError(save_needs_all())
        self._meet(trainer)
        if custody.lends:
            del checkpoint["state_dict"]  # before a second one is gathered
            with custody.carried(self._batches(trainer)):
                checkpoint["state_dict"] = custody.lasting(trainer.strategy.lightning_module_state_dict())

    # --- the steps of the above -------------------------------------------------------------------------------------

    def _config(self) -> dict[str, str | int | bool]:
        buffers = "recalibrate" if self.recalibrate_batches else self.settings.buffers
        own = {"buffers": buffers, "start_epoch": self.start_epoch, "switch_every": self.switch_every or "never"}
        return {**self.settings.describe(), **own}

    def _new_custody(self, trainer: Trainer, pl_module: LightningModule) -> Custody:
        arguments = self.settings.as_arguments()
        arguments["exclude"] = (*self.settings.exclude, *getattr(pl_module, "left_out_of_averages", ()))
        if self.start_epoch > 0:
            arguments["start_step"] = UNTIL_EPOCH
        average = WeightAverage(pl_module, **arguments, shard=self.shard and trainer.world_size > 1)
        return Custody(average, self.scoring.evaluate != "live", self.recalibrate_batches > 0)

    def _take_up(self, pl_module: LightningModule, custody: Custody) -> None:
        self._custody = custody
        ModuleHook.hang(pl_module, "on_save_checkpoint", self._around_modules_save)
        ModuleHook.hang(pl_module, "on_load_checkpoint", self._around_modules_load)
        if self._steps.held:  # a tuner restores in the middle of a fit
            self._steps.hold(custody.average.owns)
            custody.average.bind(self._plan)

    def _start_with_epoch(self, trainer: Trainer) -> None:
        average = self._require()
        waits = not average.started and average.start_step == UNTIL_EPOCH
        if waits and trainer.current_epoch >= self.start_epoch:
            average.start_at(max(self.settings.start_step, average.num_steps))

    def _absorb(self) -> bool:
        average, steps = self.average, self._steps.take()
        if average is None or not steps:
            return False
        average.step(steps)
        if self._snapshots is not None:
            take(self._snapshots, average.averages)
        if average.num_skipped and not self._skips_said:
            self._skips_said = True
            self._warn(
                f"the live weights are not finite at step {average.num_steps}; this update is left out, and so will be "
                "all further ones like it. `average.num_skipped` counts them."
            )
        return True

    def _absorbs_alone(self) -> bool:
        """Whether an update waits for no other process. Of shards all must say if they are finite, and a snapshot."""
        waits = self.settings.on_nonfinite != "ignore" or self._snapshots is not None
        return not (waits and self.average is not None and self.average.sharded)

    def _lends(self, pl_module: LightningModule) -> bool:
        self._drop_if_edited()
        return self._custody is not None and self._custody.average.module is pl_module and self._custody.lends

    def _lend(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not facts.is_fitting(trainer) and trainer.ckpt_path is not None:
            if self._custody is not None and self._custody.average.module is pl_module:
                self._custody.accept_file()
            return  # a file was loaded into the module: that is what was asked for
        self._absorb()
        if self._lends(pl_module) and self._custody is not None:
            self._meet(trainer)
            self._custody.lend(self._batches(trainer))

    def _meet(self, trainer: Trainer) -> None:
        """Says what the processes of this trainer do together in a loan."""
        average = self._require()
        if average.processes > 1 and average.processes != trainer.world_size:
            raise RuntimeError(shared_among_others(average.processes, trainer.world_size))
        average.reconcile = facts.reconcile(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forgive()
        self._passes.begin(trainer, pl_module, self._custody)

    def _say_choice(self, metric: str) -> None:
        custody = self._held()
        if custody.choices == 0:
            self._warn(nothing_chosen(metric))
        else:
            winner = label(self.averages[custody.chosen].settings.decay)
            self._say(chosen_last(metric, winner, custody.chosen, self.after_fit == "average"))

    def _evaluate_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._passes.due:
            self._meet(trainer)
            self._passes.run(trainer, pl_module, self._custody, partial(self._batches, trainer))

    def _recall(self) -> None:
        if self._custody is not None:
            self._custody.recall()

    def _batches(self, trainer: Trainer) -> Batches | None:
        """Training batches to recalibrate from; None outside a fit that is running as it should."""
        running = facts.is_fitting(trainer) and trainer.state.status == "running"
        return (
            training_batches.taken(trainer, self.recalibrate_batches) if self.recalibrate_batches and running else None
        )

    def _drop_if_edited(self) -> None:
        """After a fit, a module whose weights were loaded or edited since is the user's, and the average is over."""
        if self._custody is not None and self._custody.edited():
            self._say(
                "the module's weights were changed since the end of fit. They count from here; the average and the "
                "live weights of that fit are dropped."
            )
            self._forget()

    def _forgive(self) -> None:
        """Before an evaluation a strategy may have overwritten weights by the same weights."""
        if self._overwritten and self._custody is not None:
            self._custody.overwritten()
        self._overwritten = False

    def _reject_file(self, custody: Custody) -> None:
        try:
            custody.reject_file()
        except RuntimeError as error:
            rank_zero_warn(f"{error} The module is left with its live weights.")
            custody.leave(deliver=False)

    def _forget(self) -> None:
        if self._custody is not None:
            module = self._custody.average.module
            ModuleHook.take_down(module, "on_save_checkpoint", self._around_modules_save)
            ModuleHook.take_down(module, "on_load_checkpoint", self._around_modules_load)
        self._custody, self._pace = None, facts.Pace()
        self._skips_said = False

    def _advise(self, total_steps: int) -> None:
        for average in self.averages:
            if warning := too_long(average.schedule, total_steps):
                self._warn(warning)
            if remark := still_rising(average.schedule, total_steps):
                self._say(remark)

    def _log(self, pl_module: LightningModule) -> None:
        first, *others = self._require().averages
        pl_module.log(f"{self.name}/updates", float(first.num_updates), on_step=True, on_epoch=False)
        for average in [first] if self.scoring.others == "follow" else [first, *others]:
            name = self.name if average is first else self._passes.label(average)
            values = {f"{name}/decay": average.decay, f"{name}/distance": average.distance()}
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    def _say(self, text: str) -> None:
        rank_zero_info(f"EMACallback {self.name!r}: {text}")

    def _warn(self, text: str) -> None:
        rank_zero_warn(f"EMACallback {self.name!r}: {text}")

    def _held(self) -> Custody:
        if self._custody is None:
            raise RuntimeError(
                f"EMACallback {self.name!r} has no average yet: it is built in on_fit_start, which did not run."
            )
        return self._custody

    def _require(self) -> WeightAverage:
        return self._held().average
