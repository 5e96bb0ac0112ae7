"""What a recipe returns, and the checks of its arguments under the other system's names."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Literal, TypedDict

from lightning_ema.checks import check_positive, check_share
from lightning_ema.schedules.base import Schedule


class Recipe(TypedDict, total=False):
    """Keyword arguments of :class:`~lightning_ema.WeightAverage` and :class:`~lightning_ema.EMACallback`.

    What the other system does not fix is left out, so that ``EMACallback(**recipe, start_epoch=2)`` can add it.
    """

    decay: Schedule | Sequence[Schedule]
    every_n_steps: int
    start_step: int
    buffers: Literal["average", "copy"]


def buffers_where(averaged: bool) -> Literal["average", "copy"]:
    """``"average"`` where the other system averages floating-point buffers, ``"copy"`` where it takes the live ones."""
    return "average" if averaged else "copy"


def share(value: float, argument: str) -> float:
    """The value, where it is a number in [0, 1]."""
    check_share(value, argument)
    return value


def decay_of(momentum: float, argument: str) -> float:
    """``1 - momentum``, where the momentum is the share of the new weights in an update."""
    if not isinstance(momentum, bool) and isinstance(momentum, Real) and 0 <= momentum <= 1:
        return 1 - momentum
    raise ValueError(
        f"{argument} is {momentum!r}; it is the share of the new weights in an update, a number from 0 to 1, such as "
        "0.0002 for a decay of 0.9998."
    )


def positive(value: float, argument: str) -> float:
    """The value, where it is a positive, finite number."""
    check_positive(value, argument)
    return value
