"""Schedules of one formula, with a horizon given beforehand. Notation as in :mod:`lightning_ema.schedules`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_ema.checks import check_count, check_decay, check_positive, check_share
from lightning_ema.schedules.base import Plan, Schedule


@dataclass(frozen=True, repr=False)
class Warmup(Schedule):
    """``d(n) = min(decay, (1 + n) / (offset + n))``: what a plain number means.

    The horizon grows with the run, about n / 9 steps at the default offset, until it reaches that of ``decay``, so
    that the random initial weights are forgotten. Mean age: ``(n + 1) / offset`` while it grows, but for what is left
    of the initial weights, ``decay / (1 - decay)`` long after. Source: TensorFlow's
    ``ExponentialMovingAverage(num_updates=...)``.

    >>> [round(Warmup(0.9)(n), 3) for n in (1, 10, 80, 1000)]
    [0.182, 0.55, 0.9, 0.9]
    """

    decay: float
    offset: float = 10.0

    def __post_init__(self) -> None:
        check_decay(self.decay, self)
        check_positive(self.offset, "Warmup: offset")
        if self.offset < 1:
            raise ValueError(f"Warmup: offset is {self.offset!r}; it must be at least 1 (the usual value is 10).")

    def __call__(self, n: int) -> float:
        return min(self.decay, (1 + n) / (self.offset + n))

    def product(self, after: int, upto: int) -> float:
        return _capped_product(after, upto, begin=1, gap=self.offset - 1, decay=self.decay)

    @property
    def limit(self) -> float:
        return self.decay


@dataclass(frozen=True, repr=False)
class HalfLife(Schedule):
    """``d(n) = 2 ** (-1 / h)``: after ``h`` steps half of the old average is left.

    Give exactly one of ``steps``, ``epochs`` and ``samples``; the last two need a run to be turned into steps. Mean
    age, once the start is forgotten: ``1 / (2 ** (1 / h) - 1)``, about ``h / ln 2 - 1 / 2``.
    Source: composer's and EDM2's half-lives.

    >>> round(HalfLife(steps=100).product(0, 100), 12)
    0.5
    """

    steps: float | None = None
    epochs: float | None = None
    samples: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("steps", "epochs", "samples") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"HalfLife: got {', '.join(given) or 'nothing'}; give exactly one of steps=, epochs= and samples=, "
                "for instance HalfLife(steps=1000)."
            )
        check_positive(getattr(self, given[0]), f"HalfLife: {given[0]}")

    def __call__(self, n: int) -> float:
        return self.product(n - 1, n)

    def product(self, after: int, upto: int) -> float:
        if self.steps is None:
            raise ValueError(
                f"{self!r} does not know how long a step is outside a Trainer. Write HalfLife(steps=...), or use it "
                "in EMACallback, which fills that in."
            )
        return math.pow(2.0, (after - upto) / self.steps)

    def bind(self, plan: Plan) -> Schedule:
        if self.epochs is not None:
            return HalfLife(steps=self.epochs * _known(plan.steps_per_epoch, "steps per epoch", self))
        if self.samples is not None:
            return HalfLife(steps=self.samples / _known(plan.samples_per_step, "samples per step", self))
        return self

    @property
    def limit(self) -> float:
        return 1.0 if self.steps is None else self(1)


@dataclass(frozen=True, repr=False)
class Annealing(Schedule):
    """``d(n) = min(decay, n / (gamma + n))``. Source: mmengine's ``MomentumAnnealingEMA``.

    Mean age: ``n / (gamma + 1)`` until it reaches ``decay``, ``decay / (1 - decay)`` long after.

    >>> Annealing(0.9998, gamma=100)(100)
    0.5
    """

    decay: float
    gamma: float

    def __post_init__(self) -> None:
        check_decay(self.decay, self)
        check_positive(self.gamma, "Annealing: gamma")

    def __call__(self, n: int) -> float:
        return min(self.decay, n / (self.gamma + n))

    def product(self, after: int, upto: int) -> float:
        return _capped_product(after, upto, begin=0, gap=self.gamma, decay=self.decay)

    @property
    def limit(self) -> float:
        return self.decay


@dataclass(frozen=True, repr=False)
class ExponentialAnnealing(Schedule):
    """``d(n) = decay * (1 - exp(-(n + offset) / gamma))``.

    Sources: the ``ModelEMA`` of the YOLO family (0.9999, 2000); mmdetection's ``ExpMomentumEMAHook`` and
    ``ExpMomentumEMA`` (``offset=1``), in whose words the rate is ``(1 - momentum) * exp(-(n + offset) / gamma) +
    momentum`` with ``momentum = 1 - decay``. Mean age, long after ``gamma`` and the horizon of ``decay``:
    ``decay / (1 - decay)``.

    >>> round(ExponentialAnnealing(0.9999, gamma=2000)(2000), 4)
    0.6321
    """

    decay: float
    gamma: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        check_decay(self.decay, self)
        check_positive(self.gamma, "ExponentialAnnealing: gamma")
        if self.offset != 0:
            check_positive(self.offset, "ExponentialAnnealing: offset")

    def __call__(self, n: int) -> float:
        return -self.decay * math.expm1(-(n + self.offset) / self.gamma)

    @property
    def limit(self) -> float:
        return self.decay


@dataclass(frozen=True, repr=False)
class Cosine(Schedule):
    """``d(n) = end - (end - start) * (cos(pi * min(n, K) / K) + 1) / 2`` with ``K = total_steps + extra_steps``.

    ``total_steps=None`` takes the steps from ``start_step`` to the end of the run from the Trainer; ``extra_steps``
    lets the cosine end that much later than the run. Mean age, long after ``K``: ``end / (1 - end)``, where ``end`` is
    below 1. Source: BYOL (0.996 to 1), DINO, MoCo v3.

    >>> [round(Cosine(0.9, 1.0, total_steps=10)(n), 3) for n in (5, 10, 99)]
    [0.95, 1.0, 1.0]
    """

    start: float
    end: float
    total_steps: int | None = None
    extra_steps: int = 0

    def __post_init__(self) -> None:
        check_share(self.start, "Cosine: start")
        check_share(self.end, "Cosine: end")
        if self.total_steps is not None:
            check_positive(self.total_steps, "Cosine: total_steps")
        check_count(self.extra_steps, "Cosine: extra_steps", at_least=0)

    def __call__(self, n: int) -> float:
        if self.total_steps is None:
            raise ValueError(
                f"{self!r} does not know the length of the run. Write Cosine({self.start}, {self.end}, "
                "total_steps=...), or use it in EMACallback, which fills that in."
            )
        period = self.total_steps + self.extra_steps
        cosine = math.cos(math.pi * min(n, period) / period)
        return self.end - (self.end - self.start) * (cosine + 1) / 2

    def bind(self, plan: Plan) -> Schedule:
        if self.total_steps is not None:
            return self
        return replace(self, total_steps=int(_known(plan.total_steps, "total number of steps", self)))

    @property
    def limit(self) -> float:
        return self.end


@dataclass(frozen=True, repr=False)
class InversePower(Schedule):
    """``d(n) = clamp(1 - (1 + n / inv_gamma) ** -power, min_decay, decay)``.

    ``decay=1, power=1`` is equal weights, one for every ``inv_gamma`` steps. Mean age within the limits:
    ``n / (inv_gamma + 1)`` for a power of 1, asymptotically ``(n / inv_gamma) ** power`` for a smaller one; with a
    larger one the start is never forgotten. Sources: Katherine Crowson's warm-up, in timm's ``ModelEmaV3``, diffusers
    and ema_pytorch.

    >>> InversePower(0.9999, power=1.0)(3)
    0.75
    """

    decay: float
    inv_gamma: float = 1.0
    power: float = 2 / 3
    min_decay: float = 0.0

    def __post_init__(self) -> None:
        check_decay(self.decay, self)
        check_positive(self.inv_gamma, "InversePower: inv_gamma")
        check_positive(self.power, "InversePower: power")
        check_share(self.min_decay, "InversePower: min_decay")
        if self.min_decay > self.decay:
            raise ValueError(f"InversePower: min_decay {self.min_decay} is above decay {self.decay}; swap them.")

    def __call__(self, n: int) -> float:
        rise = -math.expm1(-self.power * math.log1p(n / self.inv_gamma))
        return min(self.decay, max(self.min_decay, rise))

    @property
    def limit(self) -> float:
        return self.decay


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


def _capped_product(after: int, upto: int, begin: float, gap: float, decay: float) -> float:
    """The product of ``min(decay, (begin + m) / (begin + gap + m))`` over ``m = after + 1 .. upto``.

    Below ``decay``, and for a whole ``gap``, it telescopes into the ``gap`` factors
    ``(begin + after + j) / (begin + upto + j)`` with ``j = 1 .. gap``; fewer steps than that are multiplied one by one.
    """
    crossing = decay * gap / (1 - decay) - begin if decay < 1 else math.inf
    ramp_end = max(after, math.floor(crossing)) if crossing < upto else upto
    if gap == int(gap) and gap < ramp_end - after:
        ramp = math.prod((begin + after + j) / (begin + ramp_end + j) for j in range(1, int(gap) + 1))
    else:
        ramp = math.prod((begin + m) / (begin + gap + m) for m in range(after + 1, ramp_end + 1))
    return ramp * math.pow(decay, upto - ramp_end)


def _known(value: float | None, what: str, schedule: Schedule) -> float:
    if value is None:
        raise ValueError(
            f"{schedule!r} needs the {what}, which this run does not know (a dataset without a length, no max_epochs "
            "or max_steps, a loader without batch_size, or accumulation that changes). Write it in steps instead, "
            "for instance HalfLife(steps=1000) or Cosine(0.99, 1.0, total_steps=10_000)."
        )
    return value
