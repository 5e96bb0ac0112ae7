"""Which of several averages is the best one, by a metric of their own evaluations: what may be asked, and who wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

Mode = Literal["min", "max"]


def check_select(
    select: str, averages: int, evaluate: str, others: str, buffers: str, switch_every: int | str | None
) -> None:
    """Refuse a metric to choose by that is no name, or beside arguments that say themselves what is evaluated."""
    if not isinstance(select, str) or not select:
        raise ValueError(f"select is {select!r}; it must be the name of a metric, such as 'val_loss'.")
    if averages == 1:
        raise ValueError(f"select={select!r} needs several decays to choose from, for instance decay=[0.99, 0.999].")
    for argument, value, refused in (("evaluate", evaluate, "live"), ("others", others, "evaluate")):
        if value == refused:
            raise ValueError(f"select={select!r} beside {argument}={refused!r}: leave {argument} out.")
    if buffers == "recalibrate":
        raise ValueError(f"select={select!r} beside buffers='recalibrate': write buffers='average'.")
    if switch_every is not None:  # by which of the averages?
        raise ValueError(f"select={select!r} beside switch_every={switch_every!r}: leave one of them out.")


def best_of(scores: Sequence[float], mode: Mode, before: int) -> int:
    """The place of the best score. One that is not a number never wins; where none is better, ``before`` stays.

    >>> best_of([0.5, 0.25, math.nan], "min", before=0)
    1
    >>> best_of([0.25, 0.25, 0.5], "min", before=1)
    1
    """
    sign = 1 if mode == "max" else -1
    numbers = [sign * score if not math.isnan(score) else -math.inf for score in scores]
    best = max(numbers)
    return before if numbers[before] == best else numbers.index(best)


def score_of(metric: str, logged: Mapping[str, float]) -> float:
    """The value of a metric among those that were logged.

    Raises:
        ValueError: there is none of this name; those that there are are named.
    """
    if metric not in logged:
        raise ValueError(
            f"select={metric!r}: the module logs no such metric for a whole validation. It logs "
            f"{', '.join(sorted(logged)) or 'nothing'}; write one of these, or log it in validation_step."
        )
    return logged[metric]
