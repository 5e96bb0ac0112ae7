"""Lightning's hooks and nothing else: when to step, lend, recall, save and load. No arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ema import checkpoint as checkpoints
from lightning_ema import trainer_facts
from lightning_ema.advice import still_rising, too_long
from lightning_ema.average import WeightAverage
from lightning_ema.checks import check_choice, check_count
from lightning_ema.footprint import Footprint
from lightning_ema.loan import Loan
from lightning_ema.save_hook import SaveHook
from lightning_ema.schedules import Schedule, Warmup
from lightning_ema.selection import Survey
from lightning_ema.settings import Buffers, DecayPer, OnNonfinite, Settings
from lightning_ema.steps import StepCounter

Evaluate = Literal["average", "live", "both"]
AfterFit = Literal["average", "live"]


@trainer_facts.known_to_pytorch_lightning
class EMACallback(Callback):
    """Keeps an average of the weights while a model trains; evaluates, saves and delivers the average.

    Example::

        trainer = Trainer(callbacks=[EMACallback(decay=0.999)])

    Args:
        decay, every_n_steps, start_step, decay_per, include, exclude, include_frozen, buffers, dtype, device,
            on_nonfinite: as in :class:`~lightning_ema.WeightAverage`. A number ``d`` means ``Warmup(d)``; the bare
            constant is ``Constant(d)``. A step is one step of an optimizer that trains averaged parameters.
        start_epoch: the average starts with this epoch (the first is 0), or at ``start_step`` if that comes later.
        evaluate: which weights validation, test and predict see, and ``state_dict`` of a checkpoint holds.
            ``"live"``: the average is only followed, logged and stored.
        after_fit: which weights the module holds after ``fit``; ``"average"`` applies where ``evaluate`` does.
        name: tells several averages apart in log keys (``<name>/decay``) and checkpoints.

    Attributes:
        average: the :class:`~lightning_ema.WeightAverage`; None until training starts.

    Raises:
        ValueError, TypeError: an argument is out of range (here), does not fit the trainer (``setup``) or the module
            (start of ``fit``).
    """

    def __init__(
        self,
        decay: float | Schedule = 0.999,
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        decay_per: DecayPer = "step",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        include_frozen: bool = False,
        buffers: Buffers = "average",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        start_epoch: int = 0,
        evaluate: Evaluate = "average",
        after_fit: AfterFit = "average",
        on_nonfinite: OnNonfinite = "ignore",
        name: str = "ema",
    ) -> None:
        self.settings = Settings.checked(
            decay,
            every_n_steps,
            start_step,
            decay_per,
            include,
            exclude,
            include_frozen,
            buffers,
            dtype,
            device,
            on_nonfinite,
        )
        check_count(start_epoch, "start_epoch", at_least=0)
        if evaluate == "both":
            raise ValueError("evaluate='both' is not available yet; accepted are 'average' and 'live'.")
        check_choice(evaluate, "evaluate", ("average", "live"))
        check_choice(after_fit, "after_fit", get_args(AfterFit))
        if not isinstance(name, str) or not name:
            raise ValueError(f"name is {name!r}; it must be a word, such as 'ema'.")
        self.start_epoch = start_epoch
        self.evaluate = evaluate
        self.after_fit = after_fit
        self.name = name
        self.average: WeightAverage | None = None
        self._steps = StepCounter()
        self._loan: Loan | None = None
        self._footprint: Footprint | None = None  # the module as the last fit left it
        self._entry: dict[str, Any] | None = None  # from a checkpoint, until the module is ready to take it
        self._logged_skips = 0

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @property
    def averages(self) -> list[WeightAverage]:
        """All averages of this callback."""
        return [] if self.average is None else [self.average]

    # --- a fit ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer_facts.check_strategy(trainer)
        ours = [c for c in trainer_facts.callbacks(trainer) if isinstance(c, EMACallback)]
        lenders = [c.name for c in ours if c.evaluate == "average"]
        if len(lenders) > 1:
            raise ValueError(
                f"the EMACallbacks {', '.join(map(repr, lenders))} all have evaluate='average', but the module can "
                "carry only one average in an evaluation. Write evaluate='live' in all but one of them."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back(pl_module)
        if self._entry is not None:
            self._resume(pl_module, self._entry)
        elif self.average is None:
            self.average = self._build(pl_module)
            self._introduce(self.average)
        self._entry = None
        self._steps.hold(self._require().owns)
        if self.evaluate == "average":
            SaveHook.hang(pl_module, self._put_into_weights_only)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._require()
        plan = trainer_facts.plan(trainer)
        epochs_before = int(self.start_epoch * (plan.steps_per_epoch or 0))
        plan = plan.after(average.start_step if average.started else max(self.settings.start_step, epochs_before))
        average.bind(plan)
        if plan.total_steps is not None:
            if warning := too_long(average.schedule, plan.total_steps):
                rank_zero_warn(f"EMACallback {self.name!r}: {warning}")
            elif remark := still_rising(average.schedule, plan.total_steps):
                rank_zero_info(f"EMACallback {self.name!r}: {remark}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._require()
        if self._waits_for_epoch(average) and trainer.current_epoch >= self.start_epoch:
            average.start_step = max(self.settings.start_step, average.num_steps)
            if average.num_steps >= average.start_step:
                average.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._require().refresh()  # what was unfrozen joins with its value before its first step
        self._steps.open()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps.close()
        if self._absorb() and trainer_facts.logs_this_step(trainer):
            self._log(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_fit()
        average = self._require()
        if trainer.global_step > 0 and average.num_steps == 0:
            rank_zero_warn(
                f"EMACallback {self.name!r}: the trainer took {trainer.global_step} steps, but no optimizer that "
                "trains averaged parameters was seen to step, so there is no average. Optimizers must derive from "
                "torch.optim.Optimizer (or step one that does) and step within training batches."
            )
        if self.evaluate == "average" and self.after_fit == "average" and average.num_updates > 0:
            average.deliver()
        self._footprint = Footprint(average.module)

    # --- an evaluation ----------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lend(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recall()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lend(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recall()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lend(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recall()

    # --- every way out ----------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            self._recall()
        except RuntimeError as error:  # the evaluation wrote to the average; the exception under way matters more
            rank_zero_warn(str(error))
        finally:
            if trainer_facts.is_fitting(trainer) and self.average is not None:
                self._end_fit()
                self._footprint = Footprint(self.average.module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._recall()
        self._steps.release()
        if self.average is not None and self.average.delivered:
            # what is saved from here on holds the average by itself
            SaveHook.take_down(pl_module, self._put_into_weights_only)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._drop_if_edited()
        if self.average is None:
            return {}
        self._absorb()
        in_state_dict = self.evaluate == "average" and self.average.num_updates > 0
        return checkpoints.pack(self.average.state_dict(), dict(self.average.named_live()), in_state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.average is not None and self.average.module is not pl_module:
            checkpoint.get("callbacks", {}).pop(self.state_key, None)
        self._put_average(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not trainer_facts.is_fitting(trainer):
            return
        self._forget()
        self._entry = checkpoints.find(checkpoint, self.state_key)
        if self._entry is None:
            rank_zero_info(f"EMACallback {self.name!r}: the checkpoint holds no average; it starts from its weights.")

    # --- the steps of the above -------------------------------------------------------------------------------------

    def _build(self, pl_module: LightningModule) -> WeightAverage:
        arguments = self.settings.as_arguments()
        if self.start_epoch > 0:
            arguments["start_step"] = sys.maxsize  # until the epoch is there, on_train_epoch_start sets it
        return WeightAverage(pl_module, **arguments)

    def _waits_for_epoch(self, average: WeightAverage) -> bool:
        return not average.started and average.start_step == sys.maxsize

    def _absorb(self) -> bool:
        average, steps = self.average, self._steps.take()
        if average is None or not steps:
            return False
        average.step(steps)
        if average.num_skipped > self._logged_skips == 0:
            rank_zero_warn(
                f"EMACallback {self.name!r}: the live weights are not finite at step {average.num_steps}; this update "
                "is left out, and so will be all further ones like it. `average.num_skipped` counts them."
            )
            self._logged_skips = average.num_skipped
        return True

    def _lends(self, pl_module: LightningModule) -> bool:
        """Whether an evaluation or a file should be given the average, and the module does not carry it already."""
        self._drop_if_edited()
        average = self.average
        if average is None or average.module is not pl_module or average.loan is not None or average.delivered:
            return False
        return self.evaluate == "average" and average.num_updates > 0

    def _lend(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer_facts.is_fitting(trainer) and trainer.ckpt_path is not None:
            return  # a file was loaded into the module: that is what was asked for
        self._absorb()
        if self._lends(pl_module):
            self._loan = self._require().lend()

    def _recall(self) -> None:
        if self._loan is not None:
            loan, self._loan = self._loan, None
            loan.recall()

    def _end_fit(self) -> None:
        self._absorb()
        self._steps.release()

    def _put_into_weights_only(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        trainer = trainer_facts.trainer_of(pl_module)
        if trainer is not None and self in trainer_facts.callbacks(trainer):
            self._put_average(trainer, pl_module, checkpoint)

    def _put_average(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes ``checkpoint["state_dict"]`` that of the module carrying the average, where it is not already."""
        self._absorb()
        if not self._lends(pl_module):
            return
        loan = self._require().lend()
        try:
            checkpoint["state_dict"] = loan.lasting(trainer.strategy.lightning_module_state_dict())
        finally:
            loan.recall()

    def _take_back(self, pl_module: LightningModule) -> None:
        """Before a fit: the live weights come back where the module still is as the last fit left it."""
        if self.average is not None and self.average.module is not pl_module:
            self._forget()
        self._drop_if_edited()
        if self.average is not None:
            self.average.take_back()
        self._footprint = None

    def _drop_if_edited(self) -> None:
        """After a fit, a module whose weights were loaded or edited since is the user's, and the average is over."""
        if self._footprint is None or self._footprint.intact():
            return
        rank_zero_info(
            f"EMACallback {self.name!r}: the module's weights were changed since the end of fit. They count from "
            "here; the average and the live weights of that fit are dropped."
        )
        self._forget()

    def _forget(self) -> None:
        self.average = None
        self._footprint = None
        self._logged_skips = 0

    def _resume(self, pl_module: LightningModule, entry: dict[str, Any]) -> None:
        tensors = {name: c.tensor for c in Survey(pl_module).candidates for name in c.names}
        state, live = checkpoints.unpack(entry, tensors)
        self.average = self._build(pl_module)
        self.average.load_state_dict(state)
        with torch.no_grad():
            for name, value in live.items():
                tensors[name].copy_(value)

    def _introduce(self, average: WeightAverage) -> None:
        tensors, schedule = [tensor for _, tensor in average.named_tensors()], self.settings.decay
        warm = " (a plain number is warmed up; Constant(decay) is not)" if isinstance(schedule, Warmup) else ""
        rank_zero_info(
            f"EMACallback {self.name!r}: averaging {len(tensors)} tensors of {sum(t.numel() for t in tensors):,} "
            f"elements with {schedule!r}{warm}."
        )

    def _log(self, pl_module: LightningModule) -> None:
        average = self._require()
        pl_module.log_dict(
            {
                f"{self.name}/decay": average.decay,
                f"{self.name}/updates": float(average.num_updates),
                f"{self.name}/distance": average.distance(),
            },
            on_step=True,
            on_epoch=False,
        )

    def _require(self) -> WeightAverage:
        if self.average is None:
            raise RuntimeError(
                f"EMACallback {self.name!r} has no average yet: it is built in on_fit_start, which did not run."
            )
        return self.average
