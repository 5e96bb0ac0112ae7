"""How long a run is: its steps in all and in each epoch, also after a resume in other processes."""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning.pytorch import Trainer

from lightning_ema.schedules.base import Plan
from lightning_ema.trainer.facts import batches_done, callbacks


class Pace(NamedTuple):
    """How the steps of a run stand to its epochs, which are longer or shorter after a resume in other processes.

    Attributes:
        steps_per_epoch: of the epochs now; None where that is not known.
        ahead: how many steps the run has taken beyond what epochs of this length would have.
    """

    steps_per_epoch: int | None = None
    ahead: int = 0


def pace(trainer: Trainer, before: Pace, steps: int) -> Pace:
    """The pace of the run from here on: ``ahead = steps - (steps_per_epoch * epoch + within)``, where epochs changed.

    ``within`` are the steps of an epoch that was left in its middle and is gone on with.

    Args:
        trainer: at the start of its training.
        before: the pace up to here.
        steps: those that the run has taken up to here.
    """
    per_epoch = _steps_per_epoch(trainer)
    if per_epoch is None or before.steps_per_epoch is None or before.steps_per_epoch == per_epoch:
        return Pace(per_epoch, before.ahead)
    epoch = trainer.current_epoch
    within = min(max(steps - (before.steps_per_epoch * epoch + before.ahead), 0), per_epoch)
    return Pace(per_epoch, steps - (per_epoch * epoch + within))


def plan(trainer: Trainer, pace: Pace) -> Plan:
    """The length of the run in steps, as far as it is known once the data are set up.

    Under manual optimization a batch counts as one step. Where accumulation changes with the epoch nothing is known.
    """
    # max_steps counts the steps of every optimizer; under automatic optimization there is one
    in_turn = max(1, len(trainer.optimizers))
    ends = [math.ceil(trainer.max_steps / in_turn)] if trainer.max_steps not in (None, -1) else []
    steps_per_epoch = pace.steps_per_epoch
    if steps_per_epoch is not None and trainer.max_epochs is not None and trainer.max_epochs != -1:
        ends.append(steps_per_epoch * trainer.max_epochs + pace.ahead)
    batch_size = getattr(trainer.train_dataloader, "batch_size", None)
    samples = None
    if batch_size is not None and not _accumulation_changes(trainer):
        samples = float(batch_size * trainer.accumulate_grad_batches * trainer.world_size)
    return Plan(min(ends) if ends else None, steps_per_epoch, samples)


def begins(trainer: Trainer) -> bool:
    """Whether this trainer's first step is still to come: it neither resumes from a file nor goes on with a fit."""
    return trainer.ckpt_path is None and trainer.global_step == 0 and trainer.fit_loop.epoch_loop.total_batch_idx <= 0


def steps_taken(trainer: Trainer) -> int:
    """The steps of the run so far, also of those before a resume, as far as the trainer knows of them.

    Under manual optimization it counts those of every optimizer together, and none of one used around its wrapper.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.global_step // max(1, len(trainer.optimizers)) or batches_done(trainer)


def _steps_per_epoch(trainer: Trainer) -> int | None:
    batches = trainer.num_training_batches
    known = not _accumulation_changes(trainer) and batches != math.inf and batches > 0
    return math.ceil(batches / trainer.accumulate_grad_batches) if known else None


def _accumulation_changes(trainer: Trainer) -> bool:
    return any(type(callback).__name__ == "GradientAccumulationScheduler" for callback in callbacks(trainer))
