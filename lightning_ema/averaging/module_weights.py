"""Who carries which weights, from the start of a fit to whatever comes after it. Knows torch, not Lightning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ema.averaging.state_dict import gather, take_up
from lightning_ema.averaging.swap import lasting
from lightning_ema.averaging.weight_average import WeightAverage
from lightning_ema.checkpoint.entry import CallbackEntry, Recalibrated, stored_average
from lightning_ema.distributed import dtensor as shards
from lightning_ema.modules.batchnorm import Recalibration
from lightning_ema.modules.edits import Footprint
from lightning_ema.modules.named_tensors import Survey

Batches = AbstractContextManager[Iterable[Any]]


class Custody:
    """An average and all that changes hands around it.

    The module carries, at any time, one of: its live weights; the average on loan, in an evaluation; the average
    delivered, after a fit; the weights of a file that is evaluated after a fit, while the live ones are kept aside.

    Args:
        average: the average.
        evaluates: whether evaluations and ``state_dict`` are given the average; otherwise it is only followed.
        recalibrates: whether BatchNorm statistics are re-estimated for it.

    Attributes:
        steps_before: steps that the average had seen when the present trainer began; the run's length comes on top.
        switched: how often the live weights were due to be set to the average in the present trainer; None at first.
        chosen: the place of the average that evaluations and files are given.
        choices: how many validations have ended in which one could be chosen.
    """

    def __init__(self, average: WeightAverage, evaluates: bool, recalibrates: bool) -> None:
        self.average = average
        self.steps_before = 0
        self.switched: int | None = None
        self.chosen = self.choices = 0
        self._evaluates = evaluates
        self._statistics = [Recalibration(average.module) for _ in average.averages] if recalibrates else []
        self._aside: dict[str, Tensor] = {}
        self._was_delivered = self._loading = False
        self._footprint: Footprint | None = None

    # --- training ---------------------------------------------------------------------------------------------------

    def switch(self, every: int | Literal["epoch"], epochs: int) -> None:
        """Sets the live weights to the average where that has come due since the last call.

        Args:
            every: so many steps since the start of the average, or each epoch.
            epochs: how many epochs have ended.
        """
        steps = max(0, self.average.num_steps - self.average.start_step)
        due = epochs if every == "epoch" else steps // every
        if self.switched is not None and due > self.switched and self.average.num_updates > 0:
            self.average.apply()
        self.switched = due

    # --- an evaluation ----------------------------------------------------------------------------------------------

    @property
    def lends(self) -> bool:
        """Whether an evaluation or a file is to be given the average, and the module does not carry it already."""
        carried = self.average.lends == self.chosen and (self.average.loan is not None or self.average.delivered)
        return self.gives_average and not carried

    @property
    def gives_average(self) -> bool:
        """Whether evaluations and files are to see the average at present, rather than what is in the module."""
        return self._evaluates and self.average.num_updates > 0 and not self.holds_file

    @property
    def holds_file(self) -> bool:
        """Whether the module holds the weights of a file that is evaluated after a fit."""
        return bool(self._aside)

    def lend(self, batches: Batches | None = None) -> None:
        """Lends the average, with statistics estimated from ``batches`` where that has not been done for it yet."""
        self._lend(self.chosen, batches)

    def recall(self) -> None:
        """Brings the live weights back, also from a loan that a user's hook made; without one it does nothing."""
        loan = self.average.loan
        if loan is not None:
            self._take_statistics_out()
            loan.recall()

    @contextmanager
    def carried(self, batches: Batches | None) -> Iterator[None]:
        """The module carries the average inside this block: already, or on a loan of its own."""
        with self.instead(self.chosen, batches) if self.lends else nullcontext():
            yield

    @contextmanager
    def instead(self, place: int | None, batches: Batches | None = None) -> Iterator[None]:
        """Inside this block the module carries one of several averages, or None: its live weights.

        Until the first update it carries its live weights, whichever is asked for.

        Afterwards it carries again what it did before, also on errors.
        """
        carries = self.average.loan is not None or self.average.delivered
        before = self.average.lends if carries else None
        self._take_statistics_out()
        try:
            with self.average.suspended():
                try:
                    if place is not None and self.average.num_updates > 0:
                        self._lend(place, batches)
                    yield
                finally:
                    self.recall()
        finally:
            if before is not None:
                self._put_statistics_in(before, None)

    def _lend(self, place: int, batches: Batches | None) -> None:
        self.average.averages[place].lend()
        try:
            self._put_statistics_in(place, batches)
        except BaseException:
            self.recall()
            raise

    def lasting(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A ``state_dict`` of the module carrying the average that stays as it is after the recall."""
        returning = [] if self.average.loan is None else self.average.loan.returning()
        return lasting(state_dict, returning + [t for each in self._statistics[:1] for t in each.tensors()])

    def _put_statistics_in(self, place: int, batches: Batches | None) -> None:
        if not self._statistics:
            return
        updates, statistics = self.average.num_updates, self._statistics[place]
        if batches is None or statistics.made_at == updates:
            statistics.put_in(None, updates)
        else:
            with batches as inputs:
                statistics.put_in(inputs, updates, together=self.average.reconcile is not None)

    def _take_statistics_out(self) -> None:
        for statistics in self._statistics:
            statistics.take_out()

    # --- after a fit ------------------------------------------------------------------------------------------------

    def leave(self, deliver: bool) -> None:
        """A fit ends: the module is left with its live weights or, where there is one, with the average."""
        self.average.release()
        if deliver and self.lends:
            self._deliver()
        self._footprint = Footprint(self.average.module)

    @property
    def left(self) -> bool:
        """Whether a fit has ended, and none has begun since."""
        return self._footprint is not None

    def edited(self) -> bool:
        """Whether anyone but a file under test has written to the module since the fit."""
        return self._footprint is not None and not self._footprint.intact()

    def overwritten(self) -> None:
        """What was written to every parameter once was what it held: that is no edit."""
        if self._footprint is not None and self._footprint.intact(writes=1):
            self._footprint = Footprint(self.average.module)

    def put_aside(self) -> None:
        """A file is about to be loaded for an evaluation: the live weights are copied, the average goes home."""
        if not self._aside:
            self._was_delivered = self.average.delivered
            self._take_back_delivery()
            self._aside = self.average.put_aside()
        self._loading = True

    def accept_file(self) -> None:
        """The file has been loaded: that is no edit."""
        if self._aside:
            self._footprint = Footprint(self.average.module)
        self._loading = False

    def reject_file(self) -> None:
        """Loading the file, or what came right after it, failed: the module is left as the fit had left it."""
        if self._loading:
            self.take_back()
            self.leave(deliver=self._was_delivered)

    def take_back(self) -> None:
        """A fit begins: the live weights come back from wherever they are."""
        self._take_back_delivery()
        write(self._aside, self.average.module)
        self._aside, self._footprint, self._loading = {}, None, False

    def _deliver(self) -> None:
        self.average.averages[self.chosen].deliver()
        self._put_statistics_in(self.chosen, None)

    def _take_back_delivery(self) -> None:
        self._take_statistics_out()
        self.average.take_back()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def entry(self) -> CallbackEntry:
        """The callback's entry in a checkpoint whose ``state_dict`` was taken while the module carried the average."""
        state = gather(self.average)  # which looks for layers that were replaced since the last step
        live = dict(self.average.named_live()) if self.gives_average else self._aside
        if self.gives_average:
            live |= {name: tensor for each in self._statistics[:1] for name, tensor in each.live().items()}
            if self.chosen == 0 and not self.average.schedule.corrects:
                state = replace(state, average=stored_average(state.average, Survey(self.average.module).tensors))
        statistics = [s.estimated if place > 0 else {} for place, s in enumerate(self._statistics)]
        made_at = [s.made_at for s in self._statistics]
        decay = None
        with suppress(ValueError):  # a schedule that does not know the run yet
            decay = self.average.decay
        return CallbackEntry(
            **vars(state),
            steps_before=self.steps_before,
            live=live,
            selected=self.chosen,
            num_selections=self.choices,
            decay=decay,
            switched=self.switched,
            recalibrated=tuple(map(Recalibrated, made_at, statistics)) or None,
        )

    def resume(self, entry: CallbackEntry, chooses: bool = False) -> None:
        """Takes up an entry, after the file's ``state_dict`` was loaded into the module.

        Args:
            entry: made by :meth:`entry`.
            chooses: whether one of several averages is chosen in this run; otherwise it is the first again.
        """
        take_up(self.average, entry, Survey(self.average.module).tensors)
        self.steps_before, self.switched = entry.steps_before, entry.switched
        self.chosen, self.choices = (entry.selected, entry.num_selections) if chooses else (0, 0)
        for place, (statistics, kept) in enumerate(zip(self._statistics, entry.recalibrated or (), strict=False)):
            if place == 0:
                statistics.keep(kept.at)
            else:
                statistics.made_at = kept.at
                statistics.estimated = {name: tensor.clone() for name, tensor in kept.statistics.items()}
        write(entry.live, self.average.module)

    def adopt(self, steps: int, updates: int, live: dict[str, Any]) -> None:
        """Takes up an average of Lightning's ``WeightAveraging`` in the same way; one without an update is none yet."""
        if updates > 0:
            loaded = dict(self.average.named_live())  # the file's average
            state = replace(
                gather(self.average),
                num_steps=steps,
                num_updates=updates,
                last_update_step=steps,
                started=True,
                start_step=0,  # also where this callback's own start would come later
                names=tuple(loaded),
                average=loaded,
                further=tuple(loaded for _ in self.average.averages[1:]),
                origin=loaded,
            )
            take_up(self.average, state)
        self.average.module.load_state_dict(live, strict=False)
        if updates == 0 and self.average.started:
            self.average.start()


def write(values: Mapping[str, Tensor], module: nn.Module) -> None:
    """Writes tensors into a module's own, by name."""
    if values:
        tensors = Survey(module).tensors
        with torch.no_grad():
            for name, value in values.items():
                shards.write(tensors[name], value)
