"""Schedules without a fixed horizon, and schedules made of schedules. Notation as in :mod:`lightning_ema.schedules`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

from lightning_ema.checks import check_count, check_decay, check_positive
from lightning_ema.schedules.basic import Constant, Plan, Schedule


@dataclass(frozen=True, repr=False)
class Power(Schedule):
    """``d(n) = (1 - 1 / n) ** (gamma + 1)``: the power-function average, whose profile grows as ``n ** gamma``.

    ``sigma_rel``, the width of the profile relative to the run, determines ``gamma`` as the largest root of
    ``(gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) = sigma_rel ** 2``. Give exactly one of the two. Mean age:
    ``n / (gamma + 2) - 1 / 2``, but for a term that falls as ``1 / n``.
    Source: Karras et al. 2024, arXiv 2312.02696.

    >>> round(Power(sigma_rel=0.1).exponent, 3), Power(gamma=1.0)(2), Power(gamma=1.0).product(0, 5)
    (6.937, 0.25, 0.0)
    """

    sigma_rel: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        if (self.sigma_rel is None) == (self.gamma is None):
            raise ValueError(
                f"Power: got sigma_rel={self.sigma_rel!r} and gamma={self.gamma!r}; give exactly one of them, "
                "for instance Power(sigma_rel=0.1)."
            )
        if self.gamma is not None and self.gamma != 0:
            check_positive(self.gamma, "Power: gamma")
        if self.sigma_rel is not None:
            check_positive(self.sigma_rel, "Power: sigma_rel")
            if self.sigma_rel > _WIDEST:
                raise ValueError(
                    f"Power: sigma_rel is {self.sigma_rel!r}; it must lie in (0, {_WIDEST:.4f}], where the upper end "
                    "is the plain mean. Usual values are 0.05 to 0.15."
                )

    @property
    def exponent(self) -> float:
        """The ``gamma`` in force."""
        return self.gamma if self.gamma is not None else _gamma_of(self.sigma_rel or 0.0)

    def __call__(self, n: int) -> float:
        return self.product(n - 1, n)

    def product(self, after: int, upto: int) -> float:
        return (after / upto) ** (self.exponent + 1) if upto > after else 1.0


@dataclass(frozen=True, repr=False)
class Equal(Schedule):
    """``d(n) = 1 - 1 / n``: the plain mean of all states since ``start_step``. Source: SWA, arXiv 1803.05407.

    Updated every ``k`` steps it is the mean of the states that it saw. Mean age: ``(n - 1) / 2``.

    >>> Equal()(1), Equal()(4), Equal().product(2, 4)
    (0.0, 0.75, 0.5)
    """

    def __call__(self, n: int) -> float:
        return (n - 1) / n

    def product(self, after: int, upto: int) -> float:
        return after / upto if upto > after else 1.0


@dataclass(frozen=True, repr=False)
class Debiased(Schedule):
    """``d(n) = decay * (1 - decay ** (n - 1)) / (1 - decay ** n)``: a mean at first, then an average of ``decay``.

    It is the zero-started average divided by ``1 - decay ** n``, so the state before the first step has no weight. Mean
    age: ``decay / (1 - decay) - n * decay ** n / (1 - decay ** n)``. Sources: optax ``ema(debias=True)``, audiocraft.

    >>> Debiased(0.5)(1), Debiased(0.5)(2)
    (0.0, 0.3333333333333333)
    """

    decay: float

    def __post_init__(self) -> None:
        check_decay(self.decay, self)
        if self.decay == 1:
            raise ValueError("Debiased: decay is 1; it must be below 1. A mean of all states is Equal().")

    def __call__(self, n: int) -> float:
        return self.product(n - 1, n)

    def product(self, after: int, upto: int) -> float:
        if self.decay == 0 or upto == after:
            return 0.0 if upto > after else 1.0
        log = math.log(self.decay)
        return math.exp((upto - after) * log) * math.expm1(after * log) / math.expm1(upto * log)

    @property
    def limit(self) -> float:
        return self.decay


@dataclass(frozen=True, repr=False)
class CopyFirst(Schedule):
    """``d(1) = 0``, then ``d(n) = schedule(n - 1)``: the first step copies, the schedule begins after it.

    Mean age: that of ``schedule`` one step earlier. Sources: torch's ``AveragedModel`` and mmengine, whose first call
    copies.

    >>> CopyFirst(0.9)(1), CopyFirst(0.9)(2)
    (0.0, 0.9)
    """

    schedule: Schedule | float

    def __post_init__(self) -> None:
        _inner(self.schedule)

    def __call__(self, n: int) -> float:
        return 0.0 if n == 1 else _inner(self.schedule)(n - 1)

    def product(self, after: int, upto: int) -> float:
        if after == 0:
            return 0.0 if upto > 0 else 1.0
        return _inner(self.schedule).product(after - 1, upto - 1)

    def bind(self, plan: Plan) -> Schedule:
        return replace(self, schedule=_bound(self.schedule, plan.after(1)))

    @property
    def limit(self) -> float:
        return _inner(self.schedule).limit


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
        _inner(self.first), _inner(self.second)

    def __call__(self, n: int) -> float:
        return _inner(self.first)(n) if n <= self.at else _inner(self.second)(n - self.at)

    def product(self, after: int, upto: int) -> float:
        before = _inner(self.first).product(min(after, self.at), min(upto, self.at))
        return before * _inner(self.second).product(max(after - self.at, 0), max(upto - self.at, 0))

    def bind(self, plan: Plan) -> Schedule:
        first = _bound(self.first, replace(plan, total_steps=self.at))
        return replace(self, first=first, second=_bound(self.second, plan.after(self.at)))

    @property
    def limit(self) -> float:
        return _inner(self.second).limit


@dataclass(frozen=True, repr=False)
class Shifted(Schedule):
    """``d(n) = schedule(n + by)``: goes on with a schedule of which ``by`` steps are over already.

    Take it where an average from elsewhere is gone on from. The end of the run stays where it is. Source: the
    ``updates`` argument of YOLO's ``ModelEMA``.

    >>> Shifted(Equal(), by=3)(1), Equal()(4)
    (0.75, 0.75)
    """

    schedule: Schedule | float
    by: int

    def __post_init__(self) -> None:
        check_count(self.by, "Shifted: by", at_least=0)
        _inner(self.schedule)

    def __call__(self, n: int) -> float:
        return _inner(self.schedule)(n + self.by)

    def product(self, after: int, upto: int) -> float:
        return _inner(self.schedule).product(after + self.by, upto + self.by)

    def bind(self, plan: Plan) -> Schedule:
        return replace(self, schedule=_bound(self.schedule, plan.after(-self.by)))

    @property
    def limit(self) -> float:
        return _inner(self.schedule).limit


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
        _inner(self.schedule)

    def __call__(self, n: int) -> float:
        return math.pow(_inner(self.schedule)(n), self.batch_factor)

    def product(self, after: int, upto: int) -> float:
        return math.pow(_inner(self.schedule).product(after, upto), self.batch_factor)

    def bind(self, plan: Plan) -> Schedule:
        return replace(self, schedule=_bound(self.schedule, plan))

    @property
    def limit(self) -> float:
        return math.pow(_inner(self.schedule).limit, self.batch_factor)


@dataclass(frozen=True, repr=False)
class Bema(Schedule):
    """``d(n) = 1 - (rho + gamma * n) ** -kappa``, corrected for the lag of the average.

    What is evaluated and saved is ``average + bias(n) * (live - start)`` with ``bias(n) = (rho + gamma * n) ** -eta``
    and ``start`` the live weights at ``start_step``, which are kept: one more tensor for each averaged parameter.
    Buffers are averaged and not corrected. ``live`` are the live weights at the time of the loan or save.

    Source: BEMA, arXiv 2508.00180, whose ``eta`` is 0.2. On a noisy quadratic (``benchmarks/bema.py``) it was ahead of
    ``Warmup(0.999)`` at steps 50 and 100 and behind from step 300 on; 0.2 lost to the live weights from step 100 on.

    >>> round(Bema()(90), 3), round(Bema().bias(90), 3)
    (0.9, 0.158)
    """

    kappa: float = 0.5
    eta: float = 0.4
    rho: float = 10.0
    gamma: float = 1.0

    corrects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("kappa", "eta", "rho", "gamma"):
            check_positive(getattr(self, name), f"Bema: {name}")
        if self.rho < 1:
            raise ValueError(f"Bema: rho is {self.rho!r}; it must be at least 1 (the usual value is 10).")

    def __call__(self, n: int) -> float:
        return -math.expm1(-self.kappa * math.log(self.rho + self.gamma * n))

    def bias(self, n: int) -> float:
        return math.pow(self.rho + self.gamma * n, -self.eta)


_WIDEST = math.sqrt(1 / 12)  # sigma_rel of gamma = 0, where the profile is flat


def _inner(schedule: Schedule | float) -> Schedule:
    if not isinstance(schedule, Schedule):
        return Constant(schedule)
    if schedule.corrects:
        raise ValueError(f"{schedule!r} corrects the average of a whole run and cannot be part of another schedule.")
    return schedule


def _bound(schedule: Schedule | float, plan: Plan) -> Schedule | float:
    return schedule.bind(plan) if isinstance(schedule, Schedule) else schedule


@cache  # Power asks at every step
def _gamma_of(sigma_rel: float) -> float:
    """The root by bisection: the left side falls from 1/12 at gamma = 0 and is below 1 / gamma ** 2."""
    low, high = 0.0, 1 / sigma_rel
    while (middle := (low + high) / 2) not in (low, high):
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2:
            low = middle
        else:
            high = middle
    return middle
