"""The states of random generators: the global ones, and those that objects carry with them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np
import torch

Source = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
"""An object that random numbers are drawn from and that can tell and take its state."""


def is_source(value: object) -> TypeGuard[Source]:
    """Whether random numbers are drawn from ``value``; the operating system's have no state and do not count."""
    return isinstance(value, Source) and not isinstance(value, random.SystemRandom)


def state_of(source: Source) -> Any:
    """What :func:`set_state` needs to make ``source`` draw the same numbers once more."""
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    if isinstance(source, random.Random):
        return source.getstate()
    return source.get_state()


def set_state(source: Source, state: Any) -> None:
    """Brings ``source`` back to a state that :func:`state_of` gave."""
    if isinstance(source, np.random.Generator):
        source.bit_generator.state = state
    elif isinstance(source, random.Random):
        source.setstate(state)
    else:
        source.set_state(state)


class RandomStates:
    """The states of Python's, NumPy's and torch's global generators, and of the sources among objects' attributes.

    Args:
        owners: objects whose own attributes are looked through for sources.
    """

    def __init__(self, owners: Iterable[object] = ()) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._torch = torch.get_rng_state()
        # asking would start CUDA in a process that does without it
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        found = {id(value): value for owner in owners for value in _attributes(owner) if is_source(value)}
        self._sources = [(source, state_of(source)) for source in found.values()]

    def put_back(self) -> None:
        """Brings all of them back to the states they had when this was made."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        for source, state in self._sources:
            set_state(source, state)


def _attributes(owner: object) -> list[Any]:
    return list(getattr(owner, "__dict__", {}).values())
