"""Checks of single arguments: each refusal says what was given and what is accepted."""

from __future__ import annotations

import math
import warnings
from numbers import Real


def check_decay(value: float, schedule: object) -> None:
    """Refuse a decay outside [0, 1]; warn of one that looks like a momentum (1 - decay).

    Zero is exempt from the warning: it asks for a plain copy, as in ``Then(0.0, at=100, second=0.999)``.
    """
    check_share(value, f"{type(schedule).__name__}: decay")
    if 0 < value < 0.5:
        warnings.warn(
            f"{type(schedule).__name__}: decay is {value}, so each step replaces {1 - value:.3g} of the average. If "
            f"{value} is a momentum (1 - decay, as OpenMMLab writes it), write decay={1 - value:.6g} instead.",
            stacklevel=4,
        )


def check_share(value: float, name: str) -> None:
    """Refuse a value that is not a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number from 0 to 1, for instance 0.999.")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; it must lie in [0, 1], for instance 0.999.")


def check_positive(value: float, name: str) -> None:
    """Refuse a value that is not a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a positive, finite number.")


def check_weight(value: float, name: str) -> None:
    """Refuse what is not a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0.")


def check_count(value: int, name: str, at_least: int) -> None:
    """Refuse what is not a whole number of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be a whole number of at least {at_least}.")
    if value < at_least:
        raise ValueError(f"{name} is {value}; it must be at least {at_least}.")


def check_one_of(value: str, name: str, accepted: tuple[str, ...]) -> None:
    """Refuse a word that is not among the accepted ones."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}.")


def check_flag(value: bool, name: str) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False.")
