"""Ramps: a share that rises from the first step of a run on, by which the weight of a loss is multiplied. No torch."""

from __future__ import annotations

import math
from numbers import Real


def sigmoid_ramp(step: float, steps: float) -> float:
    """``exp(-5 (1 - x)^2)`` with ``x = clamp(step / steps, 0, 1)``: from 0.0067 at step 0 to 1 at ``steps``.

    Sources: Temporal Ensembling (arXiv 1610.02242), Mean Teacher (arXiv 1703.01780).

    Args:
        step: steps (or epochs) gone by; below 0 counts as 0.
        steps: length of the ramp in the same unit, at least 0; 0 means 1 from the start.

    Raises:
        ValueError: ``steps`` is negative or not finite, or an argument is no number.

    >>> [round(sigmoid_ramp(step, 100), 4) for step in (0, 50, 100, 200)]
    [0.0067, 0.2865, 1.0, 1.0]
    """
    return math.exp(-5 * (1 - _share_of_ramp(step, steps)) ** 2)


def linear_ramp(step: float, steps: float) -> float:
    """``x = clamp(step / steps, 0, 1)``: from 0 at step 0 to 1 at ``steps``. Source: MixMatch (arXiv 1905.02249).

    Args:
        step: steps (or epochs) gone by; below 0 counts as 0.
        steps: length of the ramp in the same unit, at least 0; 0 means 1 from the start.

    Raises:
        ValueError: ``steps`` is negative or not finite, or an argument is no number.

    >>> [linear_ramp(step, 100) for step in (0, 25, 100, 200)]
    [0.0, 0.25, 1.0, 1.0]
    """
    return _share_of_ramp(step, steps)


def cosine_ramp(step: float, steps: float) -> float:
    """``(1 - cos(pi x)) / 2`` with ``x = clamp(step / steps, 0, 1)``: from 0 at step 0 to 1 at ``steps``.

    Args:
        step: steps (or epochs) gone by; below 0 counts as 0.
        steps: length of the ramp in the same unit, at least 0; 0 means 1 from the start.

    Raises:
        ValueError: ``steps`` is negative or not finite, or an argument is no number.

    >>> [round(cosine_ramp(step, 100), 4) for step in (0, 50, 75, 200)]
    [0.0, 0.5, 0.8536, 1.0]
    """
    return (1 - math.cos(math.pi * _share_of_ramp(step, steps))) / 2


def is_number(value: object) -> bool:
    """Whether the value is a number; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _share_of_ramp(step: float, steps: float) -> float:
    """``clamp(step / steps, 0, 1)``; 1 where ``steps`` is 0."""
    if not is_number(steps) or not 0 <= steps < math.inf:
        raise ValueError(f"steps is {steps!r}; it must be a finite number of at least 0 (0: fully on at once).")
    if not is_number(step) or math.isnan(step):
        raise ValueError(f"step is {step!r}; it must be a number. For a tensor write step.item().")
    return 1.0 if step >= steps else max(0.0, float(step / steps))
