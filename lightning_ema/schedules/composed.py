"""Schedules made of schedules. Notation as in :mod:`lightning_ema.schedules`.

A number ``d`` inside another schedule means ``Constant(d)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_ema.checks import check_count, check_positive
from lightning_ema.schedules.base import Plan, Schedule, bound, inner


@dataclass(frozen=True, repr=False)
class Then(Schedule):
    """``d(n) = first(n)`` for ``n <= at``, then ``second(n - at)``: the second counts its own steps from 1.

    Mean age: once what came before is forgotten, that of ``second`` alone. Source: Mean Teacher (arXiv 1703.01780),
    ``Then(0.99, at=ramp_up, second=0.999)``.

    >>> schedule = Then(0.99, at=100, second=0.999)
    >>> schedule(100), schedule(101)
    (0.99, 0.999)
    """

    first: Schedule | float
    at: int
    second: Schedule | float

    def __post_init__(self) -> None:
        check_count(self.at, "Then: at", at_least=1)
        inner(self.first), inner(self.second)

    def __call__(self, n: int) -> float:
        return inner(self.first)(n) if n <= self.at else inner(self.second)(n - self.at)

    def product(self, after: int, upto: int) -> float:
        before = inner(self.first).product(min(after, self.at), min(upto, self.at))
        return before * inner(self.second).product(max(after - self.at, 0), max(upto - self.at, 0))

    def bind(self, plan: Plan) -> Schedule:
        first = bound(self.first, replace(plan, total_steps=self.at))
        return replace(self, first=first, second=bound(self.second, plan.after(self.at)))

    @property
    def limit(self) -> float:
        return inner(self.second).limit


@dataclass(frozen=True, repr=False)
class Shifted(Schedule):
    """``d(n) = schedule(n + by)``: goes on with a schedule of which ``by`` steps are over already.

    Take it where an average from elsewhere is gone on from. The end of the run stays where it is. Source: the
    ``updates`` argument of YOLO's ``ModelEMA``.

    >>> from lightning_ema import Equal
    >>> Shifted(Equal(), by=3)(1), Equal()(4)
    (0.75, 0.75)
    """

    schedule: Schedule | float
    by: int

    def __post_init__(self) -> None:
        check_count(self.by, "Shifted: by", at_least=0)
        inner(self.schedule)

    def __call__(self, n: int) -> float:
        return inner(self.schedule)(n + self.by)

    def product(self, after: int, upto: int) -> float:
        return inner(self.schedule).product(after + self.by, upto + self.by)

    def bind(self, plan: Plan) -> Schedule:
        return replace(self, schedule=bound(self.schedule, plan.after(-self.by)))

    @property
    def limit(self) -> float:
        return inner(self.schedule).limit


@dataclass(frozen=True, repr=False)
class Scaled(Schedule):
    """``d(n) = schedule(n) ** batch_factor``: the same horizon in samples when the batch is ``batch_factor`` times.

    Mean age: about that of ``schedule`` divided by ``batch_factor``; of a constant ``decay``, once the start is
    forgotten, ``decay ** k / (1 - decay ** k)`` with ``k = batch_factor``.
    Source: the EMA scaling rule, Busbridge et al. 2023, arXiv 2307.13813.

    >>> round(Scaled(0.999, batch_factor=4)(1), 6)
    0.996006
    """

    schedule: Schedule | float
    batch_factor: float

    def __post_init__(self) -> None:
        check_positive(self.batch_factor, "Scaled: batch_factor")
        inner(self.schedule)

    def __call__(self, n: int) -> float:
        return math.pow(inner(self.schedule)(n), self.batch_factor)

    def product(self, after: int, upto: int) -> float:
        return math.pow(inner(self.schedule).product(after, upto), self.batch_factor)

    def bind(self, plan: Plan) -> Schedule:
        return replace(self, schedule=bound(self.schedule, plan))

    @property
    def limit(self) -> float:
        return math.pow(inner(self.schedule).limit, self.batch_factor)
