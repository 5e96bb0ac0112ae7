"""An evaluation as the callback makes it: other weights before, beside and after Lightning's own pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
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
        self._holder.open_file()
        tracker = self._holder.of(pl_module)
        averages = tracker is not None and not tracker.weights.holds_file
        self._passes.begin(trainer, pl_module, has_weights=averages or self._holder.tested is not None)
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
        if not facts.is_fitting(trainer) and trainer.ckpt_path is not None:
            holder.open_file()
            if tracker is not None:
                tracker.weights.accept_file()
            if holder.tested is not None:
                holder.tested.begin(self._asked_of_file())
            if tracker is not None or holder.tested is not None:
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
            if self._holder.tested is None:
                self._holder.check_processes(trainer)
            self._passes.run(trainer, pl_module, partial(self._carry, trainer))

    def _carry(self, trainer: Trainer, place: int | None) -> AbstractContextManager[None]:
        if self._holder.tested is not None:
            return self._holder.tested.instead(place)
        return self._holder.require().holds.instead(place, self._holder.batches(trainer))

    def _asked_of_file(self) -> int | None:
        """Which weights of a file an evaluation is given: the place of an average, or None for the live ones."""
        tested, evaluation = self._holder.tested, self._holder.settings.evaluation
        if tested is None or not tested.has_average or not evaluation.gives_average:
            return None
        return tested.selected if evaluation.select is not None else 0

    def swap_out(self) -> None:
        """Ends the swap, also one that a user's hook began."""
        if self._holder.tested is not None:
            self._holder.tested.end()
        if self._holder.tracker is not None:
            self._holder.tracker.holds.swap_out()
