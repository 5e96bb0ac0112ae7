"""The decay as a function of the step: which states an average is made of, and how far back it reaches.

When to take which is told in ``docs/how-to/choose-a-schedule.md``: a plain number, which means ``Warmup(d)``, where
nothing speaks for another; ``HalfLife`` for a horizon in epochs or samples; ``Equal`` for the mean of a tail of the
run; ``Cosine`` for the teachers of BYOL and DINO. ``Then``, ``Shifted`` and ``Scaled`` compose; ``PerUpdate`` stands
around the whole. A schedule of your own is a class derived from ``Schedule``. The losses' ramps are in
:mod:`lightning_ema.semi_supervised`, the settings of other systems in :mod:`lightning_ema.recipes`.

Notation, used in every formula below:

* ``n``: the step, counted from 1 at the first step after ``start_step``;
* ``d(n)``: the decay of step ``n``, in [0, 1]: ``average = d(n) * average + (1 - d(n)) * live``;
* ``1 / (1 - d)``: the horizon, the number of steps over which the average reaches back;
* the mean age: how many steps old the states in the average are, weighted as they are in it. The live weights of
  step ``n`` have the age 0, those before the first step the age ``n``. It obeys ``A(n) = d(n) * (A(n - 1) + 1)``.

Schedules are frozen values: pure functions of numbers, without state and without torch.
"""

from lightning_ema.schedules.base import Constant, PerUpdate, Plan, Schedule
from lightning_ema.schedules.basic import (
    Annealing,
    Cosine,
    Debiased,
    ExponentialAnnealing,
    HalfLife,
    InversePower,
    Warmup,
)
from lightning_ema.schedules.composed import Scaled, Shifted, Then
from lightning_ema.schedules.growing import Bema, Equal, Power
from lightning_ema.schedules.text import read_schedule, write_schedule

__all__ = [
    "Annealing",
    "Bema",
    "Constant",
    "Cosine",
    "Debiased",
    "Equal",
    "ExponentialAnnealing",
    "HalfLife",
    "InversePower",
    "PerUpdate",
    "Plan",
    "Power",
    "Scaled",
    "Schedule",
    "Shifted",
    "Then",
    "Warmup",
    "read_schedule",
    "write_schedule",
]
