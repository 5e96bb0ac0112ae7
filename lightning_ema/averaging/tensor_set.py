"""One set of a module's tensors: which weights they hold, and the way back. Knows torch, not Lightning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_ema.averaging.buffers import Noted, buffers_put_back, note, put_back
from lightning_ema.averaging.pair import Pair
from lightning_ema.averaging.swap import Averages, Swap
from lightning_ema.distributed.base import cut_of
from lightning_ema.distributed.processes import SyncBuffers
from lightning_ema.modules.batchnorm import Place, Statistics, estimate, insert_copies, statistics_of
from lightning_ema.modules.named_tensors import BufferPlace, Survey

_log = logging.getLogger(__name__)

Batches = AbstractContextManager[Iterable[Any]]
"""Training batches to estimate BatchNorm statistics from."""


class Tracked(Protocol):
    """What is asked of the averages of a set of tensors."""

    num_updates: int
    sync_buffers: SyncBuffers | None
    collectives_off: bool

    def caught_up(self) -> object:
        """Takes up all steps that were taken so far."""

    def pairs(self) -> Iterable[Pair]:
        """All pairs, once an update under way is finished."""

    def other_buffers(self) -> list[BufferPlace]:
        """Buffers without an average, in which nothing stays that is written during a swap."""

    def to_carry(self, place: int) -> Averages:
        """What each pair is to carry of one of the averages."""

    def reshard(self) -> None:
        """Makes the module show its own tensors, where a forward pass left others in their place."""


class Weights(Protocol):
    """What is asked of the weights of the whole module."""

    module: nn.Module
    held: list[Held]

    @property
    def holds_file(self) -> bool:
        """Whether the module holds the weights of a file that is evaluated after a fit."""

    def averaged_by_others(self, tensors: TensorSet) -> Set[int]:
        """The ``id`` of each tensor of which another set of the module keeps an average."""

    def catch_up(self, tensors: TensorSet) -> None:
        """Lets all averages of these tensors take up their steps, which they cannot during a swap."""

    def held_anywhere(self) -> list[Held]:
        """What tensors of this module and of others hold now."""

    def hold(self, held: Held) -> None:
        """Notes that tensors of this module hold an average."""

    def let_go(self, held: Held) -> None:
        """Notes that they do so no more."""


@dataclass(eq=False)
class Held:
    """An average that a set of tensors holds, or is to hold again when what lies over it has ended.

    Attributes:
        tensors: the set.
        place: of the average among those of the set.
        swap: the swap and its way back.
        applied: whether it stays until :meth:`TensorSet.restore`, and swaps may lie over it.
        paused: whether its tensors carry their live values meanwhile.
        over: what was paused for it.
        statistics: where the BatchNorm statistics hang that do not hang in the module at present: those of the live
            weights, where the average carries statistics of its own; those of the average while it is paused.
        buffers: those without an average, as they were.
    """

    tensors: TensorSet
    place: int
    swap: Swap
    applied: bool
    paused: bool = False
    over: list[Held] = field(default_factory=list)
    statistics: list[Place] = field(default_factory=list)
    buffers: list[Noted] = field(default_factory=list)

    def underlies(self, tensors: TensorSet) -> bool:
        """Whether a fit left the module with it, and so it is simply what this other set finds there."""
        return self.applied and self.tensors is not tensors and self.tensors.left


class TensorSet:
    """The tensors that the averages of one tracker cover: which weights they hold, and the way back.

    Attributes:
        evaluated_by: the name of the callback whose evaluations and files are given an average; empty where none are.
        selected: the place of the average that they are given.
        estimates: BatchNorm statistics estimated for each average, where they are; else empty.
        left: whether a fit has ended, and none has begun since.
        over: whether its averages are to be dropped, because the module's weights are others' now.
        before_drop: what is to be done then.
        say: tells the user of something.
    """

    def __init__(self, weights: Weights, tracked: Tracked) -> None:
        self.weights = weights
        self.evaluated_by = ""
        self.selected = 0
        self.estimates: list[Estimate] = []
        self.left = self.over = False
        self.before_drop: Callable[[], None] | None = None
        self.say: Callable[[str], None] = _log.info
        self._told_of_buffers = False
        self._tracked = tracked

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def gives_average(self) -> bool:
        """Whether evaluations and files are to see an average at present, rather than what is in the module."""
        can = bool(self.evaluated_by) and self._tracked.num_updates > 0
        return can and not self.over and not self.weights.holds_file

    @property
    def wants_average(self) -> bool:
        """Whether an evaluation or a file is to be given an average that the module does not carry already."""
        return self.gives_average and self.carried != self.selected

    @property
    def carried(self) -> int | None:
        """The place of the average that the tensors hold now; None for their live weights."""
        held = self._top()
        return None if held is None else held.place

    def carried_average_of(self, pair: Pair, place: int) -> Tensor | None:
        """Where one of the averages is to be found if the tensors carry it; None where they do not."""
        held = self._top() if self.weights.held else None
        return held.swap.average_of(pair.name) if held is not None and held.place == place else None

    def refuse_during_swap(self, what: str) -> None:
        """Refuse to do what would go wrong while the tensors carry an average.

        Raises:
            RuntimeError: naming what to call first.
        """
        for held in self._met(unless_underlying=True):
            way_back = "restore()" if held.applied else "swap_out()"
            state = "holds the average since apply(keep=True)" if held.applied else "carries an average"
            raise RuntimeError(f"{what} while the module {state}. Call {way_back} first.")

    def live_statistics(self) -> Statistics:
        """The BatchNorm statistics of the live weights while an average carries others; else empty."""
        held = self._top()
        if held is None or not held.statistics:
            return {}
        carried = statistics_of(self.weights.module)
        live = {id(place.table[place.leaf]): place.tensor for place in held.statistics}
        return {name: live[id(tensor)] for name, tensor in carried.items()}

    # --- swap in, swap out --------------------------------------------------------------------------------------------

    def swap_in(self, place: int, copy: bool = False, batches: Batches | None = None) -> None:
        """Lets the tensors carry one of the averages until :meth:`swap_out`. What they carry already stays.

        Args:
            place: of the average.
            copy: carry copies, also of what the tensors carry already.
            batches: to estimate its BatchNorm statistics from, where that is asked for and not done yet.

        Raises:
            RuntimeError: they, or some of them, carry another average.
        """
        if self.carried == place and not copy:
            return
        for held in self._met():
            if not held.applied and (held.tensors is not self or held.place != place):
                raise RuntimeError(
                    "swap_in() of an average while the module carries another one of the same tensors. Call swap_out() "
                    "on that one first."
                )
        self._hold(place, copy, applied=False, batches=batches)

    def swap_out(self) -> None:
        """Ends the swap, whoever began it. Without one it does nothing.

        Raises:
            RuntimeError: something wrote to a parameter meanwhile, and so into the average. The live weights are back
                nevertheless.
        """
        held = self._top()
        if held is None or held.applied:
            return
        if written := self._let_go(held):
            raise RuntimeError(
                f"{', '.join(written[:4])}{', ...' if len(written) > 4 else ''}: written to while the module carried "
                "the average, so the average itself was changed (test-time adaptation? an optimizer that rewrites "
                "weights for evaluation?). The live weights are back and untouched. To let an evaluation write, carry "
                "a copy, WeightAverage.swapped(copy=True); in a Trainer use EMACallback(evaluate='live')."
            )

    @contextmanager
    def swapped(self, place: int, copy: bool = False, batches: Batches | None = None) -> Iterator[None]:
        """A swap for the length of a block; one that is under way already is left to its owner."""
        before = self._top()
        try:
            self.swap_in(place, copy, batches)
            yield
        finally:
            if self._top() is not before:
                self.swap_out()

    @contextmanager
    def as_evaluated(self, batches: Batches | None) -> Iterator[None]:
        """Inside this block the tensors carry what evaluations and files are given."""
        with self.instead(self.selected, batches) if self.wants_average else nullcontext():
            yield

    @contextmanager
    def instead(self, place: int | None, batches: Batches | None = None) -> Iterator[None]:
        """Inside this block the tensors carry one of the averages, or None: their live weights.

        Until the first update they carry their live weights, whichever is asked for. Afterwards they carry again what
        they did before, and all that was written to it, also on errors and without asking another process.
        """
        below = [held for held in self.weights.held if held.tensors is self and not held.paused]
        try:
            for held in reversed(below):
                _pause(held)
            with (
                nullcontext()
                if place is None or self._tracked.num_updates == 0
                else self.swapped(place, False, batches)
            ):
                yield
        finally:
            for held in below:
                _resume(held)

    # --- apply, restore -----------------------------------------------------------------------------------------------

    def apply(self, place: int) -> None:
        """Writes an average into the module's own storage, and keeps the live weights aside for :meth:`restore`.

        Contents change places, so that this needs no memory where average and module are of one dtype.

        Raises:
            RuntimeError: the tensors carry another average.
        """
        if self.carried == place:
            return
        self.refuse_during_swap("apply(keep=True)")
        self._hold(place, copy=False, applied=True)

    def restore(self) -> None:
        """Brings the live weights back after :meth:`apply`; without it it does nothing.

        Raises:
            RuntimeError: an average is swapped in meanwhile.
        """
        for held in [held for held in self.weights.held if held.tensors is self and held.applied]:
            if held.paused:
                raise RuntimeError("restore() while the module carries an average. Call swap_out() first.")
            self._let_go(held)

    def apply_for_good(self, place: int) -> None:
        """Writes an average into the module; the live weights are lost."""
        self.refuse_during_swap("apply()")
        with torch.no_grad():
            for pair, average in self._tracked.to_carry(place):
                pair.live.copy_(average)

    # --- the steps of the above ---------------------------------------------------------------------------------------

    def _top(self) -> Held | None:
        return next((h for h in reversed(self.weights.held) if h.tensors is self and not h.paused), None)

    def averaged(self) -> Set[int]:
        """The ``id`` of each of its tensors that has an average."""
        return {id(pair.live) for pair in self._tracked.pairs() if pair.averages}

    def catch_up(self) -> None:
        """Lets its averages take up all steps that were taken so far."""
        self._tracked.caught_up()

    def meets(self, other: TensorSet) -> bool:
        """Whether some tensor belongs to both."""
        own = {id(pair.live) for pair in self._tracked.pairs()}
        return any(id(pair.live) in own for pair in other._tracked.pairs())

    def _met(self, unless_underlying: bool = False) -> list[Held]:
        """The averages that some of the tensors hold now, those of this set and of others, also of other modules."""
        anywhere = self.weights.held_anywhere()
        looked_at = [held for held in anywhere if not (unless_underlying and held.underlies(self))]
        return [held for held in looked_at if held.tensors is self or self.meets(held.tensors)]

    def _hold(self, place: int, copy: bool, applied: bool, batches: Batches | None = None) -> None:
        tracked = self._tracked
        self.weights.catch_up(self)
        sync = None if tracked.collectives_off else tracked.sync_buffers
        below = self._met()
        held = Held(self, place, Swap(tracked.to_carry(place), copy, applied, tracked.reshard, sync), applied)
        self.weights.hold(held)  # noted first, so that an interruption finds it
        try:
            for other in reversed(below):
                held.over.append(other)
                _pause(other)
            if not applied:
                held.buffers = note(tracked.other_buffers(), but=self.weights.averaged_by_others(self))
            held.swap.begin()
            self._put_statistics_in(held, batches)
        except BaseException:
            self._let_go(held)
            raise

    def _let_go(self, held: Held) -> list[str]:
        if not held.paused:
            _exchange(held)
        held.statistics = []
        written = held.swap.end()
        self._put_back_buffers(held)
        for other in reversed(held.over):
            _resume(other)
        self.weights.let_go(held)
        return written

    def _put_back_buffers(self, held: Held) -> None:
        told = [place for place in put_back(held.buffers) if not place.layers]
        held.buffers = []
        if told and not self._told_of_buffers:
            self._told_of_buffers = True
            self.say(buffers_put_back(told))

    def _put_statistics_in(self, held: Held, batches: Batches | None) -> None:
        if not self.estimates:
            return
        module, updates = self.weights.module, self._tracked.num_updates
        held.statistics = insert_copies(module)
        current = self.estimates[held.place]
        if batches is not None and current.made_at != updates:
            with batches as inputs:
                estimated = estimate(module, inputs, together=self._tracked.sync_buffers is not None)
            self.estimates[held.place] = Estimate(updates, estimated)
        else:
            write(current.statistics, module)


@dataclass(frozen=True)
class Estimate:
    """BatchNorm statistics that belong to an average.

    Attributes:
        made_at: the number of updates for which they were estimated; -1 before the first.
        statistics: by name.
    """

    made_at: int = -1
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


def _pause(held: Held) -> None:
    held.paused = True
    held.swap.pause()
    _exchange(held)


def _resume(held: Held) -> None:
    held.paused = False  # first, so that an interruption leaves a swap that can be ended
    held.swap.resume()
    _exchange(held)


def _exchange(held: Held) -> None:
    held.statistics = [place.insert() for place in held.statistics]


def write(values: Mapping[str, Tensor], module: nn.Module) -> None:
    """Writes tensors into a module's own, by name."""
    if values:
        tensors = Survey(module).tensors
        with torch.inference_mode(False), torch.no_grad():
            for name, value in values.items():
                cut_of(tensors[name]).write(tensors[name], value)
