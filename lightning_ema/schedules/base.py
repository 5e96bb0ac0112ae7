"""What every schedule is, and how an update reads it. Notation as in :mod:`lightning_ema.schedules`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace

from lightning_ema.checks import check_decay


def horizon(decay: float) -> float:
    """``1 / (1 - decay)``: the steps over which an average of this decay reaches back; infinite at 1."""
    return 1 / (1 - decay) if decay < 1 else math.inf


@dataclass(frozen=True)
class Plan:
    """What only the run knows, and a schedule may need. ``None`` where the run does not know it either.

    Attributes:
        total_steps: steps from ``start_step`` to the end of the run.
        steps_per_epoch: steps in one epoch.
        samples_per_step: training samples that one step consumes, over all processes.
    """

    total_steps: int | None = None
    steps_per_epoch: float | None = None
    samples_per_step: float | None = None

    def after(self, steps: int) -> Plan:
        """The plan as seen by a schedule that begins ``steps`` later (earlier, where negative)."""
        return self if self.total_steps is None else replace(self, total_steps=max(1, self.total_steps - steps))


class Schedule(ABC):
    """The decay of every step: ``schedule(n)`` for ``n = 1, 2, ...``. Pure and without state."""

    @abstractmethod
    def __call__(self, n: int) -> float:
        """The decay ``d(n)`` of the n-th step after ``start_step``, in [0, 1]; ``n`` counts from 1."""

    def product(self, after: int, upto: int) -> float:
        """The share of the old average left by steps ``after + 1 .. upto``: ``d(after + 1) * ... * d(upto)``."""
        return math.prod(self(n) for n in range(after + 1, upto + 1))

    def bind(self, plan: Plan) -> Schedule:
        """The same schedule with what only the run knows filled in.

        Raises:
            ValueError: the schedule needs something that ``plan`` does not know.
        """
        return self

    @property
    def limit(self) -> float:
        """The decay approached for ``n`` to infinity; 1 where the horizon grows without end."""
        return 1.0

    def __repr__(self) -> str:
        """As it is written: fields that have no default by position, the others by name where they differ from it."""
        if not is_dataclass(self):
            return super().__repr__()
        given = [(field, getattr(self, field.name)) for field in fields(self)]
        by_position = [repr(value) for field, value in given if field.default is MISSING]
        by_name = [f"{f.name}={value!r}" for f, value in given if f.default is not MISSING and value != f.default]
        return f"{type(self).__name__}({', '.join(by_position + by_name)})"

    @property
    def corrects(self) -> bool:
        """Whether the average is corrected by ``bias``, for which the weights at the start are kept."""
        return False

    def bias(self, n: int) -> float:
        """The share of the way gone since the start that is added to the average after ``n`` steps."""
        return 0.0


@dataclass(frozen=True, repr=False)
class Constant(Schedule):
    """``d(n) = decay``: the bare exponential moving average.

    It remembers its starting point with weight ``decay ** n``; :class:`Warmup` does not. Mean age, once that is
    forgotten: ``decay / (1 - decay)``.

    >>> Constant(0.9)(1), round(Constant(0.9).product(0, 2), 2)
    (0.9, 0.81)
    """

    decay: float

    def __post_init__(self) -> None:
        check_decay(self.decay, self)

    def __call__(self, n: int) -> float:
        return self.decay

    def product(self, after: int, upto: int) -> float:
        return self.decay ** (upto - after)

    @property
    def limit(self) -> float:
        return self.decay


@dataclass(frozen=True, repr=False)
class PerUpdate(Schedule):
    """``D = d(n)``: an update that covers several steps reads ``schedule`` once, at the current step ``n``.

    Without it such an update keeps the product ``d(m + 1) * ... * d(n)``, so that the horizon does not depend on
    ``every_n_steps``; with it, as in most other systems, the horizon counts updates. It stands outermost. With an
    update at every step it changes nothing. A number ``d`` means ``Constant(d)``.

    >>> round(Constant(0.9).product(0, 2), 2), PerUpdate(0.9).product(0, 2)
    (0.81, 0.9)

    Raises:
        ValueError: ``schedule`` is a ``PerUpdate`` itself.
    """

    schedule: Schedule | float

    def __post_init__(self) -> None:
        _refuse_per_update(_of_number(self.schedule))

    def __call__(self, n: int) -> float:
        return _of_number(self.schedule)(n)

    def product(self, after: int, upto: int) -> float:
        """The share of the old average left by one update that covers steps ``after + 1 .. upto``: ``d(upto)``."""
        return self(upto) if upto > after else 1.0

    def bind(self, plan: Plan) -> Schedule:
        return replace(self, schedule=bound(self.schedule, plan))

    @property
    def limit(self) -> float:
        return _of_number(self.schedule).limit

    @property
    def corrects(self) -> bool:
        return _of_number(self.schedule).corrects

    def bias(self, n: int) -> float:
        return _of_number(self.schedule).bias(n)


def inner(schedule: Schedule | float) -> Schedule:
    """What stands inside another schedule: itself, or ``Constant(d)`` for a number ``d``.

    Raises:
        ValueError: it can only stand outermost.
    """
    found = _of_number(schedule)
    _refuse_per_update(found)
    if found.corrects:
        raise ValueError(
            f"{found!r} corrects the average of a whole run and cannot be part of another schedule. It stands alone: "
            "decay=Bema()."
        )
    return found


def bound(schedule: Schedule | float, plan: Plan) -> Schedule | float:
    """What stands inside another schedule, with what only the run knows filled in."""
    return schedule.bind(plan) if isinstance(schedule, Schedule) else schedule


def _of_number(schedule: Schedule | float) -> Schedule:
    return schedule if isinstance(schedule, Schedule) else Constant(schedule)


def _refuse_per_update(schedule: Schedule) -> None:
    if isinstance(schedule, PerUpdate):
        raise ValueError(
            f"{schedule!r} says how an update reads a whole schedule and cannot be part of another one. Write it once, "
            "outermost, for instance PerUpdate(Then(0.99, at=100, second=0.999))."
        )
