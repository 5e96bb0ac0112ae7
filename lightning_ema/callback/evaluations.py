"""An evaluation as the callback makes it: other weights before, beside and after Lightning's own pass."""

from __future__ import annotations

from functools import partial

from lightning.pytorch import LightningModule, Trainer

from lightning_ema.callback.holder import Holder
from lightning_ema.evaluation.passes import Passes
from lightning_ema.trainer import facts


class Evaluations:
    """Lets the module carry the average while it is evaluated, and scores other weights beside it.

    Args:
        holder: of the average.
        passes: over the data, beside Lightning's own.
    """

    def __init__(self, holder: Holder, passes: Passes) -> None:
        self._holder = holder
        self._passes = passes

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An evaluation begins that may be scored in further passes; one of a fit may select an average first."""
        self.accept_broadcast()
        self._passes.begin(trainer, pl_module, self._holder.tracker)
        batches = partial(self._holder.batches, trainer)
        if news := self._passes.select(trainer, pl_module, self._holder.tracker, batches):
            self._holder.say(news)

    def accept_broadcast(self) -> None:
        """A strategy may have overwritten all weights by the same weights, which is no edit."""
        if self._holder.tracker is not None:
            self._holder.tracker.weights.accept_broadcast()

    def swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the module carry what evaluations are given; a file that was loaded into it stays."""
        holder, tracker = self._holder, self._holder.of(pl_module)
        if tracker is not None and not facts.is_fitting(trainer) and trainer.ckpt_path is not None:
            tracker.weights.accept_file()
            return
        holder.update()
        holder.drop_if_over()
        tracker = holder.of(pl_module)
        if tracker is not None and tracker.holds.wants_average:
            holder.check_processes(trainer)
            holder.notice_not_finite()
            tracker.holds.swap_in(tracker.holds.selected, batches=holder.batches(trainer))

    def again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the passes that are left, and logs what all of them gave."""
        if self._passes.due:
            self._holder.check_processes(trainer)
            batches = partial(self._holder.batches, trainer)
            self._passes.run(trainer, pl_module, self._holder.tracker, batches)

    def swap_out(self) -> None:
        """Ends the swap, also one that a user's hook began."""
        if self._holder.tracker is not None:
            self._holder.tracker.holds.swap_out()
