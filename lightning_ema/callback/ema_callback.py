"""Lightning's hooks in the order in which they run: when to update, swap, save and load. No arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_ema.averaging.settings import Buffers, OnNonfinite
from lightning_ema.averaging.weight_average import WeightAverage
from lightning_ema.callback import messages
from lightning_ema.callback.beside import check_beside, check_no_overlap, warn_of_monitors
from lightning_ema.callback.checkpointing import Checkpointing
from lightning_ema.callback.evaluations import Evaluations
from lightning_ema.callback.holder import Holder
from lightning_ema.callback.reporting import log, say_at_end
from lightning_ema.callback.settings import AfterFit, CallbackSettings
from lightning_ema.checkpoint.section import state_key
from lightning_ema.evaluation.passes import Passes
from lightning_ema.evaluation.settings import Evaluate
from lightning_ema.posthoc.snapshots import Snapshots, discard_future, write
from lightning_ema.schedules.base import Schedule
from lightning_ema.trainer import facts, strategies, training_batches


@facts.known_to_pytorch_lightning
class EMACallback(Callback):
    """Keeps an average of the weights while a model trains; evaluates, saves and applies it (EMA weights, shadow).

    Example::

        trainer = Trainer(callbacks=[EMACallback(decay=0.999)])

    Args:
        decay: the share of the old average kept at each step: a number ``d``, which means ``Warmup(d)``, or a
            :class:`~lightning_ema.Schedule` such as ``Constant(0.999)``. A list keeps one average for each; the first
            is evaluated and saved in ``state_dict``.
        every_n_steps: update at every n-th step of an optimizer that trains averaged parameters.
        start_step: up to and including this step the average *is* the live weights.
        start_epoch: the average starts with this epoch (the first is 0), or at ``start_step`` if that comes later. A
            number below 1 is a share of the run's steps: ``0.8`` averages the last fifth.
        include: glob patterns over qualified names; only what one of them matches is averaged. None: everything.
        exclude: glob patterns of what is left out, also of what ``include`` matches.
        include_frozen: also average parameters that do not require grad. Without it they join when unfrozen.
        buffers: ``"average"`` averages BatchNorm statistics and other floating-point buffers; ``"copy"`` leaves the
            live ones in place; ``"recalibrate"`` or ``Recalibrate(batches=200)`` estimates the statistics anew.
        dtype: of the average. None: float32 for weights of fewer than 32 bits, else the weights' own.
        device: of the average. None: beside the weights. ``"cpu"`` saves device memory.
        shard: under ``strategy="ddp"`` each process keeps only its part of the average; files are the same.
        evaluate: which weights validation, test and predict see, and ``state_dict`` of a checkpoint holds.
            ``"average"``; ``"live"``: the average is only followed, logged and stored; ``"both"``: the average, and
            the live weights in a pass of their own, logged as ``<metric>_live``; ``"all"``: the further averages too,
            as ``<metric>/<name>_<decay>``; ``Select("val_loss")``: the best of several averages.
        after_fit: which weights the module holds after ``fit``; ``"average"`` applies where ``evaluate`` gives one.
        snapshots: write snapshots of the averages now and then, from which :func:`~lightning_ema.synthesize` makes any
            other average after the run; best with ``decay=[Power(sigma_rel=0.05), Power(sigma_rel=0.10)]``. Without a
            ``dirpath`` they go to ``snapshots`` in the trainer's ``default_root_dir``. Not under ``fast_dev_run``.
        on_nonfinite: ``"skip"`` leaves out an update from NaN or infinite weights, ``"raise"`` raises, ``"ignore"``
            does not look. Looking reads all weights once more at each update.
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
        start_epoch: int | float = 0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        include_frozen: bool = False,
        buffers: Buffers = "average",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shard: bool = False,
        evaluate: Evaluate = "average",
        after_fit: AfterFit = "average",
        snapshots: Snapshots | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        name: str = "ema",
    ) -> None:
        self._settings = CallbackSettings.checked(
            decay,
            every_n_steps,
            start_step,
            start_epoch,
            include,
            exclude,
            include_frozen,
            buffers,
            dtype,
            device,
            shard,
            evaluate,
            after_fit,
            snapshots,
            on_nonfinite,
            name,
        )
        self._state_key = state_key(name)  # not the class's name: files of subclasses are files of ours
        self._holder = Holder(self._settings)
        self._passes = Passes(self._settings.evaluation, name, self._settings.average.decays)
        self._evaluations = Evaluations(self._holder, self._passes)
        self._checkpointing = Checkpointing(self, self._holder, self._passes)

    def __repr__(self) -> str:
        decays = ", ".join(map(repr, self._settings.average.decays))
        about = repr(self.average) if self.average is not None else "not begun"
        return f"EMACallback({decays}, name={self._settings.name!r}): {about}"

    @property
    def state_key(self) -> str:
        return self._state_key  # Lightning asks for it at every hook

    @property
    def average(self) -> WeightAverage | None:
        """The average, that of the first decay where there are several; None until training starts."""
        return self._holder.average

    @property
    def averages(self) -> list[WeightAverage]:
        """All averages of this callback, in the order of their decays; none until training starts."""
        return [] if self.average is None else self.average.averages

    @property
    def selected(self) -> WeightAverage | None:
        """The average that evaluations and files are given: the first, or the one that was selected last."""
        return None if self._holder.tracker is None else self.averages[self._holder.tracker.holds.selected]

    # --- a fit --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        holder, tracker = self._holder, self._holder.tracker
        ours = [c._settings for c in facts.callbacks(trainer) if isinstance(c, EMACallback)]
        check_beside(trainer, [each for each in ours if each.evaluation.gives_average], shard=self._settings.shard)
        self._passes.check(trainer)
        if tracker is not None:
            tracker.collectives_off = False  # all processes have met, or none would be here
            tracker.weights.expect_broadcast(strategies.overwrites_weights(trainer))
        holder.drop_if_over()
        holder.tested = holder.to_test = None
        if stage != "fit":
            self._checkpointing.expect_file(pl_module)
        if stage == "fit":
            holder.begin_fit(trainer, pl_module)
            self._checkpointing.expect_file(pl_module)
            if strategies.spawns(trainer):
                holder.warn(messages.will_not_return())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._holder.tracker is None:
            self._holder.build(trainer, pl_module)
            self._checkpointing.take_hold()
            sizes = [tensor.numel() for _, tensor in self._holder.require().named_live()]
            self._holder.say(messages.introduction(self._settings.average.decays, sizes))
        self._checkpointing.end_loading()
        self._holder.count()
        self._holder.check_processes(trainer)
        check_no_overlap(self._holder.require())
        warn_of_monitors(trainer, self._holder, self._passes)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._settings.recalibrate is not None:
            training_batches.check(pl_module, trainer)
        self._holder.require().weights.train()
        self._holder.begin(trainer)
        if self._holder.snapshots is not None:
            discard_future(self._holder.snapshots, self.averages)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._holder.start_with_epoch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._holder.begin_batch(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._holder.before_write()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._holder.clock.steps.close()
        self._holder.update()
        if self._holder.stepped and facts.logs_this_step(trainer):
            log(self._holder, self._passes, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._holder.drop_if_over()
        if self._settings.recalibrate is not None and self._holder.of(pl_module):  # while data are on the device
            self._evaluations.swap_in(trainer, pl_module)
            self._evaluations.swap_out()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._holder.update()
        self._holder.stop(trainer)
        if self._holder.tracker is None:  # someone wrote to the module in on_train_end
            return
        say_at_end(self._holder, self._passes, trainer)
        if self._holder.snapshots is not None and self._holder.require().started:
            write(self._holder.snapshots, self.averages)
        self._holder.check_processes(trainer)
        self._holder.drop_if_over()
        if self._holder.tracker is not None:
            self._holder.leave(apply=self._settings.after_fit == "average")

    # --- an evaluation ------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.begin(trainer, pl_module)
        self._evaluations.swap_in(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.again(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.swap_out()
        self._passes.end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.begin(trainer, pl_module)
        self._evaluations.swap_in(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.again(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.swap_out()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.accept_broadcast()
        self._evaluations.swap_in(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.swap_out()

    # --- every way out ------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        holder, fitting, began = self._holder, facts.is_fitting(trainer), self._holder.clock.steps.held
        self._passes.drop()
        if holder.tracker is not None:
            holder.tracker.collectives_off = True
        try:
            self._evaluations.swap_out()
            if fitting:
                holder.update_without_others()
        except (RuntimeError, FloatingPointError) as error:  # the exception under way matters more
            holder.warn(str(error))
        finally:
            holder.stop(trainer)
            if holder.tracker is not None and not fitting:
                holder.reject_file()
            elif holder.tracker is not None and (began or not holder.tracker.holds.left):
                holder.leave(apply=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluations.swap_out()
        self._holder.stop(trainer)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._holder.drop_if_over()
        self._holder.update()
        return self._checkpointing.entry()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._checkpointing.save(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._checkpointing.load(trainer, pl_module, checkpoint)


def holder_of(callback: EMACallback) -> Holder:
    """What a callback holds its average with, for other callbacks of this package."""
    return callback._holder
