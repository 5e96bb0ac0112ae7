"""What a user asks of an evaluation: frozen values, checked where they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_ema.checks import check_count, check_flag, check_one_of

Mode = Literal["min", "max"]
Weights = Literal["average", "live", "both", "all"]


@dataclass(frozen=True)
class Select:
    """Chooses one of several averages in each validation of a fit, by a metric of its own evaluation.

    Each average is evaluated in a pass of its own, logged as ``<metric>/<name>_<decay>``; then the best one is
    evaluated under the plain names, monitored, saved and applied. Takes one more pass over the data than there are
    averages.

    Example::

        EMACallback(decay=[0.99, 0.999], evaluate=Select("val_loss"))

    Args:
        metric: its name, as the module logs it for a whole validation.
        mode: whether the smallest (``"min"``) or the largest (``"max"``) value is the best.
        every: choose only in every so many validations.
        live: score the live weights too, in a further pass, logged as ``<metric>_live``.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    metric: str
    mode: Mode = "min"
    every: int = 1
    live: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ValueError(f"Select: metric is {self.metric!r}; it must be the name of a metric, such as 'val_loss'.")
        check_one_of(self.mode, "Select: mode", get_args(Mode))
        check_count(self.every, "Select: every", at_least=1)
        check_flag(self.live, "Select: live")


Evaluate = Weights | Select


@dataclass(frozen=True)
class Evaluation:
    """Which weights evaluations and files are given, and which are scored beside them."""

    evaluate: Evaluate

    @classmethod
    def checked(cls, evaluate: Evaluate, *, several: bool, recalibrates: bool) -> Evaluation:
        """Checks what was asked, and beside it what excludes it.

        Args:
            evaluate: as in :class:`~lightning_ema.EMACallback`.
            several: whether there are several averages.
            recalibrates: whether BatchNorm statistics are estimated anew.

        Raises:
            ValueError: naming the argument, what was given, what is accepted and what to write instead.
        """
        if not isinstance(evaluate, Select):
            if evaluate not in get_args(Weights):
                accepted = ", ".join(map(repr, get_args(Weights)))
                raise ValueError(f"evaluate is {evaluate!r}; accepted are {accepted} and Select('val_loss').")
        elif not several:
            raise ValueError(
                f"evaluate={evaluate!r} needs several decays to choose from, for instance decay=[0.99, 0.999]."
            )
        elif recalibrates:
            raise ValueError(f"evaluate={evaluate!r} beside buffers='recalibrate': write buffers='average'.")
        return cls(evaluate)

    @property
    def gives_average(self) -> bool:
        """Whether evaluations and files are given an average."""
        return self.evaluate != "live"

    @property
    def select(self) -> Select | None:
        """How one of several averages is chosen; None where it is the first."""
        return self.evaluate if isinstance(self.evaluate, Select) else None

    @property
    def scores_live(self) -> bool:
        """Whether the live weights are scored beside the average."""
        return self.evaluate in ("both", "all") or (self.select is not None and self.select.live)

    @property
    def scores_further(self) -> bool:
        """Whether each further average is scored beside the first."""
        return self.evaluate == "all"

    @property
    def needs_passes(self) -> bool:
        """Whether further passes over the data are asked for."""
        return self.scores_live or self.select is not None
