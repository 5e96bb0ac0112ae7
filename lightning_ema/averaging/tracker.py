"""The averages of one set of tensors: steps counted, updates made when due, values read. Knows torch, not Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ema.averaging.module_weights import ModuleWeights
from lightning_ema.averaging.pair import Pair
from lightning_ema.averaging.settings import Settings
from lightning_ema.averaging.swap import not_held
from lightning_ema.averaging.tracked_tensors import TrackedTensors
from lightning_ema.checkpoint.entry import AverageState
from lightning_ema.distributed.base import local
from lightning_ema.distributed.processes import (
    Groups,
    SyncBuffers,
    all_across,
    everyone,
    is_first,
    sum_across,
    world_size,
)
from lightning_ema.modules.named_tensors import BufferPlace
from lightning_ema.ops.lerp import all_finite, corrected, ratio, squared_norms
from lightning_ema.schedules.base import Plan, Schedule
from lightning_ema.schedules.history import History


class Tracker:
    """What all averages of one set of tensors have in common: they start, step and are swapped as one.

    With ``n`` the steps since ``start_step`` and ``d`` the decay, an update after steps ``m + 1 .. n`` computes

        average = D * average + (1 - D) * live,    D = d(m + 1) * ... * d(n)

    Each average has a place among them, that of its decay.

    Attributes:
        module: whose tensors they are.
        settings: of all averages.
        num_steps: steps taken.
        num_updates: how often the averages were updated.
        num_skipped: updates left out because of non-finite weights.
        last_update_step: the step of the last update; that of the start before the first.
        start_step: the step at which the averages start or started.
        schedules: one for each average, with what the run knows filled in.
        histories: for each average, at which steps it was updated, and under which schedule.
        processes: among how many each average is partitioned.
        sync_buffers: what becomes of buffers that differ among processes, in what is swapped in. ``"first"``: all
            carry those of the first process; ``"mean"``: their mean; None: each its own. What is stored stays each
            process's own. All processes must take part in a swap then, and in an update that looks for
            ``on_nonfinite``: where something is not finite in one of them, all leave the update out.
        before_reading: called before an average is read by its user: takes up what was counted elsewhere.
        collectives_off: whether no other process may be waited for, as after an exception in one of them.
        tensors: the module's tensors beside their averages.
        holds: which weights the tensors hold.
    """

    def __init__(self, module: nn.Module, settings: Settings, into: nn.Module | None, shard: bool) -> None:
        self.module = module
        self.settings = settings
        self.num_steps = self.num_updates = self.num_skipped = self.last_update_step = 0
        self.start_step = settings.start_step
        self.schedules = list(settings.decays)
        self.histories = [History() for _ in settings.decays]
        self.processes = world_size() if shard else 1
        self.sync_buffers: SyncBuffers | None = None
        self.before_reading: Callable[[], None] | None = None
        self.collectives_off = False
        self.tensors = TrackedTensors(module, settings, into, self.processes > 1)
        self._weights = ModuleWeights.of(module)
        self.holds = self._weights.add(self)
        self._no_grad = torch.no_grad()
        if self.start_step == 0:
            self.start()

    @property
    def weights(self) -> ModuleWeights:
        """What the whole module holds."""
        return self._weights

    @property
    def started(self) -> bool:
        """Whether averages are stored; before, they are the live weights."""
        return self.tensors.started

    @property
    def sharded(self) -> bool:
        """Whether tensors are sharded among processes (FSDP2, tensor parallelism); the averages are then, too."""
        return any(pair.cut.sharded for pair in self.tensors.pairs())

    # --- step and update ----------------------------------------------------------------------------------------------

    def step(self, n: int) -> bool:
        """Counts ``n`` steps and updates where that is due; gives whether it did."""
        if self._weights.holding:
            self.holds.refuse_during_swap("step()")
        if not isinstance(n, int) or n < 0:
            raise ValueError(
                f"step({n!r}): the number of steps since the last call is a whole number, not negative. Call step() "
                "after each step of the optimizer, or step(n) after n of them."
            )
        before = self.num_steps - self.start_step
        self.num_steps += n
        if not self.tensors.started:
            if before + n >= 0:
                self.start()
            return False
        return passed(self.settings.every_n_steps, before, before + n) and self._update()

    def refresh(self) -> None:
        """Looks for tensors that were unfrozen, added, replaced or moved since the last update.

        Every update does this by itself; called before a step, it lets parameters join with the values that they have
        before that step. The next update then trusts that no submodule was exchanged in between. Before a step that no
        update follows it looks for unfrozen parameters alone: layers that were added join later.
        """
        if self._weights.held:
            return
        before = self.num_steps - self.start_step
        if self.tensors.started and passed(self.settings.every_n_steps, before, before + 1):
            self.tensors.see_through()
        else:
            self.tensors.admit()

    def _update(self) -> bool:
        if self.tensors.empty:
            self.tensors.admit()
            self.last_update_step = self.num_steps  # what joins begins here
            return False
        after, upto = self.last_update_step - self.start_step, self.num_steps - self.start_step
        rates = [1 - self._decay(schedule, after, upto) for schedule in self.schedules]
        with self._no_grad:
            lives = self.tensors.lives()
            if self.settings.on_nonfinite != "ignore" and not self._finite(lives):
                if self.settings.on_nonfinite == "raise":
                    raise FloatingPointError(self._nonfinite_message())
                self.num_skipped += 1  # last_update_step stays: the next update covers these steps too
                return False
            self.tensors.update(lives, rates)
        self.num_updates += 1
        self.last_update_step = self.num_steps
        for place, history in enumerate(self.histories):
            history.record(upto - after, self.schedules[place])
        return True

    def _finite(self, lives: list[Tensor]) -> bool:
        finite = all_finite(lives)
        device = next(iter(self.tensors.pairs())).live.device
        together = self.tensors.groups or (everyone() if self.sync_buffers is not None else ())
        return finite if self.collectives_off else all_across(finite, together, device)

    def _decay(self, schedule: Schedule, after: int, upto: int) -> float:
        decay = schedule(upto) if upto - after == 1 else schedule.product(after, upto)
        if not 0 <= decay <= 1:
            raise ValueError(
                f"{schedule!r} gave the decay {decay!r} at step {upto}; it must lie in [0, 1]. Cap it with min and max."
            )
        return decay

    def _nonfinite_message(self) -> str:
        names = [pair.name for pair in self.tensors.pairs() if not local(pair.live).isfinite().all()]
        return (
            f"step {self.num_steps}: the live weights are not finite: {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}. The average was left as it is. Lower the learning rate or clip the "
            "gradients; on_nonfinite='skip' goes on without these updates."
        )

    # --- start and run ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the averages here: they become the live weights, and ``start_step`` this step."""
        self.holds.refuse_during_swap("start()")
        self.start_step = self.last_update_step = self.num_steps
        self.histories = [History() for _ in self.schedules]
        self.tensors.start()

    @property
    def at_start(self) -> bool:
        """Whether the averages have started and no step was counted since."""
        return self.started and self.num_steps == self.start_step and self.num_updates == 0

    def take_anew(self, statistics: bool) -> None:
        """Takes the starting values anew, as long as no step was counted since the start; else does nothing.

        Args:
            statistics: running statistics of normalization layers, too. They stay what they were before the first
                forward pass; other buffers may initialise themselves in it.
        """
        if self.at_start and not self._weights.held:
            self.tensors.take_anew(statistics)

    def start_at(self, step: int) -> None:
        """Puts the start off to a later step, or starts here where that step is past."""
        self.start_step = step
        if self.num_steps >= step:
            self.start()

    def count_from(self, step: int) -> None:
        """Joins a run that has taken so many steps; starts here where ``start_step`` is past."""
        self.num_steps = step
        self.start_at(step if self.started else self.start_step)

    def bind(self, plan: Plan) -> None:
        """Fills into the schedules what only the run knows; the plan's steps count from ``start_step``."""
        self.schedules = [schedule.bind(plan) for schedule in self.settings.decays]

    def release(self) -> None:
        """Says that no update follows soon, as after a fit: then only the module keeps the live tensors' memory."""
        self.tensors.release()

    def resume(self, state: AverageState) -> None:
        """Takes counters over from a state, after the averages; the start too, unless it is yet to come and changed."""
        self.num_steps, self.num_updates, self.num_skipped = state.num_steps, state.num_updates, state.num_skipped
        self.last_update_step, self.start_step = state.last_update_step, state.start_step
        self.histories = list(state.histories)
        if not state.started:
            same_start = state.config.get("start_step") == self.settings.start_step
            self.start_at(self.start_step if same_start else self.settings.start_step)

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer trains a tensor that is averaged."""
        if self._trains_any(optimizer):
            return True
        self.tensors.refresh_if_stale()  # its tensors may have been replaced since the last update
        return self._trains_any(optimizer)

    def _trains_any(self, optimizer: Optimizer) -> bool:
        owned = self.tensors.identities
        for group in optimizer.param_groups:  # plain loops: this runs at every step, and the first tensor decides
            for parameter in group["params"]:
                if id(parameter) in owned:
                    return True
        return False

    def caught_up(self) -> Tracker:
        """The same, once all steps are taken up that were taken so far."""
        if self.before_reading is not None:
            self.before_reading()
        return self

    # --- values -------------------------------------------------------------------------------------------------------

    def decay(self, place: int) -> float:
        """The decay per step in force: that of the last step since the start, of the first one before it."""
        return self.schedules[place](max(1, self.num_steps - self.start_step))

    def bias(self, place: int) -> float:
        """How much of the way from the start to the live weights is added to an average; 0 for most schedules."""
        return self.schedules[place].bias(max(1, self.last_update_step - self.start_step))

    def named_live(self) -> Iterator[tuple[str, Tensor]]:
        """The live tensors that are averaged, by name, also while the module carries an average."""
        for pair in self.tensors.pairs():
            yield pair.name, self._weights.live_of(pair, self.holds)

    def named_tensors(self, place: int) -> Iterator[tuple[str, Tensor]]:
        """One of the averages, by name: the tensors themselves, not copies. Before the start they are the live ones.

        A schedule that corrects the average gives fresh tensors, from the average and the live weights as they are. So
        do partitioned averages, and all processes must take as many.
        """
        for pair in self.tensors.pairs():
            carried = self.holds.carried_average_of(pair, place)
            if carried is None:
                live = self._weights.live_of(pair, self.holds)
                carried = self._whole(pair, self._part(pair, live, place)) if pair.averages else live
            yield pair.name, carried

    def named_stored(self, place: int) -> Iterator[tuple[str, Tensor]]:
        """What is stored of one of the averages, whole and without corrections; to be taken one at a time."""
        if self.schedules[place].corrects or self.processes > 1:
            return self._on_first_only((pair, pair.averages[place]) for pair in self.tensors.pairs())
        return self.named_tensors(place)

    def named_origin(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters as they were at the start, where a schedule corrects for them."""
        return self._on_first_only((pair, pair.origin) for pair in self.tensors.pairs() if pair.origin is not None)

    def _on_first_only(self, parts: Iterable[tuple[Pair, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for pair, part in parts:
            whole = self._whole(pair, part)  # all processes, one at a time
            if self.processes == 1 or is_first():
                yield pair.name, whole

    def not_held_by(self, state_dict: dict[str, Any], place: int) -> list[str]:
        """The names of averages not among the entries of a ``state_dict`` taken while the module carries them.

        None for a schedule that corrects: what the module carries is not the average itself.
        """
        if self.schedules[place].corrects:
            return []
        averages = dict(self.named_tensors(place))
        return not_held(((pair, averages[pair.name]) for pair in self.tensors.pairs()), state_dict)

    def distance(self, place: int) -> float:
        """``||live - average|| / ||live||`` over all averaged tensors; NaN where they are not finite."""
        parts: dict[Groups, tuple[list[Tensor], list[Tensor]]] = {}
        squares = torch.zeros(2, dtype=torch.float64)
        device = torch.device("cpu")
        with torch.no_grad():
            for pair in self.tensors.pairs():
                live = self._weights.live_of(pair, self.holds)
                carried = self.holds.carried_average_of(pair, place) if pair.cut.stored_as_live else None
                average = carried if carried is not None else self._part(pair, live, place) if pair.averages else live
                of_average, of_live = parts.setdefault(pair.groups, ([], []))
                of_average.append(local(average))
                of_live.append(pair.part(live))
                device = pair.live.device
            for groups, lists in parts.items():
                squares += sum_across(squared_norms(*lists), groups, device)
        return ratio(squares) if squares.isfinite().all() else math.nan

    # --- what a swap asks ---------------------------------------------------------------------------------------------

    def pairs(self) -> Iterable[Pair]:
        """All pairs, in the order of the module, once an update under way is finished."""
        return self.tensors.pairs()

    def other_buffers(self) -> list[BufferPlace]:
        """Buffers without an average, in which nothing stays that is written during a swap."""
        return self.tensors.other_buffers()

    def to_carry(self, place: int) -> Iterator[tuple[Pair, Tensor]]:
        """What each pair is to carry of one of the averages; nothing for pairs that have not started."""
        self.tensors.refresh_if_stale()
        as_kept = not self.schedules[place].corrects
        for pair in self.tensors.pairs():
            if pair.averages and as_kept and pair.cut.stored_as_live:
                yield pair, pair.averages[place]
            elif pair.averages:
                yield pair, self._whole(pair, self._part(pair, pair.live.detach(), place))

    def reshard(self) -> None:
        """Makes the module show its own tensors, where a forward pass leaves others in their place."""
        self.tensors.reshard()

    def _part(self, pair: Pair, live: Tensor, place: int) -> Tensor:
        """``average``, or ``average + bias(n) * (live - origin)`` where the schedule corrects."""
        average = pair.averages[place]
        if not self.schedules[place].corrects or pair.origin is None:
            return average
        with torch.no_grad():
            return corrected(average, pair.beside(live), pair.origin, self.bias(place))

    def _whole(self, pair: Pair, part: Tensor) -> Tensor:
        if pair.cut.stored_as_live:
            return part
        if self.collectives_off:
            raise RuntimeError(
                "the average is partitioned among processes, so that all of them would have to give their part, but an "
                "exception ended the run in one. Resume from the last checkpoint."
            )
        with torch.no_grad():
            return pair.whole(part)


def passed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of ``every`` lies in the steps ``before + 1 .. now``."""
    return before // every < now // every
