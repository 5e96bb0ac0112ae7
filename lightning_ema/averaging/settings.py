"""What a user asks of an average: one frozen value, checked where it is made."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

import torch

from lightning_ema.checks import check_count, check_flag, check_one_of
from lightning_ema.schedules.base import PerUpdate, Schedule, horizon
from lightning_ema.schedules.basic import Warmup
from lightning_ema.schedules.text import as_whole

OnNonfinite = Literal["skip", "raise", "ignore"]


@dataclass(frozen=True)
class Recalibrate:
    """BatchNorm statistics of the average are estimated anew from training batches: ``buffers=Recalibrate(...)``.

    That is done before an evaluation or a save of the average, as ``torch.optim.swa_utils.update_bn`` does; the live
    ones stay as they are. The module needs a ``forward`` that takes ``batch[0]`` or ``batch``.

    Args:
        batches: from how many.

    Raises:
        ValueError, TypeError: ``batches`` is not a whole number of at least 1.
    """

    batches: int = 100

    def __post_init__(self) -> None:
        check_count(self.batches, "Recalibrate: batches", at_least=1)


Buffers = Literal["average", "copy", "recalibrate"] | Recalibrate


@dataclass(frozen=True)
class Settings:
    """The arguments of :class:`~lightning_ema.WeightAverage`, checked. Its docstring says what each means."""

    decays: tuple[Schedule, ...]
    every_n_steps: int
    start_step: int
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    include_frozen: bool
    buffers: Literal["average", "copy"]
    dtype: torch.dtype | None
    device: torch.device | None
    on_nonfinite: OnNonfinite

    @classmethod
    def checked(
        cls,
        decay: float | Schedule | Sequence[float | Schedule],
        every_n_steps: int,
        start_step: int,
        include: Sequence[str] | None,
        exclude: Sequence[str],
        include_frozen: bool,
        buffers: Buffers,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        on_nonfinite: OnNonfinite,
    ) -> Settings:
        """Checks every argument on its own.

        Raises:
            ValueError, TypeError: naming the argument, what was given, what is accepted and what to write instead.
        """
        decays = as_schedules(decay)
        check_count(every_n_steps, "every_n_steps", at_least=1)
        check_count(start_step, "start_step", at_least=0)
        if buffers == "recalibrate" or isinstance(buffers, Recalibrate):
            raise ValueError(
                f"buffers={buffers!r} needs training batches, which EMACallback takes from its Trainer. In a loop of "
                "your own write buffers='copy', and in `with average.swapped():` call torch.optim.swa_utils.update_bn."
            )
        check_one_of(buffers, "buffers", ("average", "copy"))
        check_flag(include_frozen, "include_frozen")
        check_one_of(on_nonfinite, "on_nonfinite", get_args(OnNonfinite))
        if on_nonfinite == "skip" and any(schedule.corrects for schedule in decays):
            raise ValueError(
                f"on_nonfinite='skip' cannot protect {next(s for s in decays if s.corrects)!r}, which adds live "
                "weights to the average whenever that is swapped in or saved. Use 'raise' or 'ignore'."
            )
        _check_dtype(dtype)
        for schedule in decays:
            if not isinstance(schedule, PerUpdate):  # whose horizon counts updates
                _warn_of_interval(every_n_steps, schedule)
        return cls(
            decays=decays,
            every_n_steps=every_n_steps,
            start_step=start_step,
            include=None if include is None else _patterns(include, "include"),
            exclude=_patterns(exclude, "exclude"),
            include_frozen=include_frozen,
            buffers=buffers,
            dtype=dtype,
            device=None if device is None else _device(device),
            on_nonfinite=on_nonfinite,
        )

    @property
    def decay(self) -> Schedule:
        """The schedule of the first average."""
        return self.decays[0]

    def of(self, place: int) -> Settings:
        """The settings of one of several averages."""
        return replace(self, decays=(self.decays[place],))

    def as_arguments(self) -> dict[str, Any]:
        """The keyword arguments of :class:`~lightning_ema.WeightAverage` that give these settings again."""
        rest = {name: value for name, value in vars(self).items() if name != "decays"}
        return {"decay": self.decay if len(self.decays) == 1 else list(self.decays), **rest}

    def describe(self) -> dict[str, str | int | bool]:
        """Plain numbers and strings, for a checkpoint."""
        arguments = self.as_arguments().items()
        return {name: v if isinstance(v, (bool, int, str)) else repr(v) for name, v in arguments}


def as_schedules(decay: float | Schedule | Sequence[float | Schedule]) -> tuple[Schedule, ...]:
    """One schedule or several: each as it is, a number ``d`` as ``Warmup(d)``."""
    if not isinstance(decay, Sequence) or isinstance(decay, str):
        return (_as_schedule(decay),)
    schedules = tuple(_as_schedule(each) for each in decay)
    if not schedules:
        raise ValueError("decay is empty; write a number, a Schedule or a list of them, for instance [0.99, 0.999].")
    twice = [schedule for place, schedule in enumerate(schedules) if schedule in schedules[:place]]
    if twice:
        raise ValueError(f"decay holds {twice[0]!r} twice, which would be the same average twice; leave one out.")
    return schedules


def label(schedule: Schedule) -> str:
    """A word for one of several averages, for log keys: as it was written, without signs that loggers refuse.

    Equal schedules have one name: whole numbers are written without ``.0``, with which YAML gives them.

    >>> from lightning_ema.schedules import Constant, HalfLife
    >>> label(Warmup(0.999)), label(Constant(0.99)), label(HalfLife(epochs=1.0))
    ('0.999', 'Constant_0.99', 'HalfLife_epochs_1')
    """
    if isinstance(schedule, Warmup) and schedule == Warmup(schedule.decay):
        return repr(float(schedule.decay))
    if not is_dataclass(schedule):
        return type(schedule).__name__  # its repr may hold an address, which is another in every run
    return re.sub(r"[^\w.]+", "_", as_whole(repr(schedule))).strip("_")


def _as_schedule(decay: float | Schedule) -> Schedule:
    if isinstance(decay, Schedule):
        return decay
    if isinstance(decay, bool) or not isinstance(decay, Real):
        raise TypeError(
            f"decay is {decay!r}; it must be a number in [0, 1], a Schedule or a list of these, for instance 0.999, "
            "Cosine(0.99, 1.0, total_steps=10_000) or [0.99, 0.999]."
        )
    return Warmup(float(decay))


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}; it must be a torch dtype, for instance torch.float32.")
    if not dtype.is_floating_point or torch.finfo(dtype).bits < 32:
        raise ValueError(
            f"dtype is {dtype}; an average needs a real type of at least float32: at a decay of 0.9999 one of 16 "
            "bits stops moving. "
            "Write torch.float32 or torch.float64, or leave it out."
        )


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}; torch knows no such device. Write 'cpu' or 'cuda:0'.") from error
    if found.type == "meta":
        raise ValueError("device is 'meta', where tensors hold no numbers; leave it out, or write 'cpu'.")
    return found


def _patterns(patterns: Sequence[str], name: str) -> tuple[str, ...]:
    if not isinstance(patterns, str) and not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name} is {patterns!r}; it must be a list of patterns such as {name}=['encoder.*'].")
    if not isinstance(patterns, str) and name == "include" and not patterns:
        raise ValueError("include is empty, so that nothing would be averaged; leave it out to average everything.")
    if isinstance(patterns, str):
        raise TypeError(f"{name} is the string {patterns!r}; it must be a list of patterns: {name}=[{patterns!r}].")
    return tuple(patterns)


def _warn_of_interval(every_n_steps: int, schedule: Schedule) -> None:
    """Between updates states go unseen, and the mean age shortens by up to (every_n_steps - 1) / 2 steps."""
    aimed_at = horizon(schedule.limit)
    largest = 0.1 * aimed_at + 1e-6  # 1 / (1 - 0.99) is a little below 100
    if every_n_steps > max(1, largest):
        warnings.warn(
            f"every_n_steps={every_n_steps} is more than a tenth of the horizon 1 / (1 - decay) = {aimed_at:.4g} "
            "steps, so the average sees few of the states it is made of. Use every_n_steps="
            f"{max(1, int(largest))} or a decay nearer to 1.",
            stacklevel=4,
        )
