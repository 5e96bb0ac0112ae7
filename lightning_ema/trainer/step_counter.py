"""Counting the steps that optimizers really take. Knows torch, not Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


@dataclass(eq=False, slots=True)
class _Running:
    """A step that began and has not ended, so far as is known: one that raised never does.

    Attributes:
        optimizer: whose step it is.
        within: the optimizers whose steps ended within it, once for each step.
        taken: those of them that were counted meanwhile.
    """

    optimizer: Optimizer
    within: list[Optimizer] = field(default_factory=list)
    taken: list[Optimizer] = field(default_factory=list)


class StepCounter:
    """Counts steps of the optimizers that ``owns`` accepts, between :meth:`open` and :meth:`close`.

    Two global hooks see every optimizer, in every thread, also one used around Lightning's wrapper. A step that a
    GradScaler skips fires none of them; a fused optimizer under a GradScaler fires them all the same and carries
    ``found_inf``.

    A step within another one of the same parameters and the same thread (``super().step()``, SAM, Lookahead) is part
    of it. That is known only when the outer one ends: where it raises, what ended within it stands for itself, as the
    second try of a step that ran out of memory.

    Attributes:
        missed: steps of theirs that were taken outside.
        before_first: called before each step of theirs until one was counted.
    """

    def __init__(self) -> None:
        self._owns: Callable[[Optimizer], bool] | None = None
        self._handles: tuple[RemovableHandle, ...] = ()
        self._taken: dict[Optimizer, int] = {}  # in this batch
        self._given = self._left = 0  # of this batch's steps, and of earlier ones'
        self._running: dict[int, list[_Running]] = {}  # by thread: steps of several threads overlap in any way
        self._open = False
        self.missed = 0
        self.before_first: Callable[[], None] | None = None

    @property
    def held(self) -> bool:
        """Whether the hooks hang."""
        return bool(self._handles)

    def hold(self, owns: Callable[[Optimizer], bool]) -> None:
        """Hangs the hooks in."""
        self.release()
        self._owns = owns
        self.missed = 0
        self._handles = (register_optimizer_step_pre_hook(self._enter), register_optimizer_step_post_hook(self._leave))

    def release(self) -> None:
        """Takes the hooks out and forgets what was counted."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        self._owns = None
        self._taken.clear()
        self._given = self._left = 0
        self._running.clear()
        self.before_first = None
        self._open = False

    def open(self) -> None:
        """Counts from here: a training batch begins."""
        if self._running:
            self._count_within()
            self._running.clear()  # what is left there raised, in an earlier batch
        if self._taken:
            self._left += max(self._taken.values()) - self._given
            self._taken.clear()
        self._given = 0
        self._open = True

    def close(self) -> None:
        """Stops counting: steps outside a batch are tuners' and loaders' own."""
        self._open = False

    @property
    def pending(self) -> bool:
        """Whether a step was taken since the last :meth:`take`."""
        return bool(self._taken) or any(step.within for running in self._running.values() for step in running)

    def take(self) -> int:
        """The steps since the last call: in a batch the most that any one optimizer took. A GAN's batch is one step."""
        if self._running:
            self._count_within()
        if not self._taken and not self._left:
            return 0
        most = max(self._taken.values(), default=0)
        steps = self._left + most - self._given
        self._left, self._given = 0, most
        return steps

    def _count_within(self) -> None:
        """Counts what ended within steps that raised, or that have not ended yet: these then count no more."""
        for running in list(self._running.values()):
            for step in list(running):
                self._count(step.within)
                step.taken += step.within
                step.within = []

    def _count(self, optimizers: Iterable[Optimizer]) -> None:
        for optimizer in optimizers:
            self._taken[optimizer] = self._taken.get(optimizer, 0) + 1

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        thread = get_ident()
        if thread not in self._running:
            self._running[thread] = []
        if self.before_first is not None and self._begins_first(optimizer, self._running[thread]):
            self.before_first()
        self._running[thread].append(_Running(optimizer))

    def _leave(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        thread = get_ident()
        running = self._running.get(thread, [])
        ended, taken = [], []
        while running:  # down to this one's begin: those above it raised
            step = running.pop()
            ended += step.within
            taken += step.taken
            if step.optimizer is optimizer:
                break
        if ended:
            ended = [each for each in ended if not _share(each, optimizer)]
        counted = taken and any(_share(each, optimizer) for each in taken)
        if not counted and self._counts(optimizer):
            ended.append(optimizer)
        if running:
            running[-1].within += ended
            running[-1].taken += taken
            return
        self._running.pop(thread, None)
        self._count(ended)

    def _begins_first(self, optimizer: Optimizer, around: Sequence[_Running]) -> bool:
        """Whether no step was counted yet, and this one is not part of another, which may have written already."""
        if self.pending or self._owns is None or not self._owns(optimizer):
            return False
        return not any(_share(step.optimizer, optimizer) for step in around)

    def _counts(self, optimizer: Optimizer) -> bool:
        """Whether a step of the optimizer that ends now is one of those that are asked for."""
        if self._owns is None or not self._owns(optimizer):
            return False
        if not self._open:
            # torch makes the state that it reads or loads by a step with a learning rate of 0
            self.missed += any(float(group.get("lr", 1)) != 0 for group in optimizer.param_groups)
            return False
        found_inf = getattr(optimizer, "found_inf", None)
        return found_inf is None or not bool(found_inf)


def _share(first: Optimizer, second: Optimizer) -> bool:
    """Whether two optimizers train some of the same parameters."""
    return first is second or not {id(p) for p in _parameters(first)}.isdisjoint(id(p) for p in _parameters(second))


def _parameters(optimizer: Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]
