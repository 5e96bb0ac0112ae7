"""Schedules whose horizon grows with the run, without end. Notation as in :mod:`lightning_ema.schedules`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from lightning_ema.checks import check_positive
from lightning_ema.schedules.base import Schedule


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
class Bema(Schedule):
    """``d(n) = 1 - (rho + gamma * n) ** -kappa``, corrected for the lag of the average.

    What is evaluated and saved is ``average + bias(n) * (live - start)`` with ``bias(n) = (rho + gamma * n) ** -eta``
    and ``start`` the live weights at ``start_step``, which are kept: one more tensor for each averaged parameter.
    Buffers are averaged and not corrected. ``live`` are the live weights at the time of the swap or save.

    Source: BEMA, arXiv 2508.00180, whose ``eta`` is 0.2. On a noisy quadratic (``benchmarks/bema.py``) it was ahead of
    ``Warmup(0.999)`` at steps 50 and 100 and behind from step 300 on; 0.2 lost to the live weights from step 100 on.

    >>> round(Bema()(90), 3), round(Bema().bias(90), 3)
    (0.9, 0.158)
    """

    kappa: float = 0.5
    eta: float = 0.4
    rho: float = 10.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        for name in ("kappa", "eta", "rho", "gamma"):
            check_positive(getattr(self, name), f"Bema: {name}")
        if self.rho < 1:
            raise ValueError(f"Bema: rho is {self.rho!r}; it must be at least 1 (the usual value is 10).")

    def __call__(self, n: int) -> float:
        return -math.expm1(-self.kappa * math.log(self.rho + self.gamma * n))

    @property
    def corrects(self) -> bool:
        return True

    def bias(self, n: int) -> float:
        return math.pow(self.rho + self.gamma * n, -self.eta)


_WIDEST = math.sqrt(1 / 12)  # sigma_rel of gamma = 0, where the profile is flat


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
