"""Which of several averages is the best one, by a metric of their own evaluations. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_ema.evaluation.settings import Mode


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
            f"Select({metric!r}): the module logs no such metric for a whole validation. It logs "
            f"{', '.join(sorted(logged)) or 'nothing'}; write one of these, or log it in validation_step."
        )
    return logged[metric]
