"""What a user asks of the callback: one frozen value, checked where it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from lightning_ema.averaging.settings import Buffers, OnNonfinite, Recalibrate, Settings
from lightning_ema.checks import check_count, check_flag, check_one_of
from lightning_ema.evaluation.settings import Evaluate, Evaluation
from lightning_ema.posthoc.snapshots import Snapshots, check_schedule
from lightning_ema.schedules.base import Schedule

AfterFit = Literal["average", "live"]


@dataclass(frozen=True)
class CallbackSettings:
    """The arguments of :class:`~lightning_ema.EMACallback`, checked. Its docstring says what each means."""

    average: Settings
    evaluation: Evaluation
    recalibrate: Recalibrate | None
    shard: bool
    start_epoch: int | float
    after_fit: AfterFit
    snapshots: Snapshots | None
    name: str

    @classmethod
    def checked(
        cls,
        decay: float | Schedule | Sequence[float | Schedule],
        every_n_steps: int,
        start_step: int,
        start_epoch: int | float,
        include: Sequence[str] | None,
        exclude: Sequence[str],
        include_frozen: bool,
        buffers: Buffers,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        shard: bool,
        evaluate: Evaluate,
        after_fit: AfterFit,
        snapshots: Snapshots | None,
        on_nonfinite: OnNonfinite,
        name: str,
    ) -> CallbackSettings:
        """Checks every argument on its own.

        Raises:
            ValueError, TypeError: naming the argument, what was given, what is accepted and what to write instead.
        """
        recalibrate = _recalibrate(buffers)
        average = Settings.checked(
            decay,
            every_n_steps,
            start_step,
            include,
            exclude,
            include_frozen,
            buffers if recalibrate is None else "copy",
            dtype,
            device,
            on_nonfinite,
        )
        _check_start_epoch(start_epoch)
        check_flag(shard, "shard")
        check_one_of(after_fit, "after_fit", get_args(AfterFit))
        if snapshots is not None and not isinstance(snapshots, Snapshots):
            raise TypeError(f"snapshots is {snapshots!r}; it must be Snapshots, such as Snapshots(every_n_steps=1000).")
        for schedule in average.decays if snapshots is not None else ():
            check_schedule(schedule)
        if not isinstance(name, str) or not name:
            raise ValueError(f"name is {name!r}; it must be a word, such as 'ema'.")
        return cls(
            average=average,
            evaluation=Evaluation.checked(
                evaluate, several=len(average.decays) > 1, recalibrates=recalibrate is not None
            ),
            recalibrate=recalibrate,
            shard=shard,
            start_epoch=start_epoch,
            after_fit=after_fit,
            snapshots=snapshots,
            name=name,
        )

    def describe(self) -> dict[str, str | int | float | bool]:
        """Plain numbers and strings, for a checkpoint."""
        own: dict[str, str | int | float] = {"start_epoch": self.start_epoch}
        if self.recalibrate is not None:
            own["buffers"] = "recalibrate"
        return {**self.average.describe(), **own}

    def arguments(self, left_out: Sequence[str]) -> dict[str, Any]:
        """The keyword arguments of :class:`~lightning_ema.WeightAverage`, with further patterns to leave out."""
        return {**self.average.as_arguments(), "exclude": (*self.average.exclude, *left_out)}


def _recalibrate(buffers: Buffers) -> Recalibrate | None:
    if isinstance(buffers, Recalibrate):
        return buffers
    check_one_of(buffers, "buffers", ("average", "copy", "recalibrate"))
    return Recalibrate() if buffers == "recalibrate" else None


def _check_start_epoch(start_epoch: int | float) -> None:
    if not isinstance(start_epoch, float):
        check_count(start_epoch, "start_epoch", at_least=0)
    elif not 0 <= start_epoch < 1:
        raise ValueError(
            f"start_epoch is {start_epoch}; it must be a whole number of epochs, or a share of the run's steps below "
            "1, for instance 0.8."
        )
