"""The moment between all hooks that begin a training batch and its forward pass, for which Lightning has no hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy

NAME = "on_train_batch_start"


def before_forward(trainer: Trainer, work: Callable[[], None]) -> None:
    """Calls ``work`` once, in the present batch, after its ``on_train_batch_start`` of all callbacks and the module."""
    Once(trainer.strategy, work).install()


class Once:
    """Stands for one batch in the place of the strategy's hook, which Lightning calls last. A copy of it works, too."""

    def __init__(self, strategy: Strategy, work: Callable[[], None]) -> None:
        self._strategy = strategy
        self._work = work
        self._before: Any = None

    def install(self) -> None:
        """From here on it is called."""
        self._before = vars(self._strategy).get(NAME)
        setattr(self._strategy, NAME, self)

    def __call__(self, batch: Any, batch_idx: int) -> None:
        delattr(self._strategy, NAME)
        if self._before is not None:
            setattr(self._strategy, NAME, self._before)
        self._work()
        getattr(self._strategy, NAME)(batch, batch_idx)
